"""What all datamodules with an environment share: sizes, evaluation tasks, and the scores of random actions."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning as L
import torch

from components.checks import Count, Seed, Size, checked
from datamodules.environments.measured import MeasuredEnv
from datamodules.evaluation import EvaluationTask
from datamodules.sampling import EvaluationTasks


@checked
class EnvironmentDataModule(L.LightningDataModule):
    """Evaluation tasks in an environment; subclasses say where training data come from.

    Args:
        environment: makes an environment, called with `num_envs`, `seed` and a protocol's `start`. None where nothing
            is rolled out and there are no protocols: subclasses then know the sizes and the tasks.
        protocols: name -> `{"rewards": [names] or {name: expression}, "start": ...}`; what to evaluate on. Other
            entries of a protocol are arguments of the environment too.
        batch_size: transitions in an update, over all processes.
        updates_per_step: updates in one Lightning step.
        evaluate_every: updates between evaluations.
        episodes: episodes for each reward in the final evaluation.
        curve_episodes: the same for the learning curves.
        task: what a protocol becomes, `EvaluationTask` or a subclass with metrics of its own.
        seed: of the training data.
    """

    evaluation_seed = 12345  # evaluations of all runs meet the same starts and the same samples

    def __init__(
        self,
        environment: Callable[..., MeasuredEnv] | None,
        protocols: Mapping[str, Mapping[str, Any]],
        *,
        batch_size: Size,
        updates_per_step: Size,
        evaluate_every: Count,
        episodes: Size = 10,
        curve_episodes: Size = 4,
        task: Callable[..., EvaluationTask] = EvaluationTask,
        seed: Seed = 0,
    ) -> None:
        super().__init__()
        if evaluate_every % updates_per_step:
            raise ValueError(f"evaluate_every={evaluate_every} is no multiple of updates_per_step={updates_per_step}.")
        self._make_env = environment
        self.protocols = {name: dict(protocol) for name, protocol in protocols.items()}
        self.batch_size = batch_size
        self.updates_per_step = updates_per_step
        self.evaluate_every = evaluate_every
        self.episodes = episodes
        self.curve_episodes = curve_episodes
        self._make_task = task
        self.seed = seed
        if environment is None:
            assert not protocols
            return
        env = self._reference_env = environment(num_envs=1, seed=self.evaluation_seed)
        for name, protocol in self.protocols.items():  # a typing error shows before anything is collected or trained
            try:
                env.check_tasks(list(named_rewards(protocol).values()))
            except ValueError as error:
                raise ValueError(f"datamodule.protocols.{name}.rewards: {error}") from error

    @property
    def spec(self) -> dict[str, Any]:
        """Sizes a method is built from, known before any data are there."""
        env = self._reference_env
        return {
            "observation_shape": list(env.observation_spec["observation"].shape[1:]),
            "action_dim": env.action_spec.shape[-1],
        }

    def share(self, batch_size: int, processes: int) -> int:
        """The part of a batch that one of several processes draws.

        Raises:
            ValueError: the batch can't be split evenly.
        """
        if batch_size % processes:
            raise ValueError(f"batch_size={batch_size} can't be split over {processes} processes.")
        return batch_size // processes

    def next_evaluation(self, update: int, last: int) -> int:
        """The update before which training pauses next: for an evaluation, or because it is over."""
        return min((update // self.evaluate_every + 1) * self.evaluate_every, last)

    def val_dataloader(self) -> EvaluationTasks:
        return EvaluationTasks(self.evaluation_tasks(self.curve_episodes))

    def test_dataloader(self) -> EvaluationTasks:
        return EvaluationTasks(self.evaluation_tasks(self.episodes))

    def choose_tasks(self, protocol: str | None = None, reward: str | None = None) -> None:
        """Evaluate on one protocol only (all if None), and on one reward expression instead of the named tasks.

        Raises:
            ValueError: there is no such protocol, or the expression does not make sense.
        """
        if protocol is not None:
            if protocol not in self.protocols:
                raise ValueError(f"Unknown protocol={protocol}: expected one of {', '.join(self.protocols)}.")
            self.protocols = {protocol: self.protocols[protocol]}
        if reward is not None:
            self._reference_env.check_tasks([reward])
            self.protocols = {name: {**own, "rewards": {"reward": reward}} for name, own in self.protocols.items()}

    def evaluation_tasks(self, episodes: int) -> list[EvaluationTask]:
        """One task for each protocol."""
        return [self._task(name, protocol, episodes) for name, protocol in self.protocols.items()]

    @property
    def rewards(self) -> dict[str, dict[str, str]]:
        """What is evaluated: by protocol, tasks or expressions by the names of the rewards."""
        return {name: named_rewards(protocol) for name, protocol in self.protocols.items()}

    @property
    def metric_names(self) -> list[str]:
        """What evaluations will have measured, before there are data; a * for what the method names."""
        return [name for task in self.evaluation_tasks(self.episodes) for name in task.metric_names]

    def _task(self, name: str, protocol: Mapping[str, Any], episodes: int) -> EvaluationTask:
        rewards = named_rewards(protocol)
        arguments = {key: value for key, value in protocol.items() if key != "rewards"}

        def make_env(rows: int) -> MeasuredEnv:
            return self._make_env(num_envs=rows, seed=self.evaluation_seed, **arguments)

        return self._make_task(name, rewards, make_env, episodes, self._sampler(list(rewards.values())))

    def _sampler(self, expressions: Sequence[str]) -> Callable[[], Any] | None:
        """Gives transitions from which a task is inferred; None where methods learn with the task at hand."""
        return None

    def references(self) -> dict[str, dict[str, list[float]]]:
        """Scores to compare with: those of a policy of uniform random actions."""
        random: dict[str, list[float]] = {}
        size = self.spec["action_dim"]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.evaluation_seed)
            for task in self.evaluation_tasks(self.episodes):
                result = task.run(lambda seen: seen.set("action", 2 * torch.rand(seen.batch_size[0], size) - 1))
                random.update(task.metrics(result))
        return {"random policy": random}


def named_rewards(protocol: Mapping[str, Any]) -> dict[str, str]:
    """A protocol's rewards as name -> task or expression."""
    rewards = protocol["rewards"]
    return dict(rewards) if isinstance(rewards, Mapping) else {name: name for name in rewards}

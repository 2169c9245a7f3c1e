"""Learning from a fixed data set of transitions, with tasks that are named only at evaluation.

Dimensions: n transitions or samples, T rewards, O observation, A action.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from components.checks import check_counts
from components.distributed import world_size
from datamodules.environments.measured import MeasuredEnv
from datamodules.evaluation import EvaluationTask, EvaluationTasks
from datamodules.sampling import UniformBatches
from datamodules.transitions import TransitionDataset

_CHUNK = 65536


class OfflineDataModule(L.LightningDataModule):
    """Batches of stored transitions, and evaluation tasks in the environment that they came from.

    Args:
        dataset: makes or loads the data set when training or evaluation needs it.
        environment: makes an environment, called with `num_envs`, `seed` and a protocol's `start`.
        protocols: name -> `{"rewards": [names] or {name: expression}, "start": ...}`; what to evaluate on. Other
            entries of a protocol are arguments of the environment too.
        batch_size: transitions in an update, over all processes.
        updates_per_step: updates in one Lightning step.
        evaluate_every: updates between evaluations.
        episodes: episodes for each reward in the final evaluation.
        curve_episodes: the same for the learning curves.
        inference_samples: number n of transitions from which tasks are inferred; the same ones at every evaluation.
        task: what a protocol becomes, `EvaluationTask` or a subclass with metrics of its own.
        seed: of the batches.
        on_device: keep the data set in the training device's memory.
    """

    evaluation_seed = 12345  # evaluations of all runs meet the same starts and the same samples

    def __init__(
        self,
        dataset: Callable[[], TransitionDataset],
        environment: Callable[..., MeasuredEnv],
        protocols: Mapping[str, Mapping[str, Any]],
        *,
        batch_size: int,
        updates_per_step: int,
        evaluate_every: int,
        episodes: int = 10,
        curve_episodes: int = 4,
        inference_samples: int = 100_000,
        task: Callable[..., EvaluationTask] = EvaluationTask,
        seed: int = 0,
        on_device: bool = True,
    ) -> None:
        super().__init__()
        check_counts(
            batch_size=batch_size,
            updates_per_step=updates_per_step,
            evaluate_every=evaluate_every,
            episodes=episodes,
            curve_episodes=curve_episodes,
            inference_samples=inference_samples,
        )
        if evaluate_every % updates_per_step:
            raise ValueError(f"evaluate_every={evaluate_every} is no multiple of updates_per_step={updates_per_step}.")
        self._make_dataset = dataset
        self._make_env = environment
        self.protocols = {name: dict(protocol) for name, protocol in protocols.items()}
        self.batch_size = batch_size
        self.updates_per_step = updates_per_step
        self.evaluate_every = evaluate_every
        self.episodes = episodes
        self.curve_episodes = curve_episodes
        self.inference_samples = inference_samples
        self._make_task = task
        self.seed = seed
        self.on_device = on_device
        self.dataset: TransitionDataset | None = None
        self._train_data: TensorDict | None = None
        self._inference_cache: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}
        env = self._reference_env = environment(num_envs=1, seed=self.evaluation_seed)
        for protocol in self.protocols.values():  # a typing error shows before anything is collected or trained
            env.check_tasks(list(_named(protocol).values()))

    @property
    def spec(self) -> dict[str, int]:
        """Sizes a method is built from, known before any data are there."""
        env = self._reference_env
        return {
            "observation_dim": env.observation_spec["observation"].shape[-1],
            "action_dim": env.action_spec.shape[-1],
        }

    # -- Lightning ----------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Make the data set once, before the other processes load it."""
        self._make_dataset()

    def setup(self, stage: str) -> None:
        if self.dataset is not None:
            return
        self.dataset = self._make_dataset()
        spec, domain = self.spec, self._reference_env.domain_name
        if self.dataset.domain != domain:
            raise ValueError(f"The data set is of {self.dataset.domain}, expected {domain} as the environment.")
        for name, found in (("observation", self.dataset.observation_dim), ("action", self.dataset.action_dim)):
            if found != spec[f"{name}_dim"]:
                raise ValueError(
                    f"The data set has {name}s of size {found}, expected {spec[f'{name}_dim']} as in the environment."
                )

    def train_dataloader(self) -> UniformBatches:
        assert self.dataset is not None
        assert self.trainer is not None
        module = self.trainer.lightning_module
        if self._train_data is None:
            keys = ("observation", "action", ("next", "observation"), ("next", "terminated"), ("next", "reward"))
            data = self.dataset.data.select(*keys)
            self._train_data = data.to(module.device if self.on_device else "cpu")
        if self.batch_size % world_size():
            raise ValueError(f"batch_size={self.batch_size} can't be split over {world_size()} processes.")
        start = module.updates
        next_evaluation = (start // self.evaluate_every + 1) * self.evaluate_every
        stop = min(next_evaluation, module.total_updates)
        return UniformBatches(
            self._train_data, self.batch_size // world_size(), self.updates_per_step, start, stop, self.seed
        )

    def val_dataloader(self) -> EvaluationTasks:
        return EvaluationTasks(self.evaluation_tasks(self.curve_episodes))

    def test_dataloader(self) -> EvaluationTasks:
        return EvaluationTasks(self.evaluation_tasks(self.episodes))

    def state_dict(self) -> dict[str, Any]:
        assert self.dataset is not None
        return {"data": self._fingerprint()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse to go on with other data than the run began with."""
        assert self.dataset is not None
        if state_dict["data"] != self._fingerprint():
            raise ValueError("The data set is not the one that the checkpoint's run was trained on.")

    def _fingerprint(self) -> dict[str, Any]:
        """What tells data apart: the checksums of stored files, the recipe of data that are made anew each time."""
        assert self.dataset is not None
        return self.dataset.manifest.get("files") or self.dataset.manifest

    # -- tasks --------------------------------------------------------------------------------------------------------

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

    def _task(self, name: str, protocol: Mapping[str, Any], episodes: int) -> EvaluationTask:
        rewards = _named(protocol)
        arguments = {key: value for key, value in protocol.items() if key != "rewards"}

        def make_env(rows: int) -> MeasuredEnv:
            return self._make_env(num_envs=rows, seed=self.evaluation_seed, **arguments)

        return self._make_task(name, rewards, make_env, episodes, lambda: self.samples(tuple(rewards.values())))

    def samples(self, expressions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """States [n, O] drawn from the data's next states and the rewards [n, T] of arriving there.

        Raises:
            ValueError: a reward is the same in all of them.
        """
        key = tuple(expressions)
        if key not in self._inference_cache:
            assert self.dataset is not None
            generator = torch.Generator().manual_seed(self.evaluation_seed)
            count = len(self.dataset)
            index = torch.randperm(count, generator=generator)[: self.inference_samples]
            rows = self.dataset.data[index]
            rewards = self._rewards(rows, expressions)
            for expression, reward in zip(expressions, rewards.T):
                if (reward == reward[0]).all():
                    raise ValueError(
                        f"The reward {expression!r} is {reward[0]:g} in all of {len(reward)} sampled states of the "
                        "data: expected one that differs between them, or it says nothing about what to do."
                    )
            self._inference_cache[key] = rows["next", "observation"].clone(), rewards
        return self._inference_cache[key]

    def _rewards(self, rows: TensorDictBase, expressions: Sequence[str]) -> Tensor:
        """Rewards [n, T] of stored transitions [n]."""
        env = self._reference_env
        parts = []
        for chunk in rows.split(_CHUNK):
            parts.append(env.rewards(env.measure(chunk), expressions))
        return torch.cat(parts)

    def references(self) -> dict[str, dict[str, list[float]]]:
        """Scores to compare with: a policy of uniform random actions, and the best episode of the data by each reward.

        An episode of the data counts with its own length, which may be less than that of an evaluation episode.
        """
        assert self.dataset is not None
        random: dict[str, list[float]] = {}
        best: dict[str, list[float]] = {}
        size = self.spec["action_dim"]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.evaluation_seed)
            for task in self.evaluation_tasks(self.episodes):
                result = task.run(lambda seen: seen.set("action", 2 * torch.rand(seen.batch_size[0], size) - 1))
                random.update(task.metrics(result))
        rewards = {name: text for protocol in self.protocols.values() for name, text in _named(protocol).items()}
        returns = self.dataset.episode_returns(self._rewards(self.dataset.data, list(rewards.values())))
        top = dict(zip(rewards, returns.max(0).values.tolist()))
        for name, protocol in self.protocols.items():
            found = {f"{name}/{reward}/return": [top[reward]] for reward in _named(protocol)}
            best.update({metric: values for metric, values in found.items() if metric in random})
        return {"random policy": random} | ({"best episode in the data": best} if best else {})


def _named(protocol: Mapping[str, Any]) -> dict[str, str]:
    """A protocol's rewards as name -> task or expression."""
    rewards = protocol["rewards"]
    return dict(rewards) if isinstance(rewards, Mapping) else {name: name for name in rewards}

"""Episodes of random actions, to study what critics make of data that never change.

Dimensions: E episodes, T steps of each, B batch.
"""

from collections.abc import Callable, Mapping
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.envs.utils import step_mdp

from components.checks import Count, Share, Size, checked
from components.distributed import world_size
from datamodules.environment import EnvironmentDataModule
from datamodules.environments.measured import MeasuredEnv
from datamodules.evaluation import TransitionsTask
from datamodules.replay import ReplayBuffer
from datamodules.sampling import EvaluationTasks, Stacks, batch_generator

TARGETS = ("sarsa", "monte_carlo")

# The arms of a study follow one another in one process, on the same episodes.
_latest: dict[str, tuple[TensorDict, Any]] = {}


@checked
class RandomEpisodesDataModule(EnvironmentDataModule):
    """Batches from episodes of uniformly random actions, some of which are held out; nothing else is ever collected.

    Data and batches are functions of the seed: arms that differ in their method alone see the same. Transitions carry
    the action that followed, so that critics learn the value of random actions (SARSA), and `return` [B, 1], the
    discounted sum of the rewards up to the end of the episode.

    Args:
        environment: see `EnvironmentDataModule`; its episodes must be of one length.
        training_episodes, held_out_episodes: E of each kind.
        targets: ``sarsa``, or ``monte_carlo`` for a control without bootstrapping: every transition's reward is its
            return, in standard deviations from the mean over the training data, and terminates.
        n_step: steps of the returns; of no consequence with ``monte_carlo``.
        discount: of rewards.
        scored: transitions that scores are computed from, of each kind.
        protocols: what a policy made of these data is evaluated on, see `EnvironmentDataModule`; nothing by default.
        settings: further arguments of `EnvironmentDataModule`.
    """

    def __init__(
        self,
        environment: Callable[..., MeasuredEnv],
        *,
        training_episodes: Size = 5,
        held_out_episodes: Size = 1,
        targets: str = "sarsa",
        n_step: Size = 3,
        discount: Share = 0.99,
        scored: Count = 125,
        protocols: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
        **settings: Any,
    ) -> None:
        super().__init__(environment, protocols, **settings)
        if targets not in TARGETS:
            raise ValueError(f"Unknown targets={targets!r}: expected one of {', '.join(TARGETS)}.")
        self.training_episodes = training_episodes
        self.held_out_episodes = held_out_episodes
        self.targets = targets
        self.n_step = n_step
        self.discount = discount
        self.scored = scored
        self._score_fit = True

    @cached_property
    def _episodes(self) -> TensorDictBase:
        count = self.training_episodes + self.held_out_episodes
        key = repr((self._make_env, count, self.seed, self.discount))
        if key not in _latest:
            _latest.clear()
            env = self._make_env(num_envs=count, seed=self.seed)
            episodes = random_episodes(env, torch.Generator().manual_seed(self.seed), self.discount)
            _latest[key] = episodes, self._make_env  # kept, so that no other gets its address, which may be in the key
        return _latest[key][0]

    @cached_property
    def training(self) -> ReplayBuffer:
        """The training data, on the training device; not before training begins."""
        return self._stored(self._episodes[: self.training_episodes])

    @cached_property
    def held_out(self) -> ReplayBuffer:
        """The other episodes."""
        return self._stored(self._episodes[self.training_episodes :])

    def _stored(self, steps: TensorDictBase) -> ReplayBuffer:
        device, frame_stack = self.trainer.lightning_module.device, self._reference_env.frame_stack
        replay = ReplayBuffer(steps[:, 0], steps.numel(), 0, "", device=device, frame_stack=frame_stack)
        replay.extend(steps)
        return replay

    def sample(self, replay: ReplayBuffer, shape: tuple[int, ...], generator: torch.Generator) -> TensorDict:
        """Transitions [*shape] with the targets that were asked for."""
        if self.targets == "sarsa":
            return replay.sample(shape, generator, self.n_step, self.discount)
        batch = replay.sample(shape, generator)
        returns = self._episodes["return"][: self.training_episodes]
        batch["return"] = (batch["return"] - returns.mean()) / returns.std()
        batch["next", "reward"] = batch["return"]
        batch["next", "terminated"] = torch.ones_like(batch["next", "terminated"])
        return batch

    def train_dataloader(self) -> Stacks:
        assert self.trainer is not None
        module = self.trainer.lightning_module
        shape = (self.updates_per_step, self.share(self.batch_size, world_size()))
        stop = self.next_evaluation(module.updates, module.total_updates)
        return Stacks(
            lambda update: self.sample(self.training, shape, batch_generator(self.seed, update)),
            self.updates_per_step,
            module.updates,
            stop,
        )

    def choose_tasks(self, protocol: str | None = None, reward: str | None = None) -> None:
        if (protocol or reward) is not None:
            if not self.protocols:
                asked = f"protocol={protocol}" if protocol is not None else f"reward={reward}"
                raise ValueError(
                    f"{asked}: expected an experiment that rolls out a policy, found one of critics alone."
                )
            self._score_fit = False
        super().choose_tasks(protocol, reward)

    def val_dataloader(self) -> EvaluationTasks:
        return self._tasks(self.curve_episodes)

    def test_dataloader(self) -> EvaluationTasks:
        return self._tasks(self.episodes)

    @property
    def metric_names(self) -> list[str]:
        return [*(f"{name}/*" for name in self._scored_parts), *super().metric_names]

    @property
    def _scored_parts(self) -> tuple[str, ...]:
        return ("held_out", "training") if self._score_fit else ()

    def _tasks(self, episodes: int) -> EvaluationTasks:
        """The critics' fit of stored transitions, then a task for each protocol."""
        tasks, kind = [], TransitionsTask if self.targets == "sarsa" else SupervisedTask
        for name in self._scored_parts:
            replay = getattr(self, name)
            generator = torch.Generator().manual_seed(self.evaluation_seed)
            tasks.append(kind(name, self.sample(replay, (self.scored,), generator)))
        return EvaluationTasks([*tasks, *self.evaluation_tasks(episodes)])

    def probe(self, count: int) -> TensorDict:
        """Training transitions [count] to look at, always the same."""
        return self.sample(self.training, (count,), torch.Generator().manual_seed(self.evaluation_seed))

    def references(self) -> dict[str, dict[str, list[float]]]:
        return super().references() if self.protocols else {}


class SupervisedTask(TransitionsTask):
    """The same for targets that do not bootstrap: their loss alone, under another name, for its scale is another."""

    def metrics(self, result: TensorDictBase) -> dict[str, list[float]]:
        return {f"{self.name}/supervised_loss": [result["td_loss"].item()]}


def random_episodes(env: MeasuredEnv, generator: torch.Generator, discount: float) -> TensorDict:
    """Episodes of uniformly random actions, [E, T - 1], their last steps left out: no action follows on them.

    Raises:
        ValueError: they are not of one length.
    """
    state, steps = env.reset(), []
    while not state["done"].any():
        action = 2 * torch.rand(env.action_spec.shape, generator=generator) - 1
        stepped = env.step(state.set("action", action))
        steps.append(stepped.select("observation", "action", ("next", "observation"), ("next", "reward")).clone())
        state = step_mdp(stepped)
    if not state["done"].all():
        raise ValueError(f"{env.domain_name}: expected episodes of one length, some ended after {len(steps)} steps.")
    episodes = torch.stack(steps, 1)
    whole = episodes[:, :-1].clone()
    whole["next", "action"] = episodes["action"][:, 1:]
    whole["return"] = discounted_returns(episodes["next", "reward"], discount)[:, :-1]
    whole["next", "terminated"] = torch.zeros_like(whole["return"], dtype=torch.bool)
    whole["next", "truncated"] = torch.zeros_like(whole["return"], dtype=torch.bool)
    whole["next", "truncated"][:, -1] = True
    return whole


def discounted_returns(reward: Tensor, discount: float) -> Tensor:
    """sum_k discount^k r_{t+k} to the end of the episode, of rewards [E, T, 1]."""
    returns = reward.clone()
    for step in range(reward.shape[1] - 2, -1, -1):
        returns[:, step] += discount * returns[:, step + 1]
    return returns

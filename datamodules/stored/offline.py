"""Learning from a fixed data set of transitions, with tasks that are named only at evaluation.

Dimensions: n transitions or samples, T rewards, O observation, A action.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from components.checks import Count, CountOrZero, checked, vector_size
from components.distributed import gather_rows, rank, world_size
from components.priority_tree import PriorityTree
from components.wording import counted
from datamodules.environment import EnvironmentDataModule, named_rewards
from datamodules.environments.measured import MeasuredEnv
from datamodules.evaluation import TransitionsTask
from datamodules.sampling import FixedTasks, Futures, PrioritisedDraws, Stacks, UniformBatches
from datamodules.stored.transitions import TransitionDataset

_CHUNK = 65536
_FEW = 3  # transitions that may be odd without a word
_LEARNED_FROM = ("observation", "action", ("next", "observation"), ("next", "terminated"), ("next", "reward"))


@checked
class OfflineDataModule(EnvironmentDataModule):
    """Batches of stored transitions, and evaluation tasks in the environment that they came from.

    Without an environment nothing is rolled out: sizes are those of the data, and scores say how what was learned fits
    a batch of stored transitions.

    Args:
        dataset: makes or loads the data set when training or evaluation needs it.
        reward: what agents are rewarded for that learn with their task at hand, a task or an expression over the
            environment's measurements, computed once from the stored physics; None for the stored reward.
        sources: learn from the episodes of these behaviours alone, by the names or numbers that the data set has for
            them; None for all.
        max_episodes: of those, learn from so many that are drawn at random; None for all.
        environment, protocols: see `EnvironmentDataModule`; protocols are left alone without an environment.
        inference_samples: number n of transitions from which tasks are inferred; the same ones at every evaluation.
        on_device: keep the data set in the training device's memory.
        settings: further arguments of `EnvironmentDataModule`.
    """

    state_structure: ClassVar = {"data": dict}
    draws_by_priority = True
    knows_next_actions = True
    knows_futures = True

    def __init__(
        self,
        dataset: Callable[[], TransitionDataset],
        environment: Callable[..., MeasuredEnv] | None,
        protocols: Mapping[str, Mapping[str, Any]],
        *,
        reward: str | None = None,
        sources: Sequence[str | CountOrZero] | None = None,
        max_episodes: Count | None = None,
        inference_samples: Count = 100_000,
        on_device: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__(environment, {} if environment is None else protocols, **settings)
        self._make_dataset = dataset
        self.rolls_out = environment is not None
        self.reward, self.sources, self.max_episodes = reward, sources, max_episodes
        if reward is not None:
            if environment is None:
                raise ValueError(f"datamodule.reward={reward}: expected an environment that measures it, found none.")
            try:
                self._reference_env.check_tasks([reward])
            except ValueError as error:
                raise ValueError(f"datamodule.reward={reward}: {error}") from error
        if sources is not None and not sources:
            raise ValueError("datamodule.sources=[]: expected at least one, or null for all.")
        self.inference_samples = inference_samples
        self.on_device = on_device
        self.dataset: TransitionDataset | None = None
        self._train_data: TensorDict | None = None
        self._priorities: PriorityTree | None = None
        self._loaded_priorities: dict[str, Tensor] | None = None
        self._inference_cache: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}

    # -- Lightning ----------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Make the data set once, before the other processes load it."""
        self._make_dataset()

    def setup(self, stage: str) -> None:
        dataset = self._load()
        if self.rolls_out:
            self._check_environment(dataset)
        if stage == "fit" and rank() == 0:
            for sentence in _described(dataset):
                print(sentence, flush=True)
            if not self.rolls_out:
                print(f"No environment: scores are of {self.batch_size} stored transitions, no policy is rolled out.")

    def _check_environment(self, dataset: TransitionDataset) -> None:
        spec, domain = self.spec, self._reference_env.domain_name
        if dataset.domain not in (None, domain):
            raise ValueError(
                f"datamodule.dataset: expected data of {domain}, as datamodule.environment, found those of "
                f"{dataset.domain}."
            )
        sizes = (dataset.observation_dim, dataset.action_dim)
        expected = (vector_size(spec["observation_shape"]), spec["action_dim"])
        for name, found, own in zip(("observation", "action"), sizes, expected):
            if found != own:
                raise ValueError(
                    f"datamodule.dataset: expected {name}s of size {own}, as in datamodule.environment, found size "
                    f"{found}."
                )

    def _load(self) -> TransitionDataset:
        if self.dataset is None:
            dataset = self._make_dataset()
            if self.sources is not None or self.max_episodes is not None:
                dataset = dataset.chosen(self.sources, self.max_episodes, self.seed)
            if self.reward is not None:
                dataset = dataset.rewarded(self._rewards(dataset.data, [self.reward]), self.reward)
            self.dataset = dataset
        return self.dataset

    @property
    def spec(self) -> dict[str, Any]:
        """Sizes of the environment; without one those of the data, which are loaded for them."""
        if self.rolls_out:
            return super().spec
        dataset = self._load()
        return {"observation_shape": [dataset.observation_dim], "action_dim": dataset.action_dim}

    def train_dataloader(self) -> UniformBatches | Stacks:
        assert self.dataset is not None
        assert self.trainer is not None
        module = self.trainer.lightning_module
        if self._train_data is None:
            self._train_data = self._learned_from().to(module.device if self.on_device else "cpu")
        size = self.share(self.batch_size, world_size())
        stop = self.next_evaluation(module.updates, module.total_updates)
        extent = (self.updates_per_step, module.updates, stop)
        if module.prioritised is None:
            return UniformBatches(self._train_data, size, *extent, self.seed, self._futures(self._train_data))
        assert module.futures is None, "batches that are drawn by priority bring no futures"
        if self._priorities is None:
            self._priorities = PriorityTree(len(self._train_data), self._train_data.device)
            if self._loaded_priorities is not None:
                self._priorities.check(self._loaded_priorities)
                self._priorities.load_state_dict(self._loaded_priorities)
        draws = PrioritisedDraws(
            self._priorities, module.prioritised, self._refresh, self._train_data, module.device, size, self.seed
        )
        return Stacks(partial(draws.stack, self.updates_per_step), *extent)

    def _learned_from(self) -> TensorDict:
        """What batches hold, and what methods ask for beside."""
        dataset = self._load()
        data = dataset.data.select(*_LEARNED_FROM)
        if self.trainer is not None and self.trainer.lightning_module.next_data_actions:
            data["next", "data_action"] = dataset.next_actions()
        return data

    def _futures(self, data: TensorDict) -> Futures | None:
        """Draws what followed in the data that batches are of, if the method asks for it."""
        asked = None if self.trainer is None else self.trainer.lightning_module.futures
        if asked is None:
            return None
        return Futures(data["next", "observation"], self._load().last_of_episode().to(data.device), *asked)

    def _refresh(self) -> None:
        """Take the priorities that the last update gave. Processes share the data, and so these."""
        assert self.trainer is not None
        assert self._priorities is not None
        given = self.trainer.lightning_module.take_priorities()
        if given is not None:
            device = self._priorities.logits.device
            self._priorities.change(*(gather_rows(each).to(device) for each in given))

    def observation_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [O] of the observations that are learned from."""
        assert self.dataset is not None
        std, mean = torch.std_mean(self.dataset.data["observation"].double(), 0, correction=0)
        return mean, std

    def state_dict(self) -> dict[str, Any]:
        assert self.dataset is not None
        state: dict[str, Any] = {"data": self._fingerprint()}
        if self._priorities is not None:
            self._refresh()
            state["priorities"] = self._priorities.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the priorities of rows; refuse to go on with other data than the run began with."""
        assert self.dataset is not None
        both = (state_dict["data"], self._fingerprint())
        found, own = (json.dumps(each, sort_keys=True, default=str) for each in both)
        if found != own:
            raise ValueError(
                "datamodule.dataset: expected the data that the checkpoint's run was trained on, found others."
            )
        self._loaded_priorities = state_dict.get("priorities")

    def _fingerprint(self) -> dict[str, Any]:
        """What tells data apart: the checksums of stored files, the recipe of data that are made anew each time."""
        assert self.dataset is not None
        manifest = self.dataset.manifest
        files = manifest.get("files")
        if files is None:
            return manifest
        # rewards that were left out are not learned from, and older readers did not keep them
        stored = {name: files[name] for name in files if name != "left_out"}
        return stored | {name: manifest[name] for name in ("chosen", "reward") if name in manifest}

    # -- tasks --------------------------------------------------------------------------------------------------------

    def choose_tasks(self, protocol: str | None = None, reward: str | None = None) -> None:
        tasks = super() if self.rolls_out else FixedTasks()
        tasks.choose_tasks(protocol, reward)

    def evaluation_tasks(self, episodes: int) -> list[Any]:
        if self.rolls_out:
            return super().evaluation_tasks(episodes)
        data = self._learned_from()
        generator = torch.Generator().manual_seed(self.evaluation_seed)
        index = torch.randint(len(data), (self.batch_size,), generator=generator)
        transitions, futures = data[index], self._futures(data)
        if futures is not None:
            transitions["next", "future"] = futures.draw(index, generator)
        return [TransitionsTask("data", transitions)]

    @property
    def metric_names(self) -> list[str]:
        return super().metric_names if self.rolls_out else ["data/*"]

    def _sampler(self, expressions: Sequence[str]) -> Callable[[], tuple[Tensor, Tensor]]:
        return lambda: self.samples(tuple(expressions))

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

    def _returns(self, expressions: Sequence[str]) -> Tensor:
        """Returns [E, T] of the episodes of the data, with rewards of steps that were left out where they are known."""
        assert self.dataset is not None
        data, env = self.dataset.data, self._reference_env
        returns = self.dataset.episode_returns(self._rewards(data, expressions))
        if "left_out" in data.keys() and list(env.measurement_widths) == ["reward"]:  # noqa: SIM118 - not a mapping
            ended = data["left_out"][:, 0].isfinite()
            returns.index_add_(0, data["episode"][ended], env.rewards(data["left_out"][ended], expressions))
        return returns

    def references(self) -> dict[str, dict[str, list[float]]]:
        """Scores to compare with: a policy of uniform random actions, and the best episode of the data by each reward.

        An episode of the data counts with its own length, which may be less than that of an evaluation episode.
        """
        if not self.rolls_out:
            return {}
        references = super().references()
        best: dict[str, list[float]] = {}
        rewards = {name: text for protocol in self.protocols.values() for name, text in named_rewards(protocol).items()}
        returns = self._returns(list(rewards.values()))
        top = dict(zip(rewards, returns.max(0).values.tolist()))
        for name, protocol in self.protocols.items():
            found = {f"{name}/{reward}/return": [top[reward]] for reward in named_rewards(protocol)}
            best.update({metric: values for metric, values in found.items() if metric in references["random policy"]})
        return references | ({"best episode in the data": best} if best else {})


def _described(dataset: TransitionDataset) -> Iterator[str]:
    """What there is to learn from, and what looks as if ends of episodes were missing."""
    data, terminal = dataset.data, int(dataset.data["next", "terminated"].sum())
    left_out = int(data["left_out"][:, 0].isfinite().sum()) if "left_out" in data.keys() else 0  # noqa: SIM118
    unknown = f" (and {left_out} last rows of episodes, of which nobody knows where they led)" if left_out else ""
    returns = dataset.stored_returns()
    span = f", returns from {returns.min():.4g} to {returns.max():.4g}" if returns.shape[1] == 1 else ""
    yield (
        f"Data: {counted(len(dataset), 'transition')}{unknown} in {counted(dataset.episodes, 'episode')}, "
        f"{terminal} ended by terminals and {int(data['next', 'truncated'].sum())} cut off{span}."
    )
    if (loose := dataset.loose_ends()) > _FEW:
        yield (
            f"{loose} of these transitions led elsewhere than where the next one of their episode begins: a sign of "
            "ends that are not marked in timeouts (or truncations)."
        )

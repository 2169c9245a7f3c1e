"""What datamodules that collect experience along the way share: environments that go on, and episodes that are counted.

Dimensions: N environments of this process, T steps of a collection.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from components.checks import Size, checked
from components.distributed import rank, world_size
from components.networks.states import difference
from datamodules.environment import EnvironmentDataModule
from datamodules.environments.measured import MeasuredEnv

_EPISODES = ("episode_return", "episode_length")


@checked
class CollectingDataModule(EnvironmentDataModule):
    """Environments that a collector steps, whose state travels in the checkpoint.

    Subclasses make `_running`, a collector over `_make_rows()`, and `_collected`, its iterator.

    Args:
        environment, protocols: see `EnvironmentDataModule`.
        num_envs: environments stepped together, over all processes.
        settings: further arguments of `EnvironmentDataModule`.
    """

    def __init__(
        self,
        environment: Callable[..., MeasuredEnv],
        protocols: Mapping[str, Mapping[str, Any]],
        *,
        num_envs: Size = 1,
        **settings: Any,
    ) -> None:
        super().__init__(environment, protocols, **settings)
        self.num_envs = num_envs
        self._restored: dict[str, Any] | None = None
        self._collected: Iterator[TensorDictBase] | None = None
        self._running: Any = None
        self._env: MeasuredEnv | None = None
        self._episode: Tensor | None = None  # return and length so far, [N, 2]

    @property
    def rows(self) -> int:
        """N.

        Raises:
            ValueError: the environments can't be split over the processes.
        """
        if self.num_envs % world_size():
            raise ValueError(f"num_envs={self.num_envs} can't be split over {world_size()} processes.")
        return self.num_envs // world_size()

    @property
    def _make_rows(self) -> Callable[[], MeasuredEnv]:
        """Makes this process's environments: every process has episodes of its own."""
        return partial(self._make_env, num_envs=self.rows, seed=self.seed + 7919 * rank())

    @abstractmethod
    def _layout(self) -> dict[str, Any]:
        """Settings by name that have to be as they were where a checkpoint's experience goes on."""

    def _own_state(self) -> dict[str, Any] | None:
        """What a checkpoint has of this process, with its episodes taken back; None for a new beginning.

        Raises:
            ValueError: it is of other settings.
        """
        self._episode = torch.zeros(self.rows, 2, dtype=torch.float64)
        if self._restored is None:
            return None
        states = self._restored["processes"]
        if len(states) != world_size():
            raise ValueError(
                f"The checkpoint has the experience of {len(states)} processes, expected {world_size()}: it can only "
                "be resumed with as many."
            )
        for name, value in self._layout().items():
            before = self._restored["layout"].get(name)
            if before != value:
                raise ValueError(
                    f"datamodule.{name}={value}: expected {before} as in the checkpoint, whose episodes and replay "
                    "data go on."
                )
        own = states[rank()]
        fault = difference({"episode": own["episode"]}, {"episode": self._episode})
        if fault is not None:
            raise ValueError(f"{fault}.")
        return own

    def _make_own_env(self, own: Mapping[str, Any] | None) -> Tensor:
        """Make the environments, as new or as they were; which of their episodes had to begin anew, [N]."""
        self._env = self._make_rows()
        if own is None or own["environment"] is None:
            return self._env.began_anew
        self._env.set_extra_state(own["environment"])
        anew = self._env.began_anew
        self._episode = own["episode"].double().masked_fill_(anew[:, None], 0)
        return anew

    def _count_episodes(self, module: Any, batch: TensorDictBase) -> None:
        """Tally returns and lengths of the episodes that ended in a collection [N, T]."""
        finished, count = torch.zeros(2, dtype=torch.float64), 0
        for step in batch.unbind(1):
            self._episode[:, :1] += step["next", "reward"]
            self._episode[:, 1] += 1
            done = step["next", "done"][:, 0]
            if done.any():
                finished += self._episode[done].sum(0)
                count += int(done.sum())
                self._episode[done] = 0
        module.tally(_EPISODES, finished.float(), count)

    def _close(self) -> None:
        if self._running is not None:
            self._running.shutdown()
        self._running = self._collected = None

    def teardown(self, stage: str) -> None:
        self._close()

    def on_exception(self, exception: BaseException) -> None:
        self._close()

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _saved(self, own: dict[str, Any]) -> dict[str, Any]:
        """The state of all processes, of which each gives its own."""
        own = {
            "environment": None if self._env is None else self._env.get_extra_state(),
            "episode": self._episode.clone(),
            **own,
        }
        states: list[Any] = [own]
        if world_size() > 1:
            states = [None] * world_size()
            torch.distributed.all_gather_object(states, own)
        return {"layout": self._layout(), "processes": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict or None

"""A world in which nothing matters: every policy's value is zero, so that whatever critics say is their bias.

States are uniform in [-1, 1]^3, independent of the state and action before; rewards are normal with mean zero,
independent of everything. A critic that is believed where it errs upwards climbs away from zero all the same.

Dimensions: n environments.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from components.checks import Count, NonNegative, Seed, Size, checked
from datamodules.environments.measured import MeasuredEnv

SIZE = 3


@checked
class ZeroValueEnv(MeasuredEnv):
    """n such worlds; observations and actions have three components. The only measurement is the reward.

    Args:
        num_envs: n.
        seed: of states and rewards.
        noise: standard deviation of the rewards.
        episode_length: steps after which an episode is truncated.
    """

    step_seconds = 0.05

    def __init__(self, num_envs: Size, seed: Seed = 0, noise: NonNegative = 1.0, episode_length: Count = 1000) -> None:
        super().__init__(num_envs, seed)
        self.noise = noise
        self.episode_length = episode_length
        self.declare_measurements({"reward": 0}, {"reward": "reward"}, "zero_value")
        self.declare_specs([SIZE], SIZE, SIZE)
        self._state = torch.zeros(num_envs, SIZE)
        self._reward = torch.zeros(num_envs, 1)
        self._steps = torch.zeros(num_envs, 1, dtype=torch.int64)

    def begin(self, rows: np.ndarray) -> None:
        self._state, self._reward, self._steps = self._state.clone(), self._reward.clone(), self._steps.clone()
        self._state[rows] = 2 * torch.rand(len(rows), SIZE, generator=self._generator) - 1
        self._reward[rows], self._steps[rows] = 0.0, 0

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        self._state = 2 * torch.rand(*self._state.shape, generator=self._generator) - 1
        self._reward = self.noise * torch.randn(*self._reward.shape, generator=self._generator)
        self._steps = self._steps + 1
        return self.current().set("reward", self._reward)

    def current(self) -> TensorDict:
        truncated = self._steps >= self.episode_length
        return self._here(self._state, self._state.double(), self._reward.clone(), truncated)

    def _state_tensors(self) -> dict[str, Tensor]:
        return {"state": self._state.clone(), "reward": self._reward.clone(), "steps": self._steps.clone()}

    def _set_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        self._state, self._reward, self._steps = (state[name].clone() for name in ("state", "reward", "steps"))

    def relabel(self, physics: Tensor, action: Tensor) -> Tensor:
        raise ValueError("Rewards of zero_value are noise: they can't be recomputed from arrivals.")

    def set_physics(self, physics: Tensor | np.ndarray, rows: Sequence[int] | np.ndarray | None = None) -> None:
        chosen = np.arange(self.batch_size[0]) if rows is None else np.asarray(rows)
        self.begin(chosen)
        self._state[chosen] = torch.as_tensor(physics).float()

    def render(self, row: int, width: int, height: int) -> np.ndarray:
        grey = (127.5 * (self._state[row] + 1)).byte().numpy()
        return np.broadcast_to(grey, (height, width, SIZE)).copy()

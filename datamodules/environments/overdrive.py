"""A point that is slowed by pushing too hard: the smallest world in which offline learning needs to stay near its data.

The state is a position x in [-1, 1]^2 and is observed whole. An action a in [-1, 1]^2 moves it by
0.2 a (1 - 2 max(0, |a| - 0.5)): the speed grows linearly up to |a| = 0.5, falls beyond, and is negative from |a| = 1.
Data whose actions stay within |a| <= 0.5 (`narrow`) do not show the turn-over; a policy that trusts its critic outside
of them drives into it.

Dimensions: n environments, m states.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from components.checks import Seed, Size, checked
from datamodules.environments.measured import MeasuredEnv
from datamodules.evaluation import EvaluationTask

EPISODE_LENGTH = 50
TURN_OVER = 0.5
TOP_SPEED = 0.1
GOALS = {
    "top_right": (0.7, 0.7),
    "top_left": (-0.7, 0.7),
    "bottom_left": (-0.7, -0.7),
    "bottom_right": (0.7, -0.7),
    "centre": (0.0, 0.3),
}
WIDTH = 0.25
TASKS = {name: f"exp(-((x - {x}) ** 2 + (y - {y}) ** 2) / {2 * WIDTH**2})" for name, (x, y) in GOALS.items()}


def move(position: Tensor, action: Tensor) -> Tensor:
    """The next positions [n, 2] from positions and actions [n, 2]."""
    size = action.norm(dim=-1, keepdim=True)
    return (position + 0.2 * action * (1 - 2 * (size - TURN_OVER).clamp_min(0))).clamp(-1, 1)


@checked
class OverdriveEnv(MeasuredEnv):
    """n points. Measurements: position `x`, `y` and `effort` = |a|, the size of the action that led here.

    Args:
        num_envs: n.
        seed: of the starts, uniform in the square.
    """

    step_seconds = 0.05

    def __init__(self, num_envs: Size, seed: Seed = 0) -> None:
        super().__init__(num_envs, seed)
        self.declare_measurements({"x": 0, "y": 0, "effort": 0}, TASKS, "overdrive")
        self.declare_specs([2], 2, 2)
        self._position = torch.zeros(num_envs, 2)
        self._steps = torch.zeros(num_envs, 1, dtype=torch.int64)
        self._effort = torch.zeros(num_envs, 1)

    def begin(self, rows: np.ndarray) -> None:
        start = 2 * torch.rand(self._position.shape, generator=self._generator) - 1
        self._position, self._steps, self._effort = self._position.clone(), self._steps.clone(), self._effort.clone()
        self._position[rows], self._steps[rows], self._effort[rows] = start[rows], 0, 0.0

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        action = tensordict["action"].clamp(-1, 1)
        self._position = move(self._position, action)
        self._steps, self._effort = self._steps + 1, action.norm(dim=-1, keepdim=True)
        state = self.current()
        state["reward"] = torch.zeros(*self.batch_size, 1)  # reward-free: tasks are named at evaluation
        return state

    def current(self) -> TensorDict:
        measurements = torch.cat([self._position, self._effort], -1)
        return self._here(self._position, self._position.double(), measurements, self._steps >= EPISODE_LENGTH)

    def _state_tensors(self) -> dict[str, Tensor]:
        return {"position": self._position.clone(), "steps": self._steps.clone(), "effort": self._effort.clone()}

    def _set_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        self._position, self._steps, self._effort = (state[k].clone() for k in ("position", "steps", "effort"))

    def relabel(self, physics: Tensor, action: Tensor) -> Tensor:
        return torch.cat([physics.float(), action.norm(dim=-1, keepdim=True)], -1)

    def set_physics(self, physics: Tensor | np.ndarray, rows: Sequence[int] | np.ndarray | None = None) -> None:
        chosen = slice(None) if rows is None else torch.as_tensor(rows)
        self._position, self._steps = self._position.clone(), self._steps.clone()
        self._position[chosen] = torch.as_tensor(physics).float()
        self._steps[chosen] = 0

    def render(self, row: int, width: int, height: int) -> np.ndarray:
        x = torch.linspace(-1, 1, width)
        y = torch.linspace(1, -1, height)[:, None]
        px, py = self._position[row]
        blot = torch.exp(-((x - px) ** 2 + (y - py) ** 2) / 0.005)
        return (255 * (1 - blot)).byte()[:, :, None].expand(-1, -1, 3).numpy()


class OverdriveTask(EvaluationTask):
    """Scores a policy beside the best possible one, and looks at its efforts."""

    @property
    def metric_names(self) -> list[str]:
        if not set(self.rewards) <= set(GOALS):
            return super().metric_names
        return [f"{self.name}/score", f"{self.name}/in_range"]

    def metrics(self, result: TensorDictBase) -> dict[str, list[float]]:
        """``score``: reward over that of going straight to the goal at top speed; ``in_range``: share of |a| <= 0.6.

        Both are means over goals, one value for each start. Rewards that are no goals keep their returns.
        """
        if not set(self.rewards) <= set(GOALS):
            return super().metrics(result)
        goals = torch.tensor([GOALS[name] for name in self.rewards], dtype=torch.float64)[:, None, None]
        way = result["start"].unsqueeze(2) - goals
        steps = torch.arange(1, EPISODE_LENGTH + 1)
        distance = (way.norm(dim=-1) - TOP_SPEED * steps).clamp_min(0)
        best = torch.exp(-distance.square() / (2 * WIDTH**2)).sum(-1)
        effort = result["measurements"][..., 2]
        score, in_range = result["return"].sum(0) / best.sum(0), (effort <= 0.6).float().mean((0, 2))
        return dict(zip(self.metric_names, (score.tolist(), in_range.tolist())))

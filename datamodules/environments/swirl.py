"""A point whose steering is turned by where it is: the smallest world in which other people's data cost capacity.

The state is a position p in [-1, 1]^2. An action a in [-1, 1]^2 moves it by 0.05 R(theta(p)) a, where R turns by an
angle theta that winds many times over the square, so that the action towards a goal is a high-frequency function of
where one is. What is observed are random Fourier features of p. Eight goals lie around the start. The way to one says
nothing of the ways to the others: a network that learns from data of all goals has eight times as much to fit.

Dimensions: n environments, m states, G goals.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from components.checks import Positive, Seed, Size, checked
from datamodules.environments.measured import MeasuredEnv
from datamodules.evaluation import EvaluationTask

EPISODE_LENGTH = 30
STEP = 0.05  # by the largest action along an axis
START = 0.1  # episodes begin within it of the middle, along each axis
FEATURES = 32
_WAVES, _TURN, _SCALE = 8, 1.6 * math.sqrt(2), 4.0
_RANDOM_EPISODES = 20_000
_ANGLES = [2 * math.pi * goal / 8 for goal in range(8)]
GOALS = {f"goal_{goal}": (0.8 * math.cos(angle), 0.8 * math.sin(angle)) for goal, angle in enumerate(_ANGLES)}


def _distance(x: str, y: str, goal: tuple[float, float]) -> str:
    return f"norm({x} - ({goal[0]:.6f}), {y} - ({goal[1]:.6f}))"


TASKS = {
    name: f"({_distance('from_x', 'from_y', goal)} - {_distance('x', 'y', goal)}) / {STEP}"
    for name, goal in GOALS.items()
}


class Swirl:
    """The world: how far steering is turned, and what is observed, as functions of positions [m, 2].

    Args:
        frequency: standard deviation of the wave numbers of theta.
        seed: of the waves and of the features.
    """

    def __init__(self, frequency: float = 7.0, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._waves = frequency * torch.randn(2, _WAVES, generator=generator)
        self._phases = 2 * math.pi * torch.rand(_WAVES, generator=generator)
        sizes = torch.randn(_WAVES, generator=generator)
        self._sizes = _TURN * sizes / sizes.norm()
        self._feature_waves = _SCALE * torch.randn(2, FEATURES, generator=generator)
        self._feature_phases = 2 * math.pi * torch.rand(FEATURES, generator=generator)

    def turn(self, position: Tensor) -> Tensor:
        """theta, [m]."""
        return (position @ self._waves + self._phases).sin() @ self._sizes

    def observe(self, position: Tensor) -> Tensor:
        """Random Fourier features, [m, 32]."""
        return (position @ self._feature_waves + self._feature_phases).cos()

    def move(self, position: Tensor, action: Tensor) -> Tensor:
        """The next positions [m, 2] by actions [m, 2]."""
        return (position + STEP * rotated(action.clamp(-1, 1), self.turn(position))).clamp(-1, 1)

    def steer(self, position: Tensor, goal: Tensor) -> Tensor:
        """The action [m, 2] that leads straight to the goals [m, 2], shorter where one is within a step."""
        way = goal - position
        distance = way.norm(dim=-1, keepdim=True)
        return rotated(way / distance.clamp_min(STEP), -self.turn(position))


def rotated(vector: Tensor, angle: Tensor) -> Tensor:
    """Vectors [m, 2] turned counterclockwise by angles [m]."""
    (x, y), cos, sin = vector.unbind(-1), angle.cos(), angle.sin()
    return torch.stack([cos * x - sin * y, sin * x + cos * y], -1)


@checked
class SwirlEnv(MeasuredEnv):
    """n points. Measurements: position `x`, `y`, and `from_x`, `from_y`, where the last step began.

    Args:
        num_envs: n.
        frequency, world_seed: see `Swirl`.
        seed: of the starts, uniform in a small square in the middle.
    """

    step_seconds = 0.05

    def __init__(self, num_envs: Size, frequency: Positive = 7.0, world_seed: Seed = 0, seed: Seed = 0) -> None:
        super().__init__(num_envs, seed)
        self.declare_measurements({"x": 0, "y": 0, "from_x": 0, "from_y": 0}, TASKS, "swirl")
        self.declare_specs([FEATURES], 4, 2)
        self.world = Swirl(frequency, world_seed)
        self._state = torch.zeros(num_envs, 4)  # where it is, and where it came from
        self._steps = torch.zeros(num_envs, 1, dtype=torch.int64)

    def begin(self, rows: np.ndarray) -> None:
        start = START * (2 * torch.rand(len(self._state), 2, generator=self._generator) - 1)
        self._state, self._steps = self._state.clone(), self._steps.clone()
        self._state[rows], self._steps[rows] = start.repeat(1, 2)[rows], 0

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        position = self._state[:, :2]
        moved = self.world.move(position, torch.from_numpy(self._finite(tensordict["action"])))
        self._state, self._steps = torch.cat([moved, position], -1), self._steps + 1
        state = self.current()
        state["reward"] = torch.zeros(*self.batch_size, 1)  # reward-free: goals are named by tasks
        return state

    def current(self) -> TensorDict:
        observation = self.world.observe(self._state[:, :2])
        return self._here(observation, self._state.double(), self._state, self._steps >= EPISODE_LENGTH)

    def _state_tensors(self) -> dict[str, Tensor]:
        return {"state": self._state.clone(), "steps": self._steps.clone()}

    def _set_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        self._state, self._steps = state["state"].clone(), state["steps"].clone()

    def relabel(self, physics: Tensor, action: Tensor) -> Tensor:
        return physics.float()

    def set_physics(self, physics: Tensor | np.ndarray, rows: Sequence[int] | np.ndarray | None = None) -> None:
        chosen = slice(None) if rows is None else torch.as_tensor(rows)
        self._state, self._steps = self._state.clone(), self._steps.clone()
        self._state[chosen] = torch.as_tensor(physics).float()
        self._steps[chosen] = 0

    def render(self, row: int, width: int, height: int) -> np.ndarray:
        """The square, shaded by the angle that steering is turned by, with the point in black and goals in white."""
        x, y = torch.meshgrid(torch.linspace(-1, 1, width), torch.linspace(1, -1, height), indexing="xy")
        position = torch.stack([x, y], -1).view(-1, 2)
        shade = 150 + 60 * self.world.turn(position).sin()
        for places, brightness in ((list(GOALS.values()), 255), ([self._state[row, :2].tolist()], 0)):
            near = torch.cdist(position, torch.tensor(places)).amin(1) < 0.03
            shade = torch.where(near, torch.tensor(float(brightness)), shade)
        return shade.byte().view(height, width, 1).expand(-1, -1, 3).numpy()


@checked
class SwirlTask(EvaluationTask):
    """Adds a score between those of random actions, 0, and of going straight to the goal, 100.

    Args:
        frequency, world_seed: of the world, see `Swirl`.
    """

    def __init__(self, *arguments: Any, frequency: Positive = 7.0, world_seed: Seed = 0) -> None:
        super().__init__(*arguments)
        self._world = Swirl(frequency, world_seed)

    @property
    def metric_names(self) -> list[str]:
        returns = super().metric_names
        if not set(self.expressions) <= set(GOALS):
            return returns
        return [*(f"{name.removesuffix('return')}score" for name in returns), *returns]

    def metrics(self, result: TensorDictBase) -> dict[str, list[float]]:
        """A score and a return for each start; rewards that are no goals keep their returns alone."""
        if not set(self.expressions) <= set(GOALS):
            return super().metrics(result)
        scores = []
        for name, start, returns in zip(self.expressions, result["start"], result["return"]):
            goal = torch.tensor(GOALS[name])
            best = (start[:, :2].float() - goal).norm(dim=-1) / STEP
            low = random_return(self._world, goal)
            scores.append((100 * (returns - low) / (best - low)).tolist())
        return dict(zip(self.metric_names, [*scores, *result["return"].tolist()]))


def random_return(world: Swirl, goal: Tensor) -> float:
    """The mean return of uniform random actions for a goal [2], with its own stream of chance."""
    generator = torch.Generator().manual_seed(0)
    start = position = START * (2 * torch.rand(_RANDOM_EPISODES, 2, generator=generator) - 1)
    for _ in range(EPISODE_LENGTH):
        position = world.move(position, 2 * torch.rand(position.shape, generator=generator) - 1)
    return (((start - goal).norm(dim=-1) - (position - goal).norm(dim=-1)) / STEP).mean().item()

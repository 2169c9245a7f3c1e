"""Environments whose rewards are expressions over named physical quantities.

Dimensions: n environments, m states, M flat measurements, p physics numbers, A action, T tasks.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.envs import EnvBase

from components.rewards import RewardExpression


class RenderingUnavailable(RuntimeError):
    """No graphics library works here; callers skip their videos."""


class MeasuredEnv(EnvBase):
    """A batch of environments that report their physics state and named measurements of it at every step.

    Besides `observation`, every state has `physics` [n, p] float64, from which it can be restored, and `measurements`
    [n, M] float32, the quantities that rewards are written in. Any reward can thus be computed after the fact, for
    stored states too.

    Subclasses call `declare_measurements` once and set `step_seconds`, the simulated time of a step.
    """

    step_seconds: float

    def declare_measurements(self, widths: Mapping[str, int], tasks: Mapping[str, str], domain: str) -> None:
        """Name the measurements, in their flat order.

        Args:
            widths: name -> number of components, 0 for a scalar.
            tasks: name -> reward expression, the tasks that have names.
            domain: for error messages.
        """
        self.measurement_widths = dict(widths)
        self.measurement_size = sum(max(1, width) for width in widths.values())
        self._tasks, self.domain_name = dict(tasks), domain
        self._expressions: dict[str, RewardExpression] = {}

    def named(self, measurements: Tensor) -> dict[str, Tensor]:
        """Views of flat measurements [m, M] by name: [m] for scalars, [m, k] for vectors."""
        parts = measurements.split([max(1, width) for width in self.measurement_widths.values()], dim=-1)
        return {
            name: part if width else part.squeeze(-1)
            for (name, width), part in zip(self.measurement_widths.items(), parts)
        }

    def check_tasks(self, tasks: Sequence[str]) -> None:
        """Raise the ValueError that `rewards` would raise for these tasks, whatever the measurements."""
        for task in tasks:
            self._expression(task)

    def rewards(self, measurements: Tensor, tasks: Sequence[str]) -> Tensor:
        """Rewards [m, T] of T tasks (names or expressions) for flat measurements [m, M].

        Raises:
            ValueError: a task is unknown, or an expression does not make sense.
        """
        named = self.named(measurements)
        return torch.stack([self._expression(task)(named) for task in tasks], dim=1)

    def _expression(self, task: str) -> RewardExpression:
        if task not in self._expressions:
            if task not in self._tasks and task.isidentifier() and task not in self.measurement_widths:
                raise ValueError(
                    f"Unknown task {task!r} of {self.domain_name}: expected one of {', '.join(self._tasks)}, or an "
                    f"expression over {', '.join(self.measurement_widths)}."
                )
            self._expressions[task] = RewardExpression(self._tasks.get(task, task), self.measurement_widths)
        return self._expressions[task]

    @abstractmethod
    def relabel(self, physics: Tensor, action: Tensor) -> Tensor:
        """Measurements [m, M] of arriving in states [m, p] by actions [m, A], as the environment itself gave them."""

    def measure(self, transitions: TensorDictBase) -> Tensor:
        """Measurements [m, M] of stored transitions [m].

        Raises:
            ValueError: the transitions have no physics to measure.
        """
        if ("next", "physics") not in transitions.keys(True):
            raise ValueError(
                f"The data set of {self.domain_name} has no physics: expected the simulator's states, from which "
                "rewards are computed."
            )
        return self.relabel(transitions["next", "physics"], transitions["action"])

    @abstractmethod
    def set_physics(self, physics: Tensor | np.ndarray, rows: Sequence[int] | np.ndarray | None = None) -> None:
        """Begin an episode in each of `rows` (all if None) from states [len(rows), p]."""

    @abstractmethod
    def render(self, row: int, width: int, height: int) -> np.ndarray:
        """A picture [height, width, 3], uint8, of one environment.

        Raises:
            RenderingUnavailable: no graphics library works on this machine.
        """

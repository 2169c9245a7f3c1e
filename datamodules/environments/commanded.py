"""Bodies that are told where to go: commands, a clock, targets of joints, and episodes that end with a fall.

Dimensions: n environments, A action, M measurements, C controls, p physics numbers.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mujoco
import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from components.checks import Count, NonNegative, Number, Share, Size, checked
from datamodules.environments.batched_mujoco import BatchedMujocoEnv
from datamodules.environments.domains import Snapshot
from datamodules.environments.gravity import GrowingGravity

COMMANDS = ("forward", "leftward", "turn")
"""Velocities in the body's heading (m/s), and turning to the left (rad/s)."""
_OWN = {
    **{f"command_{name}": 0 for name in COMMANDS},
    "clock_sin": 0,
    "clock_cos": 0,
    "action_change": 0,
}

Controller = Callable[[Tensor, Tensor], Tensor]
"""Controls [n, C] in [-1, 1] of physics [n, p] and actions [n, A]."""


@checked
class CommandedEnv(BatchedMujocoEnv):
    """A domain whose policy is told how to move and gives its controller targets.

    Observed are measurements of the domain by their names, then the command and a clock's sine and cosine, whose pace
    goes with the command's speed. Rewards may use the domain's measurements, `command_forward`, `command_leftward`,
    `command_turn`, `clock_sin`, `clock_cos`, and `action_change`, the mean squared change of the action.

    Args:
        domain, task, num_envs: see `BatchedMujocoEnv`; the task is any expression over what is named above.
        observes: names of measurements.
        commands: lowest and highest of each command, drawn anew for each episode; 0 for what is left out.
        command_steps: control steps after which another command is drawn in the middle of an episode; None for never.
        cadence: of the clock, in Hz: offset, per m/s, lowest and highest. None for a clock that stands still and reads
            0, so that what a policy does is to be seen from the body.
        moving: share of the episodes that begin with a part of the commanded velocity along x and y, of bodies with a
            free root that begin heading along x.
        ends: an expression; an episode is terminated where it is above 0. None for never.
        staggered: where all rows begin at once, their first episodes are cut short by a random number of steps, or rows
            whose episodes end by time alone would for ever be at the same moment of theirs.
        gravity: a curriculum that begins with a part of it; None for all of it.
        controller: makes what turns actions into controls; None where actions are controls.
        settings: further arguments of `BatchedMujocoEnv`.
    """

    def __init__(
        self,
        domain: str,
        task: str,
        num_envs: Size = 1,
        *,
        observes: Sequence[str],
        commands: Mapping[str, Sequence[Number]] | None = None,
        command_steps: Count | None = None,
        cadence: tuple[Number, Number, NonNegative, NonNegative] | None = (0.8, 0.35, 0.9, 1.9),
        moving: Share = 0.0,
        ends: str | None = None,
        staggered: bool = False,
        gravity: GrowingGravity | None = None,
        controller: Callable[[], Controller] | None = None,
        **settings: Any,
    ) -> None:
        self.commands = dict(commands or {})
        for name, span in self.commands.items():
            if name not in COMMANDS or len(span) != 2 or span[0] > span[1]:
                raise ValueError(
                    f"commands.{name}={list(span)}: expected one of {', '.join(COMMANDS)} with its lowest and highest "
                    "value."
                )
        self.observes = list(observes)
        self.command_steps = command_steps
        self.cadence = None if cadence is None else tuple(cadence)
        self.moving = moving
        self.ends = ends
        self.staggered = staggered
        self.gravity = gravity
        self._gravity_share = torch.tensor(1.0 if gravity is None else gravity.start)
        self._window = torch.zeros(2)  # sum of mean rewards, and of how many steps
        self._command = torch.zeros(num_envs, len(COMMANDS))
        self._phase = torch.zeros(num_envs, 1)
        self._before: Tensor | None = None
        self._change = torch.zeros(num_envs, 1)
        super().__init__(domain, task, num_envs, **settings)
        if self.action_repeat > 1:
            raise ValueError(f"action_repeat={self.action_repeat}: expected 1 where actions are targets.")
        if moving and self.simulation.model.jnt_type[0] != mujoco.mjtJoint.mjJNT_FREE:
            raise ValueError(f"moving={moving}: expected 0, for the root of {domain} is not free to move.")
        self.simulation.weigh(float(self._gravity_share))
        self._before = torch.zeros(num_envs, self.action_spec.shape[-1])
        self._controller = None if controller is None else controller()
        if ends is not None:
            self.check_tasks([ends])

    # --- what the domain has, and more ---

    def declare_measurements(self, widths: Mapping[str, int], tasks: Mapping[str, str], domain: str) -> None:
        for name in self.observes:
            if name not in widths:
                raise ValueError(f"observes={name}: expected a measurement of {domain}, one of {', '.join(widths)}.")
        super().declare_measurements({**widths, **_OWN}, tasks, domain)

    def declare_specs(self, observation_shape: Sequence[int], *sizes: Any, **more: Any) -> None:
        width = sum(max(1, self.measurement_widths[name]) for name in self.observes) + len(COMMANDS) + 2
        super().declare_specs([width], *sizes, **more)

    def _read(self, snapshot: Snapshot, rows: slice | np.ndarray) -> tuple[Tensor, Tensor]:
        phase, command = self._phase[rows], self._command[rows]
        clock = torch.cat([phase.sin(), phase.cos()], 1)
        told = torch.cat([command, torch.zeros_like(clock) if self.cadence is None else clock], 1)
        measured = torch.cat([self._flatten(self._measure(snapshot)), told, self._change[rows]], 1)
        named = self.named(measured)
        seen = [named[name] if named[name].dim() == 2 else named[name][:, None] for name in self.observes]
        return torch.cat([*seen, told], 1), measured

    def current(self) -> TensorDict:
        truncated = self._steps >= self.episode_length
        terminated = torch.zeros_like(truncated)
        if self.ends is not None:
            terminated = (self.rewards(self._measurements, [self.ends]) > 0) & (self._steps > 0) & ~truncated
        physics = torch.from_numpy(self._physics)
        return self._here(self._observation, physics, self._measurements, truncated, terminated)

    # --- steps ---

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        action = tensordict["action"].to("cpu", torch.float32)
        self._change = (action - self._before).square().mean(1, keepdim=True)
        self._before = action.clone()
        if self.command_steps is not None:
            due = ((self._steps[:, 0] > 0) & (self._steps[:, 0] % self.command_steps == 0)).numpy().nonzero()[0]
            self._draw_commands(due)
        if self.cadence is not None:
            offset, slope, low, high = self.cadence
            speed = self._command[:, :2].norm(dim=1, keepdim=True)
            hertz = (offset + slope * speed).clamp(low, high)
            self._phase = torch.remainder(self._phase + 2 * math.pi * self.step_seconds * hertz, 2 * math.pi)
        result = super()._step(tensordict)
        if self.gravity is not None:
            self._window = self._window + torch.stack([result["reward"].mean(), torch.ones(())])
            if self._window[1] >= self.gravity.window:
                self._gravity_share = self.gravity.grown(self._gravity_share, self._window[0] / self._window[1])
                self.simulation.weigh(float(self._gravity_share))
                self._window = torch.zeros(2)
        return result

    def _control(self, action: Tensor) -> np.ndarray:
        if self._controller is not None:
            self._finite(action)
            action = self._controller(torch.from_numpy(self._physics), action)
        return super()._control(action)

    def gauges(self) -> dict[str, float]:
        return {} if self.gravity is None else {"gravity": float(self._gravity_share)}

    # --- beginnings ---

    def _draw_commands(self, rows: np.ndarray) -> None:
        if not len(rows):
            return
        drawn = torch.rand(len(rows), len(COMMANDS), generator=self._generator)
        spans = torch.tensor([[*map(float, self.commands.get(name, (0.0, 0.0)))] for name in COMMANDS])
        self._command = self._command.clone()
        self._command[rows] = spans[:, 0] + (spans[:, 1] - spans[:, 0]) * drawn

    def begin(self, rows: np.ndarray) -> None:
        self._draw_commands(rows)
        self._phase, self._change, self._before = (each.clone() for each in (self._phase, self._change, self._before))
        self._phase[rows] = 2 * math.pi * torch.rand(len(rows), 1, generator=self._generator)
        self._change[rows] = self._before[rows] = 0.0
        states = np.array(self._start(self.simulation, len(rows), self._generator))
        if self.moving:
            share = torch.rand(len(rows), 2, generator=self._generator)
            share = torch.where(share[:, :1] < self.moving, share[:, 1:], 0.0).double().numpy()
            velocity = self.simulation.model.nq
            states[:, velocity : velocity + 2] += share * self._command[rows, :2].double().numpy()
        self.set_physics(states, rows)
        if self.staggered and len(rows) == len(self._steps):
            self._steps = torch.randint(self.episode_length, self._steps.shape, generator=self._generator)

    # --- states ---

    def _state_tensors(self) -> dict[str, Tensor]:
        own = {
            "command": self._command,
            "phase": self._phase,
            "change": self._change,
            "before": self._before,
            "gravity": self._gravity_share,
            "window": self._window,
        }
        return {**super()._state_tensors(), **{name: value.clone() for name, value in own.items()}}

    def _set_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        super()._set_state_tensors(state)
        self._command, self._phase = state["command"].clone(), state["phase"].clone()
        self._change, self._before = state["change"].clone(), state["before"].clone()
        self._gravity_share = state["gravity"].clone()
        self.simulation.weigh(float(self._gravity_share))
        self._window = state["window"].clone()

    def relabel(self, physics: Tensor, action: Tensor) -> Tensor:
        raise ValueError(
            f"Commands of {self.domain_name} are not in its physics: rewards can't be recomputed from stored states."
        )

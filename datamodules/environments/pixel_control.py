"""dm_control's tasks seen through a camera.

Dimensions: n environments, A action, S stacked frames, H the pictures' width and height, p physics numbers.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from components.checks import CountOrZero, Seed, Size, checked
from datamodules.environments.measured import MeasuredEnv
from datamodules.pixels.rendering import View
from datamodules.pixels.tasks import Moment, PixelTask
from datamodules.pixels.workers import WorkerGroup

_CAMERAS = {"quadruped": 2, "manipulation": "front_close"}  # of published code; else the first
_MANIPULATION_STEPS = 250
_SUITE_STEPS = 1000
_LARGEST = 4096  # pixels a side, which graphics libraries can draw
_MOST_WORKERS = 16  # that nobody has asked for


@checked
class PixelControlEnv(MeasuredEnv):
    """n environments of one dm_control task, observed as stacks of pictures.

    `observation` is [n, 3 S, H, H] uint8, the S latest pictures with the oldest first; an episode begins with S times
    the same one. Rewards are the task's own, summed over the control steps of a held action, and the only measurement:
    they can't be recomputed. Episodes are truncated by time, or where they last were sound when their simulation breaks
    down, and terminated where the task says so. An environment that has ended stays where it is, earning nothing, until
    it is reset.

    An episode is a function of its seed and its actions. These are what a checkpoint holds of it: on restoring, the
    actions are made again, without drawing.

    Args:
        domain: of dm_control's suite, but ``lqr``, or ``manipulation``.
        task: such as ``run``; of manipulation such as ``reach_duplo``.
        num_envs: n.
        size: H.
        frame_stack: S.
        action_repeat: control steps that an action is held for.
        episode_length: control steps after which an episode is truncated; the task's own if None.
        camera: name or number; that of published pixel agents if None.
        effects: draw shadows, reflections and smooth edges, as dm_control does by itself, at a tenth of the speed
            where there is no GPU.
        supersampling: pictures are drawn so many times as wide and high, and averaged, so that what is thinner than a
            pixel leaves a trace of where it is; in software cheaper than multisampling.
        render_workers: processes that simulate and draw, of about 260 MB each, at most one for each environment; one
            for each core, but at most 16, if None. A single one is a thread of this process instead.
        seed: of the generator that every episode start is drawn from.
    """

    def __init__(
        self,
        domain: str,
        task: str,
        num_envs: Size = 1,
        *,
        size: Size = 84,
        frame_stack: Size = 3,
        action_repeat: Size = 2,
        episode_length: Size | None = None,
        camera: str | CountOrZero | None = None,
        effects: bool = False,
        supersampling: Size = 1,
        render_workers: Size | None = None,
        seed: Seed = 0,
    ) -> None:
        if size * supersampling > _LARGEST:
            raise ValueError(
                f"size={size}, supersampling={supersampling}: expected to draw at most {_LARGEST} pixels a side."
            )
        super().__init__(num_envs, seed)
        self._camera = _CAMERAS.get(domain, 0) if camera is None else camera
        self._name = f"{domain}_{task}"
        own_length = _MANIPULATION_STEPS if domain == "manipulation" else _SUITE_STEPS
        self.frame_stack = frame_stack
        self.action_repeat = action_repeat
        self.episode_length = own_length if episode_length is None else episode_length
        view = View(self._name, self._camera, size * supersampling, size * supersampling, effects)
        make = partial(PixelTask, domain, task, view, supersampling, action_repeat, self.episode_length)
        workers = min(num_envs, render_workers or min(_MOST_WORKERS, len(os.sched_getaffinity(0))))
        self._episodes = WorkerGroup(workers, make, num_envs)
        (sizes,) = self._episodes.call("sizes", [0])
        self.step_seconds = sizes.control_seconds * action_repeat
        self.declare_measurements({"reward": 0}, {"reward": "reward"}, self._name)
        frames = (3 * frame_stack, size, size)
        self.declare_specs(frames, sizes.physics, sizes.action, torch.uint8)

        decisions = -(-self.episode_length // action_repeat)
        self._seeds = np.zeros(num_envs, np.int64)
        self._actions = np.zeros((num_envs, decisions, sizes.action), np.float32)
        self._steps = np.zeros(num_envs, np.int64)  # decisions
        self._terminated = np.zeros((num_envs, 1), bool)
        self._truncated = np.zeros((num_envs, 1), bool)
        self._reward = np.zeros((num_envs, 1), np.float32)
        self._physics = np.zeros((num_envs, sizes.physics))
        self._frames = np.zeros((num_envs, *frames), np.uint8)
        self._placed = False

    # --- TorchRL ---

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        actions = self._finite(tensordict["action"])
        self._reward = np.zeros_like(self._reward)
        rows = np.flatnonzero(~(self._terminated | self._truncated)).tolist()
        self._actions[rows, self._steps[rows]] = actions[rows]
        self._steps[rows] += 1
        moments = self._episodes.call("step", rows, actions[rows])
        self._note(rows, moments)
        for row, moment in zip(rows, moments):
            self._frames[row] = np.concatenate([self._frames[row, 3:], moment.frame])
        result = self.current()
        result["reward"] = torch.from_numpy(self._reward.copy())
        return result

    def _note(self, rows: Iterable[int], moments: Iterable[Moment]) -> None:
        for row, moment in zip(rows, moments):
            self._reward[row], self._physics[row] = moment.reward, moment.physics
            self._terminated[row], self._truncated[row] = moment.terminated, moment.truncated

    def begin(self, rows: np.ndarray) -> None:
        for row in rows.tolist():
            self._seeds[row] = int(torch.randint(2**31 - 1, (), generator=self._generator))
        self._began(rows, self._episodes.call("start", rows.tolist(), self._seeds[rows].tolist()))
        self._placed = False

    def _began(self, rows: Sequence[int] | np.ndarray, moments: Sequence[Moment]) -> None:
        self._steps[rows] = 0
        self._note(rows, moments)
        for row, moment in zip(rows, moments):
            self._frames[row] = np.tile(moment.frame, (self.frame_stack, 1, 1))

    def current(self) -> TensorDict:
        parts = (self._frames, self._physics, self._reward, self._truncated, self._terminated)
        return self._here(*(torch.from_numpy(part.copy()) for part in parts))

    # --- states and rewards ---

    def _state_tensors(self) -> dict[str, Tensor]:
        assert not self._placed  # in states that no episode of the task led to
        own = {"seeds": self._seeds, "actions": self._actions, "steps": self._steps, "frames": self._frames}
        return {name: torch.from_numpy(value.copy()) for name, value in own.items()}

    def _set_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        self._seeds, self._actions, self._steps, self._frames = (
            state[name].numpy().copy() for name in ("seeds", "actions", "steps", "frames")
        )
        taken = [actions[:steps] for actions, steps in zip(self._actions, self._steps)]
        rows = range(len(taken))
        self._note(rows, self._episodes.call("repeat", rows, self._seeds.tolist(), taken))
        self._placed = False

    def relabel(self, physics: Tensor, action: Tensor) -> Tensor:
        raise ValueError(f"Rewards of {self._name} can't be recomputed from arrivals.")

    def set_physics(self, physics: Tensor | np.ndarray, rows: Sequence[int] | np.ndarray | None = None) -> None:
        """Begins an episode from given states, which can't be saved: no seed and actions led there."""
        chosen = list(range(self.batch_size[0]) if rows is None else rows)
        self._began(chosen, self._episodes.call("place", chosen, np.asarray(physics)))
        self._placed = True

    def render(self, row: int, width: int, height: int) -> np.ndarray:
        view = View(self._name, self._camera, width, height, effects=True)
        return self._episodes.call("picture", [row], [view])[0]

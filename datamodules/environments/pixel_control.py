"""dm_control's tasks seen through a camera.

Dimensions: n environments, A action, S stacked frames, H the pictures' width and height, p physics numbers.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from absl import logging
from dm_control import manipulation, suite
from dm_control.rl.control import PhysicsError
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from components.checks import check_counts
from datamodules.environments.measured import MeasuredEnv
from datamodules.environments.rendering import View, draw, drawing_threads

_CAMERAS = {"quadruped": 2, "manipulation": "front_close"}  # of published code; else the first
# The first has springs drawn at random when it is loaded, and actions without bounds; the other makes its terrain in a
# graphics context of its own.
_UNKNOWN = {("lqr", "lqr_2_1"), ("lqr", "lqr_6_2"), ("quadruped", "escape")}
_MANIPULATION_STEPS = 250
_SUITE_STEPS = 1000
_DATA = ("qpos", "qvel", "act", "mocap_pos", "mocap_quat")
_PLACED = ("geom_pos", "geom_size", "site_pos", "site_size")  # what tasks move in the model when episodes begin


class PixelControlEnv(MeasuredEnv):
    """n environments of one dm_control task, observed as stacks of pictures.

    `observation` is [n, 3 S, H, H] uint8, the S latest pictures with the oldest first; an episode begins with S times
    the same one. Rewards are the task's own, summed over the control steps of a held action, and the only measurement:
    they can't be recomputed. Episodes are truncated by time and terminated where the task says so. An environment that
    has ended stays where it is, earning nothing, until it is reset.

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
        render_workers: threads that simulate side by side, and draw one after the other; all available cores if None.
        seed: of the generator that every episode start is drawn from.
    """

    def __init__(
        self,
        domain: str,
        task: str,
        num_envs: int = 1,
        *,
        size: int = 84,
        frame_stack: int = 3,
        action_repeat: int = 2,
        episode_length: int | None = None,
        camera: str | int | None = None,
        effects: bool = False,
        supersampling: int = 1,
        render_workers: int | None = None,
        seed: int = 0,
    ) -> None:
        check_counts(
            num_envs=num_envs,
            size=size,
            frame_stack=frame_stack,
            action_repeat=action_repeat,
            supersampling=supersampling,
            episode_length=1 if episode_length is None else episode_length,
            render_workers=1 if render_workers is None else render_workers,
        )
        super().__init__(num_envs, seed)
        self._manipulates = domain == "manipulation"
        self._threads = drawing_threads(render_workers or len(os.sched_getaffinity(0)))
        self._envs = [self._load(domain, task) for _ in range(num_envs)]
        self._camera = _CAMERAS.get(domain, 0) if camera is None else camera
        self._name = f"{domain}_{task}"
        self._supersampling = supersampling
        self._view = View(self._name, self._camera, size * supersampling, size * supersampling, effects)
        self.frame_stack = frame_stack
        self.action_repeat = action_repeat
        own_length = _MANIPULATION_STEPS if self._manipulates else _SUITE_STEPS
        self.episode_length = own_length if episode_length is None else episode_length
        self.step_seconds = self._envs[0].control_timestep() * action_repeat
        action = self._envs[0].action_spec()
        self._low, self._high = action.minimum, action.maximum
        self.declare_measurements({"reward": 0}, {"reward": "reward"}, self._name)
        frames = (3 * frame_stack, size, size)
        self.declare_specs(frames, len(self._read_physics(0)), len(self._low), torch.uint8)

        decisions = -(-self.episode_length // action_repeat)
        self._seeds = np.zeros(num_envs, np.int64)
        self._actions = np.zeros((num_envs, decisions, len(self._low)), np.float32)
        self._steps = np.zeros(num_envs, np.int64)  # decisions
        self._terminated = np.zeros((num_envs, 1), bool)
        self._truncated = np.zeros((num_envs, 1), bool)
        self._reward = np.zeros((num_envs, 1), np.float32)
        self._frames = np.zeros((num_envs, *frames), np.uint8)
        self._placed = False

    def _load(self, domain: str, task: str) -> Any:
        tasks = sorted(name.removesuffix("_features") for name in manipulation.get_environments_by_tag("features"))
        known = {*suite.ALL_TASKS, *(("manipulation", each) for each in tasks)} - _UNKNOWN
        if (domain, task) not in known:
            domains = sorted({name for name, _ in known})
            of_domain = ", ".join(sorted(each for name, each in known if name == domain))
            expected = f"task to be one of {of_domain}" if of_domain else f"domain to be one of {', '.join(domains)}"
            raise ValueError(f"environment {domain}/{task}: expected {expected}.")
        verbosity = logging.get_verbosity()
        logging.set_verbosity(logging.ERROR)  # an old word in a model is nothing that a user could do anything about
        try:
            if self._manipulates:
                return manipulation.load(f"{task}_features")
            return suite.load(domain, task, task_kwargs={"time_limit": float("inf")})
        finally:
            logging.set_verbosity(verbosity)

    # --- TorchRL ---

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        actions = tensordict["action"].numpy(force=True)
        self._reward = np.zeros_like(self._reward)
        rows = np.flatnonzero(~(self._terminated | self._truncated)).tolist()
        for row, frame in zip(rows, self._threads.map(lambda row: self._advance(row, actions[row]), rows)):
            self._frames[row] = np.concatenate([self._frames[row, 3:], frame])
        result = self.current()
        result["reward"] = torch.from_numpy(self._reward.copy())
        return result

    def _advance(self, row: int, action: np.ndarray) -> np.ndarray:
        self._simulate(row, action)
        return self._draw(row)

    def _simulate(self, row: int, action: np.ndarray) -> None:
        """Hold an action for its control steps, or what is left of the episode."""
        env, decision = self._envs[row], self._steps[row]
        self._actions[row, decision] = action
        control = self._low + (self._high - self._low) * (np.clip(action.astype(np.float64), -1, 1) + 1) / 2
        done = decision * self.action_repeat
        reward = 0.0
        for step in range(done, min(done + self.action_repeat, self.episode_length)):
            try:
                result = env.step(control)
            except PhysicsError:  # the simulation broke down
                self._truncated[row] = True
                break
            reward += result.reward or 0.0
            if result.last():
                self._terminated[row] = result.discount == 0
                self._truncated[row] = result.discount != 0
                break
            self._truncated[row] = step + 1 == self.episode_length
        self._reward[row] = reward
        self._steps[row] += 1

    def _draw(self, row: int) -> np.ndarray:
        """The picture of an environment, [3, H, H]."""
        picture, fine = draw(self._view, self._envs[row].physics), self._supersampling
        if fine > 1:
            height, width, _ = picture.shape
            parts = picture.reshape(height // fine, fine, width // fine, fine, 3)
            picture = (parts.sum((1, 3), dtype=np.uint32) // fine**2).astype(np.uint8)
        return picture.transpose(2, 0, 1)

    def begin(self, rows: np.ndarray) -> None:
        for row in rows.tolist():
            self._seeds[row] = int(torch.randint(2**31 - 1, (), generator=self._generator))
        for row, frame in zip(rows.tolist(), self._threads.map(self._start_and_draw, rows.tolist())):
            self._frames[row] = np.tile(frame, (self.frame_stack, 1, 1))
        self._placed = False

    def _start_and_draw(self, row: int) -> np.ndarray:
        self._start(row)
        return self._draw(row)

    def _start(self, row: int) -> None:
        env = self._envs[row]
        random = env.random_state if self._manipulates else env.task.random
        random.seed(self._seeds[row])
        env.reset()
        self._restart(row)

    def _restart(self, row: int) -> None:
        self._steps[row], self._reward[row] = 0, 0
        self._terminated[row], self._truncated[row] = False, False

    def current(self) -> TensorDict:
        terminated, truncated = torch.from_numpy(self._terminated.copy()), torch.from_numpy(self._truncated.copy())
        return TensorDict(
            {
                "observation": torch.from_numpy(self._frames.copy()),
                "physics": torch.from_numpy(np.stack([self._read_physics(row) for row in range(len(self._envs))])),
                "measurements": torch.from_numpy(self._reward.copy()),
                "done": terminated | truncated,
                "terminated": terminated,
                "truncated": truncated,
            },
            batch_size=self.batch_size,
        )

    # --- states and rewards ---

    def _state_tensors(self) -> dict[str, Tensor]:
        assert not self._placed  # in states that no episode of the task led to
        own = {"seeds": self._seeds, "actions": self._actions, "steps": self._steps, "frames": self._frames}
        return {name: torch.from_numpy(value.copy()) for name, value in own.items()}

    def _set_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        self._seeds, actions, steps, self._frames = (
            state[name].numpy().copy() for name in ("seeds", "actions", "steps", "frames")
        )

        def repeat(row: int) -> None:
            self._start(row)
            for action in actions[row, : steps[row]]:
                self._simulate(row, action)

        list(self._threads.map(repeat, range(len(self._envs))))
        self._placed = False

    def relabel(self, physics: Tensor, action: Tensor) -> Tensor:
        raise ValueError(f"Rewards of {self._name} can't be recomputed from arrivals.")

    def _physics_arrays(self, row: int) -> list[np.ndarray]:
        physics = self._envs[row].physics
        return [getattr(physics.data, name) for name in _DATA] + [getattr(physics.model, name) for name in _PLACED]

    def _read_physics(self, row: int) -> np.ndarray:
        return np.concatenate([array.ravel() for array in self._physics_arrays(row)])

    def set_physics(self, physics: Tensor | np.ndarray, rows: Sequence[int] | np.ndarray | None = None) -> None:
        """Begins an episode from given states, which can't be saved: no seed and actions led there."""
        for row, state in zip(range(self.batch_size[0]) if rows is None else rows, np.asarray(physics)):
            arrays = self._physics_arrays(row)
            parts = np.split(state, np.cumsum([array.size for array in arrays])[:-1])
            for array, part in zip(arrays, parts):
                array[:] = part.reshape(array.shape)
            self._envs[row].physics.forward()
            self._restart(row)
            self._frames[row] = np.tile(self._threads.submit(self._draw, row).result(), (self.frame_stack, 1, 1))
        self._placed = True

    def render(self, row: int, width: int, height: int) -> np.ndarray:
        view = View(self._name, self._camera, width, height, effects=True)
        return self._threads.submit(draw, view, self._envs[row].physics).result()

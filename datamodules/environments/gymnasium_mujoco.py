"""Gymnasium's locomotion tasks: their own rewards, and episodes that end when the body falls.

Dimensions: n environments, m transitions, O observation, A action, p = nq + nv physics numbers.
"""

import atexit
import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import mujoco
import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from datamodules.environments.measured import MeasuredEnv
from datamodules.pixels import RenderingUnavailable

# Version 4 keeps the rewards and models that D4RL's files were recorded with, on today's MuJoCo. Version 5 pays the
# bonus for health differently and gives the walker's right foot more friction.
GYMNASIUM = {
    "hopper": "Hopper-v4",
    "halfcheetah": "HalfCheetah-v4",
    "walker2d": "Walker2d-v4",
    "ant": "Ant-v4",
    "humanoid": "Humanoid-v4",
}

_OWN = ("observation", "physics", "reward", "steps", "terminated")


class GymnasiumMujocoEnv(MeasuredEnv):
    """n Gymnasium environments stepped one after the other as a batch.

    Their rewards depend on where a step began, so they cannot be recomputed from an arrival: the only measurement is
    `reward`, the environment's own, and that of a stored transition is the stored one. An environment that has ended
    stays where it is, earning nothing, until it is reset.

    Args:
        body: a key of `GYMNASIUM`, or a D4RL name that begins with one.
        num_envs: n.
        seed: of the starting states.
        episode_length: steps after which an episode is truncated.
    """

    def __init__(self, body: str, num_envs: int = 1, seed: int = 0, episode_length: int = 1000) -> None:
        self.body = body.partition("-")[0]
        if self.body not in GYMNASIUM:
            raise ValueError(f"Unknown body {body!r}: expected one of {', '.join(GYMNASIUM)}.")
        super().__init__(num_envs, seed)
        n = num_envs
        self._envs = [_make(GYMNASIUM[self.body]) for _ in range(n)]
        self.episode_length = episode_length
        self.step_seconds = float(self._envs[0].dt)
        model = self._envs[0].model
        self._high = self._envs[0].action_space.high  # the humanoid's is 0.4
        self._nq = model.nq
        self.declare_measurements({"reward": 0}, {"reward": "reward"}, self.body)
        self._renderer: mujoco.Renderer | None = None

        observation_dim = self._envs[0].observation_space.shape[0]
        self.declare_specs([observation_dim], model.nq + model.nv, model.nu)

        # All of the simulator's arrays of fixed size: rewards and observations read quantities, such as positions of
        # bodies, that lag behind the state by a part of a step and could not be computed again from it.
        arrays = ((name, getattr(self._envs[0].data, name)) for name in dir(self._envs[0].data) if name[0] != "_")
        self._data_arrays = [
            name
            for name, value in arrays
            if isinstance(value, np.ndarray)
            and value.dtype == np.float64
            and value.size
            and not name.startswith(("efc_", "iefc_"))  # of active constraints, whose number varies
        ]
        self._observation = np.zeros((n, observation_dim), np.float32)
        self._physics = np.zeros((n, model.nq + model.nv))
        self._reward = np.zeros((n, 1), np.float32)
        self._steps = np.zeros((n, 1), np.int64)
        self._terminated = np.zeros((n, 1), bool)

    # --- TorchRL ---

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        actions = self._high * tensordict["action"].numpy(force=True)
        self._reward = np.zeros_like(self._reward)
        for row in np.flatnonzero(~self._terminated & (self._steps < self.episode_length)).tolist():
            observation, self._reward[row], self._terminated[row], _, _ = self._envs[row].step(actions[row])
            self._steps[row] += 1
            self._read(row, observation)
        result = self.current()
        result["reward"] = torch.from_numpy(self._reward.copy())
        return result

    def begin(self, rows: np.ndarray) -> None:
        for row in rows.tolist():
            seed = int(torch.randint(2**31 - 1, (), generator=self._generator))
            observation, _ = self._envs[row].reset(seed=seed)
            self._begin(row, observation)

    def _begin(self, row: int, observation: np.ndarray) -> None:
        self._reward[row], self._steps[row], self._terminated[row] = 0, 0, False
        self._read(row, observation)

    def _read(self, row: int, observation: np.ndarray) -> None:
        data = self._envs[row].data
        self._observation[row] = observation
        self._physics[row, : self._nq], self._physics[row, self._nq :] = data.qpos, data.qvel

    def current(self) -> TensorDict:
        terminated = torch.from_numpy(self._terminated.copy())
        truncated = torch.from_numpy(self._steps >= self.episode_length) & ~terminated
        return TensorDict(
            {
                "observation": torch.from_numpy(self._observation.copy()),
                "physics": torch.from_numpy(self._physics.copy()),
                "measurements": torch.from_numpy(self._reward.copy()),
                "done": terminated | truncated,
                "terminated": terminated,
                "truncated": truncated,
            },
            batch_size=self.batch_size,
        )

    # --- states and rewards ---

    def _state_tensors(self) -> dict[str, Tensor]:
        own = {name: getattr(self, f"_{name}") for name in _OWN}
        simulated = {
            f"data.{name}": np.stack([getattr(env.data, name) for env in self._envs]) for name in self._data_arrays
        }
        return {name: torch.from_numpy(value.copy()) for name, value in {**own, **simulated}.items()}

    def _set_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        for name in _OWN:
            setattr(self, f"_{name}", state[name].numpy().copy())
        for row, env in enumerate(self._envs):
            for name in self._data_arrays:
                getattr(env.data, name)[:] = state[f"data.{name}"][row].numpy()

    def relabel(self, physics: Tensor, action: Tensor) -> Tensor:
        raise ValueError(
            f"Rewards of {self.body} can't be recomputed from arrivals, only read from stored transitions."
        )

    def measure(self, transitions: TensorDictBase) -> Tensor:
        """The stored rewards [m, 1]."""
        return transitions["next", "reward"]

    def set_physics(self, physics: Tensor | np.ndarray, rows: Sequence[int] | np.ndarray | None = None) -> None:
        states = np.asarray(physics, dtype=np.float64)
        for row, state in zip(range(self.batch_size[0]) if rows is None else rows, states):
            env = self._envs[row]
            env.set_state(state[: self._nq], state[self._nq :])
            self._begin(row, env._get_obs())

    def render(self, row: int, width: int, height: int) -> np.ndarray:
        env = self._envs[row]
        if self._renderer is None or (self._renderer.width, self._renderer.height) != (width, height):
            self._close_renderer()
            try:
                self._renderer = mujoco.Renderer(env.model, height=height, width=width)
            except Exception as error:  # every graphics library fails with an exception of its own
                raise RenderingUnavailable(f"MuJoCo cannot render here ({error})") from error
            # EGL complains about contexts that are still open when it is shut down at exit.
            atexit.register(_close_renderer_of, weakref.ref(self))
        self._renderer.update_scene(env.data, camera="track")
        return self._renderer.render()

    def _close_renderer(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None


def _make(name: str) -> Any:
    """The bare environment, made without warnings that nobody could act on."""
    own = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda message: None)  # of an old word in a model; would be printed and put in a file
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is a version 5; see above why not
            return gymnasium.make(name).unwrapped
    finally:
        mujoco.set_mju_user_warning(own)


def _close_renderer_of(reference: "weakref.ref[GymnasiumMujocoEnv]") -> None:
    env = reference()
    if env is not None:
        env._close_renderer()

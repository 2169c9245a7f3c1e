"""Gymnasium's tasks, and whatever else has its interface: their own rewards, and episodes that end as they say.

Dimensions: n environments, m transitions, L steps of an episode, O observation, A action, p = nq + nv physics numbers
of MuJoCo's bodies, none of other tasks.
"""

import atexit
import re
import sys
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium
import mujoco
import numpy as np
import torch
from gymnasium import spaces
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from components.checks import Count, Seed, Size, checked
from datamodules.environments.measured import MeasuredEnv
from datamodules.pixels import RenderingUnavailable

# Version 4 keeps the rewards and models that D4RL's files were recorded with, on today's MuJoCo. Version 5 pays the
# bonus for health differently and gives the walker's right foot more friction.
D4RL_BODIES = {
    "hopper": "Hopper-v4",
    "halfcheetah": "HalfCheetah-v4",
    "walker2d": "Walker2d-v4",
    "ant": "Ant-v4",
    "humanoid": "Humanoid-v4",
}

_D4RL = re.compile(rf"({'|'.join(D4RL_BODIES)})(-(random|medium|expert|medium-replay|medium-expert|full-replay)-v\d+)?")
_BROKEN = [mujoco.mjtWarning.mjWARN_BADQPOS, mujoco.mjtWarning.mjWARN_BADQVEL, mujoco.mjtWarning.mjWARN_BADQACC]
_OWN = ("seeds", "actions", "steps", "reward", "observation", "earned")


@checked
class GymnasiumEnv(MeasuredEnv):
    """n environments of one task, stepped one after the other as a batch.

    Actions in [-1, 1] are stretched to the task's bounds; observations are float32. Rewards may depend on where a step
    began, so they cannot be recomputed from an arrival: the only measurement is `reward`, the task's own, and that of a
    stored transition is the stored one. An environment that has ended stays where it is, earning nothing, until it is
    reset. One whose simulation breaks down, by MuJoCo's counters, is truncated where it last was sound. Any other
    observation or reward that is not finite as float32 is a fault in the task, and an error.

    An episode is a function of its seed and its actions. These are what a checkpoint holds of it: on restoring, the
    actions are made again. Where they do not lead to where the episode was, for what a task draws elsewhere or keeps
    from one episode to the next, it begins anew, and that is said.

    Args:
        id: of a registered task, such as ``Pendulum-v1``; or what makes an environment, such as a class of one's own;
            or the name of a D4RL data set, for its body.
        num_envs: n.
        seed: of the starting states.
        episode_length: L, after which an episode is truncated; the task's own if None.
        options: of the task, further arguments of `gymnasium.make`.
        wrappers: what makes an environment of another, the first of the task.

    Raises:
        ValueError: there is no such task, it can't be made with these options, its episodes have no end, or its
            observations or actions are no vectors of numbers.
    """

    def __init__(
        self,
        id: str | Callable[..., gymnasium.Env],
        num_envs: Size = 1,
        *,
        seed: Seed = 0,
        episode_length: Count | None = None,
        options: Mapping[str, Any] | None = None,
        wrappers: Sequence[Callable[[gymnasium.Env], gymnasium.Env]] = (),
    ) -> None:
        super().__init__(num_envs, seed)
        if isinstance(id, str):
            body = _D4RL.fullmatch(id)
            self.name = id = D4RL_BODIES[body[1]] if body else id
        elif callable(id):
            made = getattr(id, "func", id)
            self.name = getattr(made, "__name__", type(made).__name__)
        else:
            raise ValueError(
                f"environment.id: expected the name of a task, or what makes one, found {type(id).__name__}; of "
                "a class of yours, 'environment.id={_target_: MODULE.CLASS, _partial_: true}' is what makes one."
            )
        self._envs = [self._make(id, episode_length, options or {}, wrappers) for _ in range(num_envs)]
        first = self._envs[0]
        low, high = self._check_spaces(first.observation_space, first.action_space)
        self._centre, self._scale = (high + low) / 2, (high - low) / 2
        own_length = None if first.spec is None else first.spec.max_episode_steps
        if (episode_length or own_length) is None:
            raise ValueError(
                f"environment.episode_length=null: expected a number of steps, for {self.name} has no limit of its own."
            )
        self.episode_length = episode_length or own_length
        task, self._data = first.unwrapped, [_simulation(env) for env in self._envs]
        self.step_seconds = float(getattr(task, "dt", 1 / task.metadata.get("render_fps", 30)))
        self._renderer: mujoco.Renderer | None = None

        domain = self.name.rpartition("/")[2].partition("-v")[0].lower()
        self.declare_measurements({"reward": 0}, {"reward": "reward"}, domain)
        observation_size, action_size = first.observation_space.shape[0], len(high)
        self.declare_specs([observation_size], len(_physics(self._data[0])), action_size)
        self._seeds = np.full(num_envs, -1, np.int64)  # before its first episode
        self._actions = np.zeros((num_envs, self.episode_length, action_size), np.float32)
        self._steps = np.zeros((num_envs, 1), np.int64)
        self._observation = np.zeros((num_envs, observation_size), np.float32)
        self._physics = np.zeros(self.observation_spec["physics"].shape)
        self._reward = np.zeros((num_envs, 1), np.float32)
        self._earned = np.zeros((num_envs, 1))  # in the episode so far
        self._terminated = np.zeros((num_envs, 1), bool)
        self._truncated = np.zeros((num_envs, 1), bool)
        self._placed = False

    def _make(
        self,
        id: str | Callable[..., gymnasium.Env],
        episode_length: int | None,
        options: Mapping[str, Any],
        wrappers: Sequence[Callable[[gymnasium.Env], gymnasium.Env]],
    ) -> gymnasium.Env:
        module = id.partition(":")[0] if isinstance(id, str) and ":" in id else None
        if module is not None and module not in sys.modules:  # Gymnasium would import whatever a checkpoint names
            raise ValueError(
                f"environment.id={id}: expected a task of a module that is imported already, found {module}, which is "
                f"not; name its class instead, as in 'environment.id={{_target_: {module}.CLASS, _partial_: true}}'."
            )
        if options.get("render_mode") == "human":  # whose library ends the program where there is no screen
            raise ValueError("environment.options.render_mode=human: expected none; evaluate.py films episodes.")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that there are newer versions
                if isinstance(id, str):
                    env = gymnasium.make(id, max_episode_steps=episode_length, disable_env_checker=True, **options)
                else:
                    env = id(**options)
                    if episode_length is not None:
                        env = gymnasium.wrappers.TimeLimit(env, episode_length)
                for wrapper in wrappers:
                    env = wrapper(env)
        except (gymnasium.error.Error, AssertionError, ImportError, TypeError, ValueError) as error:  # a task's own
            option = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if option and option[1] in options:
                raise ValueError(
                    f"environment.options.{option[1]}: expected an option of {self.name}, found another."
                ) from error
            raise ValueError(f"environment.id={self.name}: {error}") from error
        return env

    def _check_spaces(self, observation: gymnasium.Space, action: gymnasium.Space) -> tuple[np.ndarray, np.ndarray]:
        """The bounds [A] of actions.

        Raises:
            ValueError: the spaces are not of vectors.
        """
        if not isinstance(observation, spaces.Box) or len(observation.shape) != 1 or 0 in observation.shape:
            raise ValueError(
                f"environment.id={self.name}: expected observations of one dimension (Box), found {_text(observation)};"
                " environment.wrappers can make them so, as gymnasium.wrappers.FlattenObservation does."
            )
        vectors = isinstance(action, spaces.Box) and len(action.shape) == 1 and 0 not in action.shape
        if not vectors or not action.is_bounded():
            raise ValueError(
                f"environment.id={self.name}: expected continuous actions of one dimension within bounds (Box), found "
                f"{_text(action)}."
            )
        return action.low, action.high

    # --- TorchRL ---

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        actions = self._finite(tensordict["action"])
        self._reward = np.zeros_like(self._reward)
        for row in np.flatnonzero(~(self._terminated | self._truncated)).tolist():
            self._advance(row, actions[row])
        result = self.current()
        result["reward"] = torch.from_numpy(self._reward.copy())
        return result

    def _advance(self, row: int, action: np.ndarray) -> None:
        self._actions[row, self._steps[row, 0]] = action
        self._steps[row] += 1
        own = self._centre + self._scale * action.clip(-1, 1)
        observation, reward, terminated, truncated, _ = self._envs[row].step(own)
        sound = not _broke_down(self._data[row])
        if sound:
            self._observation[row] = self._sound("observation", observation, row)
            self._reward[row] = self._sound("reward", reward, row)
            self._earned[row] += self._reward[row]
            self._physics[row], self._terminated[row] = _physics(self._data[row]), terminated
        self._truncated[row] = not sound or (truncated and not terminated)

    def begin(self, rows: np.ndarray) -> None:
        for row in rows.tolist():
            self._begin(row, int(torch.randint(2**31 - 1, (), generator=self._generator)))
        self._placed = False

    def _begin(self, row: int, seed: int) -> None:
        observation, _ = self._envs[row].reset(seed=seed)
        self._seeds[row], self._steps[row], self._reward[row], self._earned[row] = seed, 0, 0, 0
        self._terminated[row] = self._truncated[row] = False
        self._observation[row] = self._sound("observation", observation, row)
        self._physics[row] = _physics(self._data[row])

    def _sound(self, name: str, value: Any, row: int) -> np.ndarray:
        """A number or vector of the task as float32.

        Raises:
            ValueError: it is not finite.
        """
        with np.errstate(over="ignore"):  # infinite then, which is looked for
            found = np.asarray(value, np.float32)
        for place in np.argwhere(~np.isfinite(found))[:1].tolist():
            raise ValueError(
                f"environment.id={self.name}: expected finite numbers, found {name}{place or ''}="
                f"{np.asarray(value)[tuple(place)]} after step {self._steps[row, 0]} of the episode of seed "
                f"{self._seeds[row]}"
            )
        return found

    def current(self) -> TensorDict:
        parts = (self._observation, self._physics, self._reward, self._truncated, self._terminated)
        return self._here(*(torch.from_numpy(part.copy()) for part in parts))

    # --- states and rewards ---

    def _state_tensors(self) -> dict[str, Tensor]:
        assert not self._placed  # in states that no episode of the task led to
        return {name: torch.from_numpy(getattr(self, f"_{name}").copy()) for name in _OWN}

    def _set_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        saved = {name: value.numpy() for name, value in state.items() if name in _OWN}
        self._actions = saved["actions"].copy()
        for row in np.flatnonzero(saved["seeds"] >= 0).tolist():
            self._begin(row, int(saved["seeds"][row]))
            for action in saved["actions"][row, : saved["steps"][row, 0]]:
                self._advance(row, action)
            led_there = (np.array_equal(getattr(self, f"_{name}")[row], saved[name][row]) for name in _OWN[-2:])
            self.began_anew[row] = not all(led_there)
        self._reward, self._placed = saved["reward"].copy(), False

    def relabel(self, physics: Tensor, action: Tensor) -> Tensor:
        raise ValueError(
            f"Rewards of {self.name} can't be recomputed from arrivals, only read from stored transitions."
        )

    def measure(self, transitions: TensorDictBase) -> Tensor:
        """The stored rewards [m, 1]."""
        return transitions["next", "reward"]

    def set_physics(self, physics: Tensor | np.ndarray, rows: Sequence[int] | np.ndarray | None = None) -> None:
        """Begins an episode from states of MuJoCo's bodies, which can't be saved: no seed and actions led there."""
        for row, state in zip(range(self.batch_size[0]) if rows is None else rows, np.asarray(physics)):
            self._begin(row, 0)
            data = self._data[row]
            assert data is not None
            data.qpos[:], data.qvel[:] = np.split(state, [len(data.qpos)])
            mujoco.mj_forward(self._envs[row].unwrapped.model, data)
            self._observation[row], self._physics[row] = _observed(self._envs[row]), state
        self._placed = True

    def render(self, row: int, width: int, height: int) -> np.ndarray:
        if self._data[row] is None:
            raise RenderingUnavailable(f"{self.name} can't be sent back to where it was")
        model = self._envs[row].unwrapped.model
        if self._renderer is None or (self._renderer.width, self._renderer.height) != (width, height):
            self._close_renderer()
            try:
                self._renderer = mujoco.Renderer(model, height=height, width=width)
            except Exception as error:  # every graphics library fails with an exception of its own
                raise RenderingUnavailable(f"MuJoCo cannot render here ({error})") from error
            # EGL complains about contexts that are still open when it is shut down at exit.
            atexit.register(_close_renderer_of, weakref.ref(self))
        follows = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, "track")
        self._renderer.update_scene(self._data[row], camera=follows)  # -1, where there is none, sees all
        return self._renderer.render()

    def _close_renderer(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None


def _simulation(env: gymnasium.Env) -> mujoco.MjData | None:
    data = getattr(env.unwrapped, "data", None)
    return data if isinstance(data, mujoco.MjData) else None


def _physics(data: mujoco.MjData | None) -> np.ndarray:
    return np.zeros(0) if data is None else np.concatenate([data.qpos, data.qvel])


def _broke_down(data: mujoco.MjData | None) -> bool:
    """Whether MuJoCo has gone on from the model's first pose in this episode, or would in the next step."""
    if data is None:
        return False
    return any(data.warning[kind].number for kind in _BROKEN) or not (np.abs(_physics(data)) <= mujoco.mjMAXVAL).all()


def _observed(env: gymnasium.Env) -> np.ndarray:
    """What a body's state looks like through the wrappers."""
    if isinstance(env, gymnasium.ObservationWrapper):
        return env.observation(_observed(env.env))
    return _observed(env.env) if isinstance(env, gymnasium.Wrapper) else env._get_obs()


def _text(space: gymnasium.Space) -> str:
    bounds = "" if getattr(space, "is_bounded", lambda: True)() else " without bounds"
    return type(space).__name__ + (str(list(space.shape)) if space.shape else "") + bounds


def _close_renderer_of(reference: "weakref.ref[GymnasiumEnv]") -> None:
    env = reference()
    if env is not None:
        env._close_renderer()

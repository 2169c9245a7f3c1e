"""One task of dm_control, and the pictures of a camera in it.

Dimensions: A action, H the pictures' width and height, p physics numbers.
"""

from typing import Any, NamedTuple

import numpy as np
from absl import logging
from dm_control import manipulation, suite
from dm_control.rl.control import PhysicsError

from datamodules.pixels.rendering import View, draw

# dm_control repeats through it what MuJoCo says of models and simulations: nothing that a user could act on.
logging.set_verbosity(logging.ERROR)

# The first has springs drawn at random when it is loaded, and actions without bounds; the other makes its terrain in a
# graphics context of its own.
_UNKNOWN = {("lqr", "lqr_2_1"), ("lqr", "lqr_6_2"), ("quadruped", "escape")}
_DATA = ("qpos", "qvel", "act", "mocap_pos", "mocap_quat")
_PLACED = ("geom_pos", "geom_size", "site_pos", "site_size")  # what tasks move in the model when episodes begin


class Moment(NamedTuple):
    """Where an episode is.

    Attributes:
        frame: [3, H, H] uint8; None where nothing was drawn.
        reward: of the decision that led here.
        terminated, truncated: whether and how the episode is over.
        physics: [p] float64.
    """

    frame: np.ndarray | None
    reward: float
    terminated: bool
    truncated: bool
    physics: np.ndarray


class Sizes(NamedTuple):
    """What is known of a task before it begins: seconds of a control step, numbers of an action and of a state."""

    control_seconds: float
    action: int
    physics: int


class PixelTask:
    """Episodes of one task, one after the other, each a function of its seed and its actions.

    An episode whose simulation breaks down is truncated where it last was sound.

    Args:
        domain, task: see `PixelControlEnv`.
        view: what is drawn, `supersampling` times as wide and high as the pictures.
        supersampling: pictures are averages of so many by so many pixels.
        action_repeat: control steps that an action is held for.
        episode_length: control steps after which an episode is truncated.

    Raises:
        ValueError: there is no such task, or no such camera.
    """

    def __init__(
        self, domain: str, task: str, view: View, supersampling: int, action_repeat: int, episode_length: int
    ) -> None:
        self._manipulates = domain == "manipulation"
        self._env = _load(domain, task)
        self._view = view
        self._supersampling = supersampling
        self._action_repeat = action_repeat
        self._episode_length = episode_length
        action = self._env.action_spec()
        self._low, self._high = action.minimum, action.maximum
        self._restart()

    def sizes(self) -> Sizes:
        return Sizes(self._env.control_timestep(), len(self._low), len(self._physics()))

    def start(self, seed: int) -> Moment:
        """Begin an episode."""
        self._begin(seed)
        return self._moment(drawn=True)

    def step(self, action: np.ndarray) -> Moment:
        """Hold an action [A], in [-1, 1], for its control steps, or what is left of the episode."""
        self._hold(action)
        return self._moment(drawn=True)

    def repeat(self, seed: int, actions: np.ndarray) -> Moment:
        """Begin an episode and take actions [decisions, A], drawing nothing."""
        self._begin(seed)
        for action in actions:
            self._hold(action)
        return self._moment(drawn=False)

    def place(self, physics: np.ndarray) -> Moment:
        """Begin an episode from a state [p]."""
        self._set_physics(physics)
        self._restart()
        return self._moment(drawn=True)

    def picture(self, view: View) -> np.ndarray:
        """[height, width, 3] uint8."""
        return draw(view, self._env.physics)

    def _begin(self, seed: int) -> None:
        random = self._env.random_state if self._manipulates else self._env.task.random
        random.seed(seed)
        self._env.reset()
        self._restart()

    def _restart(self) -> None:
        self._steps, self._reward, self._terminated, self._truncated = 0, 0.0, False, False

    def _hold(self, action: np.ndarray) -> None:
        control = self._low + (self._high - self._low) * (np.clip(action.astype(np.float64), -1, 1) + 1) / 2
        self._reward = 0.0
        for _ in range(min(self._action_repeat, self._episode_length - self._steps)):
            self._steps += 1
            sound = self._physics()
            try:
                result = self._env.step(control)
            except PhysicsError:  # the simulation broke down, and MuJoCo has gone on from the model's first pose
                self._set_physics(sound)
                self._truncated = True
                break
            self._reward += result.reward or 0.0
            if result.last():
                self._terminated = result.discount == 0
                self._truncated = result.discount != 0
                break
            self._truncated = self._steps == self._episode_length

    def _moment(self, drawn: bool) -> Moment:
        frame = self._frame() if drawn else None
        return Moment(frame, self._reward, self._terminated, self._truncated, self._physics())

    def _frame(self) -> np.ndarray:
        picture, fine = draw(self._view, self._env.physics), self._supersampling
        if fine > 1:
            height, width, _ = picture.shape
            parts = picture.reshape(height // fine, fine, width // fine, fine, 3)
            picture = (parts.sum((1, 3), dtype=np.uint32) // fine**2).astype(np.uint8)
        return picture.transpose(2, 0, 1)

    def _physics(self) -> np.ndarray:
        return np.concatenate([array.ravel() for array in self._physics_arrays()])

    def _set_physics(self, physics: np.ndarray) -> None:
        arrays = self._physics_arrays()
        for array, part in zip(arrays, np.split(physics, np.cumsum([array.size for array in arrays])[:-1])):
            array[:] = part.reshape(array.shape)
        self._env.physics.forward()

    def _physics_arrays(self) -> list[np.ndarray]:
        physics = self._env.physics
        return [getattr(physics.data, name) for name in _DATA] + [getattr(physics.model, name) for name in _PLACED]


def _load(domain: str, task: str) -> Any:
    tasks = sorted(name.removesuffix("_features") for name in manipulation.get_environments_by_tag("features"))
    known = {*suite.ALL_TASKS, *(("manipulation", each) for each in tasks)} - _UNKNOWN
    if (domain, task) not in known:
        domains = sorted({name for name, _ in known})
        of_domain = ", ".join(sorted(each for name, each in known if name == domain))
        expected = f"task to be one of {of_domain}" if of_domain else f"domain to be one of {', '.join(domains)}"
        raise ValueError(f"environment {domain}/{task}: expected {expected}.")
    if domain == "manipulation":
        return manipulation.load(f"{task}_features")
    return suite.load(domain, task, task_kwargs={"time_limit": float("inf")})

"""Help for bodies that are to learn to get up: forces on the root that fade as they learn.

Dimensions: n rows, p physics numbers, v degrees of freedom.
"""

import mujoco
import numpy as np
import torch
from torch import Tensor

from components.buildable import buildable
from components.checks import NonNegative, Number, Positive, Share, Size, checked


@buildable()
@checked
class FadingAssistance:
    """Lifts a free root, turns it upright and slows it sideways, less and less the better a rollout was.

    A curriculum: an episode is helped by a scale that begins at 1 and is multiplied by 1 - `fade` after every window in
    which the mean reward of all rows was above the goal; some episodes have no help from the first on.

    Args:
        height: of the root (m), up to which it is lifted.
        stiffness, lift: newtons for each metre below, and at most so many.
        upright: torque (Nm) for each radian of tilt.
        damping: newtons for each m/s along the floor.
        turn_damping: Nm for each rad/s of the root's turning.
        unaided: share of the episodes without help.
        goal: mean reward of a window.
        window: control steps.
        fade: see above.
    """

    def __init__(
        self,
        height: Positive,
        stiffness: NonNegative = 500.0,
        lift: NonNegative = 350.0,
        upright: NonNegative = 400.0,
        damping: NonNegative = 50.0,
        turn_damping: NonNegative = 4.0,
        unaided: Share = 0.35,
        goal: Number = 0.5,
        window: Size = 32,
        fade: Share = 0.02,
    ) -> None:
        self.height, self.stiffness, self.lift = height, stiffness, lift
        self.upright, self.damping, self.turn_damping = upright, damping, turn_damping
        self.unaided, self.goal, self.window, self.fade = unaided, goal, window, fade

    def check(self, model: mujoco.MjModel, domain: str) -> None:
        """Raise a ValueError for a body whose root is not free to move."""
        if model.jnt_type[0] != mujoco.mjtJoint.mjJNT_FREE:
            raise ValueError(f"assistance: expected null, for the root of {domain} is not free to move.")

    def draw(self, rows: int, scale: Tensor, generator: torch.Generator) -> Tensor:
        """How much help so many new episodes have, [n, 1]."""
        return torch.where(torch.rand(rows, 1, generator=generator) < self.unaided, 0.0, scale)

    def forces(self, physics: np.ndarray, help: np.ndarray, velocities: int) -> np.ndarray:
        """Generalised forces [n, v] on states [n, p] whose velocities begin at a place; `help` [n, 1]."""
        w, x, y, z = physics[:, 3:7].T
        # The vertical seen from the body: torques on a free joint are about the body's own axes.
        vertical = np.stack([2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)], 1)
        tilt = np.arccos(np.clip(vertical[:, 2:], -1, 1))
        axis = np.stack([-vertical[:, 1], vertical[:, 0], np.zeros(len(physics))], 1)
        axis /= np.maximum(np.linalg.norm(axis, axis=1, keepdims=True), 1e-6)
        velocity = physics[:, velocities:]
        forces = np.zeros((len(physics), velocity.shape[1]))
        forces[:, :2] = -self.damping * velocity[:, :2]
        forces[:, 2] = np.clip(self.stiffness * (self.height - physics[:, 2]), 0, self.lift)
        forces[:, 3:6] = self.upright * tilt * axis - self.turn_damping * velocity[:, 3:6]
        return forces * help

    def faded(self, scale: Tensor, mean_reward: Tensor) -> Tensor:
        """The scale after a window of this mean reward."""
        return torch.where(mean_reward > self.goal, scale * (1 - self.fade), scale)

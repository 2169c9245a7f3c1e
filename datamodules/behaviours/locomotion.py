"""How the humanoid's policies of locomotion act and begin: targets of joints about its balanced stance.

Dimensions: N rows, 21 joints and controls, physics of 55 numbers.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from components.buildable import buildable
from components.checks import Count, NonNegative, checked
from datamodules.behaviours.balance import NQ, BalancedPose, Body, balance
from datamodules.behaviours.humanoid import STAND, _disturbed
from datamodules.environments.domains import Simulator

# Control for each radian off the target and for each radian a second, by what joints are called.
STIFFNESS = {"shoulder": 0.5, "elbow": 0.25}
DAMPING = {"hip_y": 0.06, "ankle": 0.015, "shoulder": 0.02, "elbow": 0.01}
_STIFF, _DAMPED = 1.0, 0.05  # of all others


@lru_cache(maxsize=1)
def stance() -> BalancedPose:
    """Standing, as the balance controllers do."""
    return balance([STAND])[0]


@checked
class HumanoidTargets(nn.Module):
    """Actions are displacements of joints from the stance (rad), in the order of the actuators.

    The control is clip(u0 + kp (a - (q - q0)) - kd q', -1, 1), u0 and q0 those of the stance.
    """

    def __init__(self) -> None:
        super().__init__()
        body, pose = Body(), stance()
        joints = body.actuator_dof  # of velocities; positions have one number more before them
        names = [body.model.joint(body.model.actuator_trnid[i, 0]).name for i in range(body.model.nu)]

        def gains(by_name: dict[str, float], others: float) -> Tensor:
            found = [next((gain for part, gain in by_name.items() if part in name), others) for name in names]
            return torch.tensor(found, dtype=torch.float64)

        self.register_buffer("positions", torch.from_numpy(np.ascontiguousarray(joints + 1)).long(), persistent=False)
        self.register_buffer("velocities", torch.from_numpy(joints + NQ).long(), persistent=False)
        self.register_buffer("rest", torch.from_numpy(pose.qpos[joints + 1]), persistent=False)
        self.register_buffer("control", torch.from_numpy(pose.control), persistent=False)
        self.register_buffer("stiffness", gains(STIFFNESS, _STIFF), persistent=False)
        self.register_buffer("damping", gains(DAMPING, _DAMPED), persistent=False)

    def forward(self, physics: Tensor, action: Tensor) -> Tensor:
        """Controls [N, 21] of physics [N, 55] and targets [N, 21]."""
        off = action.double() - (physics[:, self.positions] - self.rest)
        control = self.control + self.stiffness * off - self.damping * physics[:, self.velocities]
        return control.clamp(-1, 1).float()


@buildable()
@checked
def start_standing(
    simulator: Simulator, rows: Count, generator: torch.Generator, noise: NonNegative = 0.05
) -> np.ndarray:
    """The stance, with normal noise on the angles of joints (rad) and on all velocities."""
    return _disturbed(np.tile(stance().qpos, (rows, 1)), noise, noise, generator)

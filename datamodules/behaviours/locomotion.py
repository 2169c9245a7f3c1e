"""How the humanoid's policies of locomotion act and begin: targets of joints about its balanced stance.

Dimensions: N rows, 21 joints and controls, physics of 55 numbers.
"""

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from components.buildable import buildable
from components.checks import Count, NonNegative, checked
from datamodules.behaviours.balance import NQ, BalancedPose, Body, Posture, balance
from datamodules.behaviours.humanoid import STAND, _disturbed
from datamodules.environments.domains import Simulator, start_random_untouched

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


CROUCHES = (Posture(head_height=1.05, pitch=0.2), Posture(head_height=1.15, pitch=0.1), Posture(head_height=1.27))
_FALLING_STEPS = 200  # of the simulation, one second
START_SHARES = {"reset": 0.4, "lying": 0.3, "crouching": 0.15, "standing": 0.15}


@lru_cache(maxsize=1)
def _crouches() -> np.ndarray:
    return np.stack([pose.qpos for pose in balance(CROUCHES)])


@buildable()
@checked
def start_anywhere(
    simulator: Simulator,
    rows: Count,
    generator: torch.Generator,
    shares: Mapping[str, NonNegative] | None = None,
    noise: NonNegative = 0.1,
) -> np.ndarray:
    """Where getting up begins: the suite's own reset, lying on the floor, crouching and standing.

    Lying is what a second without control makes of the suite's reset.

    Args:
        shares: of ``reset``, ``lying``, ``crouching``, ``standing``, in proportion; `START_SHARES` if None.
        noise: on the angles of joints (rad) and all velocities, of those that crouch or stand.
    """
    shares = dict(shares or START_SHARES)
    if set(shares) - set(START_SHARES) or not sum(shares.values()):
        raise ValueError(f"shares={shares}: expected some of {', '.join(START_SHARES)}, found others or none.")
    weights = torch.tensor([shares.get(name, 0.0) for name in START_SHARES], dtype=torch.float64)
    kind = torch.multinomial(weights, rows, replacement=True, generator=generator).numpy() if rows else np.zeros(0)
    reset, lying, crouching, standing = ((kind == number).nonzero()[0] for number in range(len(START_SHARES)))
    states = np.empty((rows, simulator.model.nq + simulator.model.nv))
    dropped = np.concatenate([reset, lying])
    if len(dropped):
        states[dropped] = start_random_untouched(simulator, len(dropped), generator)
    if len(lying):
        idle = np.zeros((len(lying), simulator.model.nu))
        states[lying] = simulator.advance(states[lying], idle, _FALLING_STEPS)[0]
    if len(crouching):
        which = torch.randint(len(CROUCHES), (len(crouching),), generator=generator).numpy()
        states[crouching] = _disturbed(_crouches()[which], noise, noise, generator)
    if len(standing):
        states[standing] = start_standing(simulator, len(standing), generator, noise)
    return states

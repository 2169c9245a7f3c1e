"""Balanced postures of the dm_control humanoid, and a controller that holds them and moves between them.

A posture is a few numbers: head height, lean and turn of the trunk, two arms. Inverse kinematics finds joint angles
that put the trunk and the arms there while both feet stay flat on one fixed spot and the centre of mass lies over them;
inverse dynamics gives the controls that hold it; a discrete-time linear-quadratic regulator of the 25 ms control step
keeps it there in spite of noise. A move is a chain of such postures between two others.

Every posture stands on the same footprints, centred on the world's origin and heading along +x, so that a move needs no
step and an episode that starts from a posture needs no frame of its own.

Lengths are metres, angles radians. Dimensions: K postures, N rows (environments), S breakpoints of a schedule; MuJoCo's
qpos has 28 numbers, qvel 27, there are 21 controls, and physics [55] is qpos followed by qvel. Tangent vectors [27] are
those of `mj_differentiatePos`: differences of position and joints, and a rotation vector in the root's own frame.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import mujoco
import mujoco.rollout
import numpy as np
import torch
from torch import Tensor, nn

from datamodules.environments.domains import HUMANOID

NQ, NV, NU = 28, 27, 21
SIMULATION_STEPS = HUMANOID.substeps  # in one control step
CONTROL_SECONDS = 0.025

ARM_REST = (0.0, 0.0, 0.0)  # hand in front of the chest
ARM_RAISED = (1.35, -0.3, -1.3)  # hand 0.3 m above the head's centre
ARM_LOWERED = (-0.6, 0.4, -1.0)  # hand beside the hip

_HEAD_OVER_ROOT = 0.19
_FOOT_RADIUS = 0.027
_FOOT_SINK = 0.000566  # how deep the feet settle into MuJoCo's soft floor under the body's weight
_FOOT_CENTRE = np.array([0.035, 0.01, 0.0])  # mean contact point in the left foot's frame; y is mirrored on the right
_STANCE = 0.1  # half the distance between the feet
_CONTACTS = 8  # two feet, two capsules each, two end points each
_LIMIT_MARGIN = 0.03  # kept from the joints' limits, which are soft springs


class UnbalancedPostureError(ValueError):
    """A posture that the body can't hold still."""


@dataclass(frozen=True)
class Posture:
    """What a balanced posture looks like.

    Attributes:
        head_height: height of the head's centre above the floor; 1.46 is straight, 1.0 about the deepest squat.
        pitch: lean of the trunk, forwards. A large one needs a lower head: 0.7 wants 1.25 or less.
        roll: lean of the trunk, to the right.
        yaw: turn of the trunk relative to the feet, to the left.
        left_arm: angles of the left shoulder1, shoulder2 and elbow.
        right_arm: the same numbers for the right arm, which mirrors the left.
    """

    head_height: float = 1.43
    pitch: float = 0.0
    roll: float = 0.0
    yaw: float = 0.0
    left_arm: tuple[float, float, float] = ARM_REST
    right_arm: tuple[float, float, float] = ARM_REST

    def vector(self) -> np.ndarray:
        """The posture as 10 numbers, in the order of the attributes."""
        return np.array([self.head_height, self.pitch, self.roll, self.yaw, *self.left_arm, *self.right_arm])

    @classmethod
    def from_vector(cls, vector: np.ndarray) -> Posture:
        """Inverse of `vector`."""
        v = [float(x) for x in vector]
        return cls(*v[:4], tuple(v[4:7]), tuple(v[7:10]))

    def towards(self, other: Posture, fraction: float) -> Posture:
        """The posture at `fraction` (0 to 1) of the straight way to `other`."""
        return Posture.from_vector((1 - fraction) * self.vector() + fraction * other.vector())


@dataclass(frozen=True)
class BalancedPose:
    """A posture that the body holds.

    Attributes:
        posture: what was asked for.
        qpos: position [28].
        control: feed-forward controls [21].
        gain: feedback [21, 54] from (tangent displacement, velocity).
    """

    posture: Posture
    qpos: np.ndarray
    control: np.ndarray
    gain: np.ndarray


class Body:
    """dm_control's humanoid as inverse kinematics, inverse dynamics and linearisation need it."""

    def __init__(self) -> None:
        self.model = HUMANOID.build(sensors={})
        self.data = mujoco.MjData(self.model)
        names = "torso", "head", "left_foot", "right_foot", "left_hand", "right_hand"
        self.torso, self.head, self.left_foot, self.right_foot, self.left_hand, self.right_hand = (
            self.model.body(name).id for name in names
        )
        # actuators are listed in another order than joints
        self.actuator_dof = self.model.jnt_dofadr[self.model.actuator_trnid[:, 0]]
        self.gear = self.model.actuator_gear[:, 0]
        self.joint_range = self.model.jnt_range[1:]  # [21, 2]
        self.threads = len(os.sched_getaffinity(0))

    def place(self, qpos: np.ndarray) -> mujoco.MjData:
        """The simulation data with all positions and orientations of `qpos` [28] computed."""
        self.data.qpos[:] = qpos
        mujoco.mj_kinematics(self.model, self.data)
        mujoco.mj_comPos(self.model, self.data)
        return self.data


def _compose(*quaternions: np.ndarray) -> np.ndarray:
    result = quaternions[0]
    for q in quaternions[1:]:
        product = np.empty(4)
        mujoco.mju_mulQuat(product, result, q)
        result = product
    return result


def _turn(axis: int, angle: float) -> np.ndarray:
    quaternion = np.zeros(4)
    quaternion[0], quaternion[1 + axis] = np.cos(angle / 2), np.sin(angle / 2)
    return quaternion


def _rotation_error(quaternion: np.ndarray, target: np.ndarray) -> np.ndarray:
    """World-frame rotation vector [3] from `target` to `quaternion`."""
    vector = np.empty(3)
    mujoco.mju_quat2Vel(vector, _compose(quaternion, target * [1, -1, -1, -1]), 1.0)
    return vector


def _mass_over_feet(body: Body) -> tuple[np.ndarray, np.ndarray]:
    """Centre of mass relative to the mean contact point [3] and its Jacobian [3, 27], where `body` was placed."""
    model, data = body.model, body.data
    offset, jacobian, part = data.subtree_com[body.torso].copy(), np.empty((3, NV)), np.empty((3, NV))
    mujoco.mj_jacSubtreeCom(model, data, jacobian, body.torso)
    for foot, side in ((body.left_foot, 1), (body.right_foot, -1)):
        contact = data.xpos[foot] + data.xmat[foot].reshape(3, 3) @ (_FOOT_CENTRE * [1, side, 1])
        mujoco.mj_jac(model, data, part, None, contact, foot)
        offset -= contact / 2
        jacobian -= part / 2
    return offset, jacobian


def solve_posture(body: Body, posture: Posture, iterations: int = 60) -> tuple[np.ndarray, float]:
    """Joint angles that realise `posture` on flat feet under the centre of mass, by Gauss-Newton steps.

    Returns:
        qpos [28], and the largest violation of a requirement (metres or radians), about 1e-8 where one exists.
    """
    model = body.model
    qpos = np.zeros(NQ)
    qpos[2:4] = posture.head_height - _HEAD_OVER_ROOT, 1
    bend = np.arccos(np.clip(1 - (1.47 - posture.head_height) / 0.71, -1, 1))  # legs of 0.71 m, thigh and shin alike
    for leg in (10, 16):  # hip_x, hip_z, hip_y, knee, ankle_y, ankle_x
        qpos[leg + 2 : leg + 5] = -bend, -2 * bend, -bend
    qpos[22:25] = np.array(posture.right_arm) * [-1, -1, 1]
    qpos[25:28] = posture.left_arm
    trunk = _compose(_turn(2, posture.yaw), _turn(1, posture.pitch), _turn(0, posture.roll))
    level = _turn(2, 0.0)
    footprint = np.array([-_FOOT_CENTRE[0], _STANCE, _FOOT_RADIUS - _FOOT_SINK])
    feet = ((body.left_foot, footprint), (body.right_foot, footprint * [1, -1, 1]))

    # Unknown are the root, the abdomen and the legs: 21 tangent directions, the last 15 of them joints.
    low, high = body.joint_range[:15, 0] + _LIMIT_MARGIN, body.joint_range[:15, 1] - _LIMIT_MARGIN
    joints = np.eye(NV)[6:21]
    # What the requirements leave open: keep the abdomen straight and the legs from twisting.
    preference = 1e-3 * np.array([1, 1, 1] + [0.1, 1, 0.01, 0.01, 0.01, 0.1] * 2)
    move_jacobian, turn_jacobian = np.empty((3, NV)), np.empty((3, NV))
    violation = np.inf
    for _ in range(iterations):
        data = body.place(qpos)
        offset, jacobian = _mass_over_feet(body)
        errors, jacobians = [offset[:2]], [jacobian[:2]]
        for foot, target in feet:
            mujoco.mj_jacBody(model, data, move_jacobian, turn_jacobian, foot)
            errors += [data.xpos[foot] - target, _rotation_error(data.xquat[foot], level)]
            jacobians += [move_jacobian.copy(), turn_jacobian.copy()]
        mujoco.mj_jacBody(model, data, move_jacobian, turn_jacobian, body.head)
        errors += [data.xpos[body.head, 2:] - posture.head_height, _rotation_error(data.xquat[body.torso], trunk)]
        jacobians += [move_jacobian[2:].copy(), turn_jacobian.copy()]
        angles = qpos[7:22]
        beyond = np.maximum(angles - high, 0) + np.minimum(angles - low, 0)
        errors.append(beyond)
        jacobians.append(joints * (beyond != 0)[:, None])
        violation = np.abs(np.concatenate(errors)).max()

        error = np.concatenate([*errors, preference * angles])
        jacobian = np.concatenate([*jacobians, preference[:, None] * joints])[:, :21]
        step = np.linalg.solve(jacobian.T @ jacobian + 1e-9 * np.eye(21), -jacobian.T @ error)
        step *= min(1.0, 0.3 / np.abs(step).max())  # a Jacobian is only good nearby
        mujoco.mj_integratePos(model, qpos, np.concatenate([step, np.zeros(NV - 21)]), 1.0)
        if np.abs(step).max() < 1e-7:
            break
    return qpos, float(violation)


def holding_controls(body: Body, qpos: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """What keeps `qpos` [28] still: controls [21], the root wrench [6] (N, Nm) nothing supplies, number of contacts."""
    data = body.data
    data.qpos[:], data.qvel[:], data.qacc[:] = qpos, 0, 0
    mujoco.mj_inverse(body.model, data)
    return data.qfrc_inverse[body.actuator_dof] / body.gear, data.qfrc_inverse[:6].copy(), data.ncon


def tangent_difference(qpos: Tensor, reference: Tensor) -> Tensor:
    """Tangent vectors [..., 27] that take `reference` [..., 28] to `qpos` [..., 28]."""
    rw, rv = reference[..., 3:4], reference[..., 4:7]
    w, v = qpos[..., 3:4], qpos[..., 4:7]
    real = rw * w + (rv * v).sum(-1, keepdim=True)
    imaginary = rw * v - w * rv - torch.linalg.cross(rv, v)
    imaginary = torch.where(real < 0, -imaginary, imaginary)  # the shorter of the two ways round
    sine = imaginary.norm(dim=-1, keepdim=True)
    scale = torch.where(sine > 1e-9, 2 * torch.atan2(sine, real.abs()) / sine.clamp_min(1e-9), 2.0)
    return torch.cat([qpos[..., :3] - reference[..., :3], scale * imaginary, qpos[..., 7:] - reference[..., 7:]], -1)


def linearise(body: Body, qpos: np.ndarray, controls: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One control step about each of K resting positions, by finite differences.

    Args:
        body: the humanoid.
        qpos: positions [K, 28].
        controls: controls [K, 21].

    Returns:
        A [K, 54, 54] and B [K, 54, 21] in tangent space.
    """
    # Large enough for the contact solver's rounding, small enough for one-sided differences: gains are good to 2e-4.
    epsilon, count, directions = 1e-7, len(qpos), 2 * NV + NU
    physics = np.zeros((count, 1 + directions, NQ + NV))  # the resting position, then every direction nudged
    physics[..., :NQ] = qpos[:, None]
    inputs = np.repeat(controls[:, None], 1 + directions, axis=1)
    for k in range(count):
        for j, nudge in enumerate(epsilon * np.eye(NV)):
            mujoco.mj_integratePos(body.model, physics[k, 1 + j, :NQ], nudge, 1.0)
    physics[:, 1 + NV : 1 + 2 * NV, NQ:] = epsilon * np.eye(NV)
    inputs[:, 1 + 2 * NV :] += epsilon * np.eye(NU)
    physics, inputs = physics.reshape(-1, NQ + NV), inputs.reshape(-1, 1, NU)
    after = np.empty_like(physics)
    chunk = 64 * (1 + directions)  # bounds the memory of trajectories
    with mujoco.rollout.Rollout(nthread=body.threads) as simulator:
        datas = [mujoco.MjData(body.model) for _ in range(body.threads)]
        for first in range(0, len(physics), chunk):
            part = slice(first, first + chunk)
            states = np.concatenate([np.zeros((len(physics[part]), 1)), physics[part]], axis=1)  # time comes first
            trajectory, _ = simulator.rollout(
                body.model,
                datas,
                states,
                np.repeat(inputs[part], SIMULATION_STEPS, axis=1),
                initial_warmstart=np.zeros((len(states), NV)),
            )
            after[part] = trajectory[:, -1, 1:]
    after = torch.from_numpy(after).view(count, 1 + directions, NQ + NV)
    start, moved = after[:, :1], after[:, 1:]
    difference = torch.cat(
        [tangent_difference(moved[..., :NQ], start[..., :NQ]), moved[..., NQ:] - start[..., NQ:]], dim=-1
    )
    jacobian = (difference / epsilon).mT.numpy()  # [K, 54, 75]
    return jacobian[..., : 2 * NV], jacobian[..., 2 * NV :]


def regulator_gains(a: np.ndarray, b: np.ndarray, state_cost: np.ndarray) -> np.ndarray:
    """Gains [K, u, n] of the regulator with control cost 1, for all K systems at once.

    Structure-preserving doubling: each iteration doubles the horizon. Ten make it 1,024 steps. An infinite one would
    spend control on pulling slipped feet back by creeping, over hours.

    Args:
        a: [K, n, n].
        b: [K, n, u].
        state_cost: [K, n, n].
    """
    eye = np.eye(a.shape[-1])
    power, reach, value = a, b @ b.transpose(0, 2, 1), state_cost
    for _ in range(10):
        inverse = np.linalg.inv(eye + reach @ value)
        added = power.transpose(0, 2, 1) @ value @ inverse @ power
        spread = power @ inverse @ reach @ power.transpose(0, 2, 1)
        power = power @ inverse @ power
        value = value + (added + added.transpose(0, 2, 1)) / 2  # symmetric by nature; rounding would break it
        reach = reach + (spread + spread.transpose(0, 2, 1)) / 2
    bv = b.transpose(0, 2, 1) @ value
    return np.linalg.solve(bv @ b + np.eye(b.shape[-1]), bv @ a)


def state_cost(body: Body, qpos: np.ndarray) -> np.ndarray:
    """Cost [54, 54] of displacements from the resting position `qpos` [28].

    What matters is the centre of mass over the feet; joints follow with a small weight, which leaves them free to
    catch a fall, and the root's horizontal position with hardly any, because feet that have slipped can't go back.
    """
    body.place(qpos)
    _, jacobian = _mass_over_feet(body)
    cost = np.diag(np.concatenate([[0.1, 0.1], np.full(NV - 2, 3.0), np.full(NV, 0.001)]))
    cost[:NV, :NV] += 300 * jacobian.T @ jacobian
    return cost


def check_balance(body: Body, posture: Posture) -> tuple[np.ndarray, np.ndarray]:
    """Position [28] and controls [21] that realise `posture` at rest.

    Raises:
        UnbalancedPostureError: it can't be reached, or not held at rest on the two feet alone with control to spare.
    """
    qpos, violation = solve_posture(body, posture)
    if violation > 1e-4:
        raise UnbalancedPostureError(f"{posture}: out of the joints' reach by {violation:.1e}")
    controls, wrench, contacts = holding_controls(body, qpos)
    if contacts != _CONTACTS:
        raise UnbalancedPostureError(f"{posture}: {contacts} contacts instead of {_CONTACTS}; parts of the body touch")
    if np.abs(wrench).max() > 10:  # of a weight of 400 N
        raise UnbalancedPostureError(f"{posture}: not at rest, {np.abs(wrench).max():.0f} N or Nm are missing")
    if np.abs(controls).max() > 0.8:
        raise UnbalancedPostureError(f"{posture}: needs control {np.abs(controls).max():.2f} of 1")
    return qpos, controls


def balance(postures: Sequence[Posture], body: Body | None = None) -> list[BalancedPose]:
    """Balances K postures; about 10 ms each. Raises `UnbalancedPostureError` for the first that can't be held."""
    body = body or Body()
    qpos, controls = (np.stack(x) for x in zip(*(check_balance(body, p) for p in postures)))
    a, b = linearise(body, qpos, controls)
    gains = regulator_gains(a, b, np.stack([state_cost(body, q) for q in qpos]))
    return [BalancedPose(*pose) for pose in zip(postures, qpos, controls, gains)]


class BalanceController(nn.Module):
    """Holds and changes postures, every row after its own schedule: action = clip(u - K dx + noise, -1, 1).

    Row i passes posture `knots[i, s]` at control step `times[i, s]`; between two breakpoints the reference position,
    the controls and the gain are interpolated and the reference moves at the matching velocity. After its last
    breakpoint a row stays. Call it once per control step: it counts them. Its clock, its noise and its random state
    are in `state_dict()`.

    Args:
        poses: K balanced poses.
        knots: indices into `poses` [N, S].
        times: increasing control steps [N, S], the first 0.
        noise: standard deviation of the control noise [N].
        bursts: the noise comes for the first of these numbers of control steps in every second of them: its bursts push
            the body off its way, the quiet between shows how the controller brings it back.
        correlation: of the noise of one step with that of the step before, 0 to 1 [N].
        seed: of the noise.
    """

    def __init__(
        self,
        poses: Sequence[BalancedPose],
        knots: Tensor,
        times: Tensor,
        noise: Tensor,
        correlation: Tensor,
        seed: int,
        bursts: tuple[int, int] = (1, 1),
    ) -> None:
        super().__init__()
        self.bursts = bursts
        self.register_buffer("qpos", torch.from_numpy(np.stack([p.qpos for p in poses])), persistent=False)
        self.register_buffer("control", torch.from_numpy(np.stack([p.control for p in poses])), persistent=False)
        self.register_buffer("gain", torch.from_numpy(np.stack([p.gain for p in poses])), persistent=False)
        self.register_buffer("knots", knots.long(), persistent=False)
        self.register_buffer("times", times.double().contiguous(), persistent=False)
        self.register_buffer("noise", noise.double()[:, None], persistent=False)
        self.register_buffer("correlation", correlation.double()[:, None], persistent=False)
        self.register_buffer("clock", torch.zeros((), dtype=torch.int64))
        self.generator = torch.Generator().manual_seed(seed)
        self.register_buffer("disturbance", self._standard_normal())
        phase = torch.randint(bursts[1], (len(knots), 1), generator=self.generator)
        self.register_buffer("phase", phase, persistent=False)

    def _standard_normal(self) -> Tensor:
        return torch.randn(len(self.knots), NU, generator=self.generator, dtype=torch.float64)

    def get_extra_state(self) -> Tensor:
        """The random state, so that `state_dict` is complete."""
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Restores the random state."""
        self.generator.set_state(state.cpu())

    def reference(self, step: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Position [N, 28], velocity [N, 27], controls [N, 21] and gain [N, 21, 54] at a control step (scalar)."""
        now = step.double().expand(len(self.times), 1).contiguous()
        left = (torch.searchsorted(self.times, now, right=True) - 1).clamp(0, self.times.shape[1] - 2)
        span = self.times.gather(1, left + 1) - self.times.gather(1, left)
        fraction = ((now - self.times.gather(1, left)) / span).clamp(max=1.0)  # [N, 1]
        a, b = self.knots.gather(1, left)[:, 0], self.knots.gather(1, left + 1)[:, 0]
        qpos_a, qpos_b = self.qpos[a], self.qpos[b]
        qpos = torch.lerp(qpos_a, qpos_b, fraction)
        qpos = torch.cat([qpos[:, :3], nn.functional.normalize(qpos[:, 3:7], dim=-1), qpos[:, 7:]], -1)
        velocity = tangent_difference(qpos_b, qpos_a) / (span * CONTROL_SECONDS) * (fraction < 1)
        control = torch.lerp(self.control[a], self.control[b], fraction)
        return qpos, velocity, control, torch.lerp(self.gain[a], self.gain[b], fraction[..., None])

    def forward(self, physics: Tensor) -> Tensor:
        """Actions [N, 21] (float32) for physics [N, 55] (float64); counts one control step."""
        qpos, velocity, control, gain = self.reference(self.clock)
        displacement = torch.cat([tangent_difference(physics[:, :NQ], qpos), physics[:, NQ:] - velocity], -1)
        active = (self.clock + self.phase) % self.bursts[1] < self.bursts[0]
        noise = self.noise * self.disturbance * active
        action = control - torch.einsum("nuv,nv->nu", gain, displacement) + noise
        fresh = (1 - self.correlation**2).sqrt() * self._standard_normal()
        self.disturbance = self.correlation * self.disturbance + fresh
        self.clock = self.clock + 1
        return action.clamp(-1, 1).float()

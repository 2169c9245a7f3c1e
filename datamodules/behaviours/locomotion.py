"""How the humanoid's policies of locomotion act and begin: targets of joints about its balanced stance.

Dimensions: N rows, 21 joints and controls, physics of 55 numbers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from components.buildable import buildable
from components.checks import Count, NonNegative, Positive, Size, checked
from components.files import check_file
from datamodules.behaviours.balance import (
    CONTROL_SECONDS,
    NQ,
    BalancedPose,
    Body,
    Posture,
    balance,
    tangent_difference,
)
from datamodules.behaviours.humanoid import SOURCES, STAND, Episodes, _disturbed
from datamodules.behaviours.trained import BEHAVIOURS, load_policy, policy_settings
from datamodules.environments.batched_mujoco import BatchedMujocoEnv
from datamodules.environments.domains import HUMANOID, Simulator, start_random_untouched
from datamodules.environments.simulation import BatchSimulation

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


class StandingController(nn.Module):
    """Stands in balance where rows are, whatever they did before: the controller of the stance, in their own frames.

    In a row's frame it heads where the stance does, and has the middle of its feet where that has it, at the control
    step at which it begins to stand. Frames, and who stands, are in `state_dict()`.
    """

    def __init__(self, rows: int) -> None:
        super().__init__()
        pose, self.body = stance(), Body()
        for name in ("qpos", "control", "gain"):
            self.register_buffer(name, torch.from_numpy(getattr(pose, name)), persistent=False)
        self.feet = self._feet(pose.qpos)
        self.register_buffer("standing", torch.zeros(rows, dtype=torch.bool))
        self.register_buffer("turn", torch.zeros(rows, dtype=torch.float64))
        self.register_buffer("shift", torch.zeros(rows, 2, dtype=torch.float64))

    def _feet(self, qpos: np.ndarray) -> Tensor:
        """Where the middle of the feet is on the floor, [2]."""
        found = self.body.place(qpos).xpos[[self.body.left_foot, self.body.right_foot], :2]
        return torch.from_numpy(found.mean(0))

    def forward(self, physics: Tensor, stands: Tensor) -> Tensor:
        """Controls [N, 21] of physics [N, 55], of use for rows that stand [N]; called once per control step."""
        for row in (stands & ~self.standing).nonzero()[:, 0].tolist():
            own = physics[row]
            self.turn[row] = _heading(self.qpos) - _heading(own)
            self.shift[row] = self.feet - _turned(self._feet(own[:NQ].numpy()), self.turn[row])
        self.standing = stands.clone()
        half, nothing = self.turn / 2, torch.zeros_like(self.turn)
        w, v = physics[:, 3], physics[:, 4:7]
        about = torch.stack([nothing, nothing, half.sin()], 1)
        framed = physics.clone()
        framed[:, :2] = _turned(physics[:, :2], self.turn) + self.shift
        framed[:, 3] = half.cos() * w - (about * v).sum(1)
        framed[:, 4:7] = half.cos()[:, None] * v + w[:, None] * about + torch.linalg.cross(about, v)
        framed[:, NQ : NQ + 2] = _turned(physics[:, NQ : NQ + 2], self.turn)  # turning is told in the body's own axes
        off = torch.cat([tangent_difference(framed[:, :NQ], self.qpos.expand(len(physics), -1)), framed[:, NQ:]], 1)
        return (self.control - off @ self.gain.T).clamp(-1, 1)


def _heading(qpos: Tensor) -> Tensor:
    """Direction of the trunk about the vertical (rad)."""
    w, x, y, z = qpos[3:7]
    return torch.atan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))


def _turned(vectors: Tensor, angle: Tensor) -> Tensor:
    """Vectors [..., 2] turned to the left by angles [...] (rad)."""
    (x, y), cos, sin = vectors.unbind(-1), angle.cos(), angle.sin()
    return torch.stack([cos * x - sin * y, sin * x + cos * y], -1)


CROUCHES = (Posture(head_height=1.05, pitch=0.2), Posture(head_height=1.15, pitch=0.1), Posture(head_height=1.27))
_FALLING_STEPS = 200  # of the simulation, one second
_FALLS = range(40, 200, 20)  # the same, until falls from standing are taken up
START_SHARES = {"reset": 0.25, "lying": 0.3, "falling": 0.3, "crouching": 0.05, "standing": 0.1}


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
    """Where getting up begins: the suite's own reset, lying on the floor, falling, crouching and standing.

    Lying is what a second without control makes of the suite's reset; falling what a part of it makes of standing.

    Args:
        shares: of ``reset``, ``lying``, ``falling``, ``crouching``, ``standing``; None for `START_SHARES`.
        noise: on the angles of joints (rad) and all velocities, of those that fall, crouch or stand.
    """
    shares = dict(shares or START_SHARES)
    if set(shares) - set(START_SHARES) or not sum(shares.values()):
        raise ValueError(f"shares={shares}: expected some of {', '.join(START_SHARES)}, found others or none.")
    weights = torch.tensor([shares.get(name, 0.0) for name in START_SHARES], dtype=torch.float64)
    kind = torch.multinomial(weights, rows, replacement=True, generator=generator).numpy()
    reset, lying, falling, crouching, standing = ((kind == number).nonzero()[0] for number in range(len(START_SHARES)))
    states = np.empty((rows, simulator.model.nq + simulator.model.nv))
    dropped = np.concatenate([reset, lying])
    if len(dropped):
        states[dropped] = start_random_untouched(simulator, len(dropped), generator)
    if len(lying):
        idle = np.zeros((len(lying), simulator.model.nu))
        states[lying] = simulator.advance(states[lying], idle, _FALLING_STEPS)[0]
    for number, steps in enumerate(_FALLS):
        if len(own := falling[number :: len(_FALLS)]):
            tall = start_standing(simulator, len(own), generator, noise)
            states[own] = simulator.advance(tall, np.zeros((len(own), simulator.model.nu)), steps)[0]
    if len(crouching):
        which = torch.randint(len(CROUCHES), (len(crouching),), generator=generator).numpy()
        states[crouching] = _disturbed(_crouches()[which], noise, noise, generator)
    if len(standing):
        states[standing] = start_standing(simulator, len(standing), generator, noise)
    return states


@dataclass(frozen=True)
class Itinerary:
    """What rows are to do when: row i follows skill `skills[i, s]`, told `commands[i, s]`, from control step
    `times[i, s]` on.

    Attributes:
        skills: indices [N, S], of policies; -1 is to stand in balance.
        commands: forward (m/s), leftward (m/s), turn (rad/s) [N, S, 3].
        times: ascending control steps [N, S], the first 0.
        noise: standard deviation of the control noise in bursts [N].
        rises: which rows follow the skill `riser` whenever they are down, until they stand [N], bool.
    """

    skills: Tensor
    commands: Tensor
    times: Tensor
    noise: Tensor
    rises: Tensor


class LocomotionController(nn.Module):
    """Drives rows by policies that `CommandedEnv` trained, every row after its own itinerary.

    action = clip(targets of the policy's mean + noise, -1, 1), the noise in bursts, as `BalanceController` has it. Call
    it once per control step: it counts them. Its clocks and its random state are in `state_dict()`.

    Args:
        paths: files of policies, the skills.
        columns: name of a measurement -> its columns in the flat measurements that it is given.
        itinerary: see there.
        riser: the skill of rows that rise.
        seed: of clocks and noise.
        bursts: see `BalanceController`.
    """

    LYING, TILTED, STANDING, STEADY = 0.9, 0.5, 1.3, 30
    """Height of the head (m) and vertical part of the trunk's axis below which a row is down, height of the head (m)
    above which it stands again, and control steps of the latter."""

    def __init__(
        self,
        paths: Sequence[str | Path],
        columns: Mapping[str, slice],
        itinerary: Itinerary,
        riser: int,
        seed: int,
        bursts: tuple[int, int] = (1, 15),
    ) -> None:
        super().__init__()
        self.policies = nn.ModuleList(load_policy(path, "act") for path in paths)
        self.targets, self.stander = HumanoidTargets(), StandingController(len(itinerary.skills))
        self.riser, self.bursts = riser, bursts
        settings = [policy_settings(path) for path in paths]
        for number, told in enumerate(settings):
            observed = [i for name in told["observes"] for i in range(columns[name].start, columns[name].stop)]
            self.register_buffer(f"observed_{number}", torch.tensor(observed), persistent=False)
        cadences = [told["cadence"] for told in settings]
        self.register_buffer("clocked", torch.tensor([own is not None for own in cadences]), persistent=False)
        self.register_buffer("cadences", torch.tensor([own or [0.0] * 4 for own in cadences]), persistent=False)
        self.head, self.upright = columns["head_height"].start, columns["torso_upright"].start
        for name in ("skills", "commands", "times", "noise", "rises"):
            self.register_buffer(name, getattr(itinerary, name), persistent=False)
        rows = len(itinerary.skills)
        self.generator = torch.Generator().manual_seed(seed)
        self.register_buffer("clock", torch.zeros((), dtype=torch.int64))
        self.register_buffer("phase", 2 * math.pi * torch.rand(rows, 1, generator=self.generator))
        self.register_buffer("burst", torch.randint(bursts[1], (rows, 1), generator=self.generator), persistent=False)
        self.register_buffer("rising", torch.zeros(rows, dtype=torch.bool))
        self.register_buffer("steady", torch.zeros(rows, dtype=torch.int64))

    def get_extra_state(self) -> Tensor:
        """The random state, so that `state_dict` is complete."""
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Restores the random state."""
        self.generator.set_state(state.cpu())

    def _now(self, head: Tensor, upright: Tensor) -> tuple[Tensor, Tensor]:
        """Skill [N] and command [N, 3] of each row at this control step."""
        place = ((self.times <= self.clock).sum(1, keepdim=True) - 1).clamp(min=0)
        skill = self.skills.gather(1, place)[:, 0]
        command = self.commands.gather(1, place[..., None].expand(-1, -1, 3))[:, 0]
        self.steady = torch.where(head > self.STANDING, self.steady + 1, 0)
        down = (head < self.LYING) | (upright < self.TILTED)
        self.rising = self.rises & torch.where(self.rising, self.steady < self.STEADY, down)
        return torch.where(self.rising, self.riser, skill), command * ~self.rising[:, None]

    def forward(self, physics: Tensor, measurements: Tensor) -> Tensor:
        """Actions [N, 21] (float32) for physics [N, 55] (float64) and measurements [N, M]; counts a control step."""
        skill, command = self._now(measurements[:, self.head], measurements[:, self.upright])
        clock = torch.cat([self.phase.sin(), self.phase.cos()], 1) * self.clocked[skill, None]
        told = torch.cat([command, clock], 1)
        action = torch.zeros(len(physics), len(self.targets.rest))
        for number, policy in enumerate(self.policies):
            rows = (skill == number).nonzero()[:, 0]
            if len(rows):
                seen = measurements[rows][:, getattr(self, f"observed_{number}")]
                action[rows] = policy(torch.cat([seen, told[rows]], 1))
        offset, slope, low, high = self.cadences[skill].unsqueeze(-1).unbind(1)
        hertz = (offset + slope * command[:, :2].norm(dim=1, keepdim=True)).clamp(low, high)
        self.phase = torch.remainder(self.phase + 2 * math.pi * CONTROL_SECONDS * hertz, 2 * math.pi)
        active = (self.clock + self.burst) % self.bursts[1] < self.bursts[0]
        noise = torch.randn(action.shape, generator=self.generator) * self.noise[:, None] * active
        self.clock = self.clock + 1
        stands = (skill < 0)[:, None]
        control = torch.where(stands, self.stander(physics, stands[:, 0]).float(), self.targets(physics, action))
        return (control + noise).clamp(-1, 1)


@dataclass(frozen=True)
class Skill:
    """A shipped policy and what it can be told.

    Attributes:
        policy: name of its file.
        spans: lowest and highest forward, leftward (m/s) and turn (rad/s).
        weight: how often it is chosen.
    """

    policy: str
    spans: tuple[tuple[float, float], tuple[float, float], tuple[float, float]]
    weight: float


_NONE = (0.0, 0.0)
SKILLS = {
    "walk": Skill("walk_late", ((1.0, 1.0), _NONE, _NONE), 0.6),
    "backward": Skill("backward_late", ((-0.5, -0.5), _NONE, _NONE), 0.15),
    "run": Skill("run_late", ((3.0, 3.5), _NONE, _NONE), 0.25),
}
"""What rows of `LocomotionBehaviours` choose from."""
RISING = "get_up_late"
"""The policy that rows follow that are down."""
LOCOMOTION_SOURCES = ("walk", "rise")


@lru_cache(maxsize=1)
def _columns() -> dict[str, slice]:
    return BatchedMujocoEnv("humanoid", num_threads=1).columns


@checked
class LocomotionBehaviours:
    """Draws episodes in which shipped policies walk and get up, after itineraries of their own.

    `walk` begins standing and changes between `SKILLS`; `rise` begins in the suite's own reset or lying on the floor,
    gets up, and then stands in balance or goes on as the others. With rows that rise, half of those that walk get up
    too when they have fallen.

    Args:
        shares: how many of the rows belong to each of `LOCOMOTION_SOURCES`, in proportion.
        max_noise: the control noise of a row, which comes in bursts, is drawn between 0 and this.
        bursts: see `BalanceController`.
        seconds: shortest and longest time for which a row follows a skill.
    """

    def __init__(
        self,
        shares: Mapping[str, NonNegative] | None = None,
        max_noise: NonNegative = 0.5,
        bursts: tuple[Size, Size] = (1, 15),
        seconds: tuple[Positive, Positive] = (1.5, 6.0),
    ) -> None:
        self.shares = shares or {"walk": 1.0}
        if set(self.shares) - set(LOCOMOTION_SOURCES) or not sum(self.shares.values()):
            raise ValueError(f"shares={dict(self.shares)}: expected some of {', '.join(LOCOMOTION_SOURCES)}.")
        self.max_noise, self.bursts, self.seconds = max_noise, bursts, seconds
        rises = [RISING] if self.shares.get("rise") else []
        self.policies = list(dict.fromkeys([*(skill.policy for skill in SKILLS.values()), *rises]))
        self.paths = [BEHAVIOURS / "humanoid" / f"{name}.safetensors" for name in self.policies]
        for path in self.paths:
            check_file(path, "a policy that ships with the project")

    def episodes(self, rows: int, seed: int, steps: int) -> Episodes:
        """Starts and policy of N episodes of `steps` control steps; the same arguments give the same episodes."""
        rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
        share = self.shares.get("walk", 0.0) / sum(self.shares.values())
        walking = round(rows * share)
        walks = np.arange(rows) < walking
        plans = [self._itinerary(each, steps, rng) for each in walks]
        longest = max(len(plan) for plan in plans)
        plans = [plan + plan[-1:] * (longest - len(plan)) for plan in plans]
        skills, commands, times = (torch.tensor([[part[i] for part in plan] for plan in plans]) for i in range(3))
        itinerary = Itinerary(
            skills,
            commands.float(),
            times,
            torch.from_numpy(rng.uniform(0, self.max_noise, rows)).float(),
            torch.from_numpy(~walks | ((rng.random(rows) < 0.5) & (walking < rows))),
        )
        controller = LocomotionController(
            self.paths,
            _columns(),
            itinerary,
            len(self.policies) - 1,
            int(rng.integers(2**31)),
            self.bursts,
        )
        simulator = BatchSimulation(HUMANOID, num_threads=1)
        starts = []
        if walking:
            starts.append(start_standing(simulator, walking, generator))
        if walking < rows:
            starts.append(start_anywhere(simulator, rows - walking, generator, {"reset": 0.6, "lying": 0.4}))
        policy = TensorDictModule(controller, in_keys=["physics", "measurements"], out_keys=["action"])
        source = len(SOURCES) + torch.from_numpy(~walks).long()
        return Episodes(torch.from_numpy(np.concatenate(starts)), policy, source, itinerary.rises)

    def _itinerary(
        self, walks: bool, steps: int, rng: np.random.Generator
    ) -> list[tuple[int, tuple[float, float, float], int]]:
        """Skill, command and beginning of each part."""
        if not walks and rng.random() < 0.5:
            return [(-1, (0.0, 0.0, 0.0), 0)]
        names = list(SKILLS)
        weights = np.array([skill.weight for skill in SKILLS.values()])
        plan, begins = [], 0
        while begins < steps:
            skill = SKILLS[names[rng.choice(len(names), p=weights / weights.sum())]]
            command = tuple(float(rng.uniform(*span)) for span in skill.spans)
            plan.append((self.policies.index(skill.policy), command, begins))
            begins += round(rng.uniform(*self.seconds) / CONTROL_SECONDS)
        return plan

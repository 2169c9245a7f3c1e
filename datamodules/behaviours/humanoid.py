"""What the embedded humanoid data show: standing, crouching, bowing, raising hands, and falling about.

`HumanoidBehaviours.episodes(rows, seed, steps)` gives one shard's episodes: where each starts and the policy that acts
in them. A shard is a pure function of its arguments.

Dimensions: N rows (one episode each), K postures, S breakpoints of a schedule.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from components.buildable import buildable
from components.checks import NonNegative, Size, checked
from datamodules.behaviours.balance import (
    ARM_LOWERED,
    ARM_RAISED,
    ARM_REST,
    CONTROL_SECONDS,
    NQ,
    NU,
    NV,
    BalanceController,
    BalancedPose,
    Body,
    Posture,
    UnbalancedPostureError,
    balance,
    check_balance,
)
from datamodules.behaviours.exploration import ExplorationController
from datamodules.environments.domains import HUMANOID, Simulator
from datamodules.environments.simulation import BatchSimulation

SOURCES = ("hold", "move", "explore_upright", "explore_floor")

STAND = Posture()
POSTURES: dict[str, Posture] = {
    "stand": STAND,
    "half_crouch": Posture(head_height=1.27),
    "crouch": Posture(head_height=1.15, pitch=0.1),
    "deep_crouch": Posture(head_height=1.05, pitch=0.2),
    "raise_left_hand": Posture(left_arm=ARM_RAISED),
    "raise_right_hand": Posture(right_arm=ARM_RAISED),
    "raise_both_hands": Posture(left_arm=ARM_RAISED, right_arm=ARM_RAISED),
    "lower_both_hands": Posture(left_arm=ARM_LOWERED, right_arm=ARM_LOWERED),
    "bow": Posture(head_height=1.25, pitch=0.7),
    "turn_left": Posture(yaw=0.6),
    "turn_right": Posture(yaw=-0.6),
    "lean_left": Posture(roll=-0.2),
    "lean_right": Posture(roll=0.2),
}


@lru_cache(maxsize=1)
def _standing_position() -> np.ndarray:
    return check_balance(Body(), STAND)[0]


@buildable()
def upright_start(simulator: Simulator, rows: int, generator: torch.Generator) -> np.ndarray:
    """Episode starts [N, 55]: standing in balance, joints (rad) and velocities disturbed by 0.015.

    For tasks that begin on the feet.
    """
    return _disturbed(np.tile(_standing_position(), (rows, 1)), 0.015, 0.015, generator)


def _disturbed(qpos: np.ndarray, joints: float, velocity: float, generator: torch.Generator) -> np.ndarray:
    """Physics [N, 55] at `qpos` [N, 28] with normal noise on joint angles and on all velocities."""
    rows = len(qpos)
    angles = joints * torch.randn(rows, NQ - 7, generator=generator, dtype=torch.float64).numpy()
    speeds = velocity * torch.randn(rows, NV, generator=generator, dtype=torch.float64).numpy()
    return np.concatenate([qpos[:, :7], qpos[:, 7:] + angles, speeds], axis=1)


@dataclass(frozen=True)
class Repertoire:
    """Balanced poses and the moves between them.

    Attributes:
        poses: K poses; the first `keys` of them are places to stay, pose 0 is standing.
        keys: how many are places to stay; the others lie on the way of a move.
        named: how many of the places are `POSTURES`.
        moves: (from, to) -> indices of the poses passed, both ends included; every move exists both ways.
    """

    poses: list[BalancedPose]
    keys: int
    named: int
    moves: dict[tuple[int, int], list[int]]

    @cached_property
    def neighbours(self) -> dict[int, list[int]]:
        """Places that can be reached from a place."""
        result = defaultdict(list)
        for first, last in self.moves:
            result[first].append(last)
        return result


def _random_posture(rng: np.random.Generator) -> Posture:
    def arm() -> tuple[float, float, float]:
        # raised as often as not, else a point between two of the three known arm postures; slightly off
        known = np.array([ARM_REST, ARM_RAISED, ARM_LOWERED])
        ends = known[[1, 1] if rng.random() < 0.5 else rng.integers(3, size=2)]
        return tuple(ends[0] + rng.random() * (ends[1] - ends[0]) + rng.normal(size=3) * 0.1)

    # half of them as tall as the lean of the trunk allows: what the arms do is seen apart from how low the body is
    pitch = rng.uniform(-0.1, 0.7)
    tallest = 1.45 - 0.3 * max(pitch, 0.0)
    height = rng.uniform(1.05 if rng.random() < 0.5 else tallest - 0.05, tallest)
    return Posture(height, pitch, rng.uniform(-0.2, 0.2), rng.uniform(-0.6, 0.6), arm(), arm())


@lru_cache(maxsize=1)
def build_repertoire(
    random_postures: int = 27, moves_per_posture: int = 2, stops: int = 3, seed: int = 0
) -> Repertoire:
    """Balances the named postures, random ones and the poses on the way between them; a few seconds.

    Args:
        random_postures: places to stay besides the named ones.
        moves_per_posture: moves from each posture to random others, besides the one from and to standing.
        stops: poses on the way of a move.
        seed: of the random choices.
    """
    rng, body = np.random.default_rng(seed), Body()

    def way(first: Posture, last: Posture) -> list[Posture]:
        """The postures between two; raises if one of them can't be held."""
        between = [first.towards(last, i / (stops + 1)) for i in range(1, stops + 1)]
        for posture in between:
            check_balance(body, posture)
        return between

    places = list(POSTURES.values())
    ways = {(0, k): way(STAND, place) for k, place in enumerate(places) if k}
    while len(places) < len(POSTURES) + random_postures:
        candidate = _random_posture(rng)
        try:
            check_balance(body, candidate)
            ways[0, len(places)] = way(STAND, candidate)
        except UnbalancedPostureError:
            continue
        places.append(candidate)
    for first in range(1, len(places)):
        for last in map(int, rng.permutation(np.arange(1, len(places)))[:moves_per_posture]):
            if first == last or (first, last) in ways or (last, first) in ways:
                continue
            try:
                ways[first, last] = way(places[first], places[last])
            except UnbalancedPostureError:
                continue

    postures, moves = list(places), {}
    for (first, last), between in ways.items():
        passed = [first, *range(len(postures), len(postures) + stops), last]
        postures += between
        moves[first, last], moves[last, first] = passed, passed[::-1]
    return Repertoire(balance(postures, body), len(places), len(POSTURES), moves)


@dataclass(frozen=True)
class Episodes:
    """One shard's episodes, row by row.

    Attributes:
        physics: starting states [N, 55], float64.
        policy: reads `physics` [N, 55] and, of some, `measurements` [N, M], and writes `action` [N, 21]; call it once
            per control step, from the start.
        source: which of `SOURCES` a row is, or which of those of another kind, counted on from them [N], int64.
        rises: which rows get up when they have fallen [N], bool.
    """

    physics: Tensor
    policy: nn.Module
    source: Tensor
    rises: Tensor


class _Parts(nn.Module):
    """Each part of the rows is driven by a policy of its own, which writes `action` into what it is given."""

    def __init__(self, policies: Sequence[nn.Module], rows: Sequence[int]) -> None:
        super().__init__()
        self.policies = nn.ModuleList(policies)
        self.rows = list(rows)

    def forward(self, seen: TensorDictBase) -> TensorDictBase:
        parts = [policy(part)["action"] for policy, part in zip(self.policies, seen.split(self.rows))]
        return seen.set("action", torch.cat(parts))


def side_by_side(parts: Sequence[Episodes]) -> Episodes:
    """Episodes of several kinds as one shard, whose rows follow one another."""
    return Episodes(
        torch.cat([part.physics for part in parts]),
        _Parts([part.policy for part in parts], [len(part.physics) for part in parts]),
        torch.cat([part.source for part in parts]),
        torch.cat([part.rises for part in parts]),
    )


def _arrivals(begin: float, poses: int, seconds: float) -> list[float]:
    """Control steps at which a move passes its second to its last pose, evenly spaced as they are.

    It sets off at once and arrives slowly, as 1 - (1 - x)^2: the action that begins a move differs from the one that
    stays, so that what is to be learned from the data does not hide in their noise.
    """
    progress = 1 - np.sqrt(1 - np.linspace(0, 1, poses))
    return [begin + float(p) * seconds / CONTROL_SECONDS for p in progress[1:]]


class _Rows(nn.Module):
    """The first rows balance, the others explore."""

    def __init__(self, balancing: BalanceController, exploring: ExplorationController) -> None:
        super().__init__()
        self.balancing, self.exploring = balancing, exploring

    def forward(self, physics: Tensor) -> Tensor:
        rows = len(self.balancing.knots)
        return torch.cat([self.balancing(physics[:rows]), self.exploring(physics[rows:])])


@checked
class HumanoidBehaviours:
    """Draws episodes of the embedded humanoid data set.

    Args:
        shares: how many of the rows belong to each of `SOURCES`, in proportion.
            `hold` keeps a balanced pose; `move` wanders between poses, mostly from and to standing; `explore_upright`
            starts on the feet and `explore_floor` in the air in dm_control's random position, both with actions that
            know nothing of the body.
        max_noise: the control noise of a balancing row is drawn between 0 and this.
        bursts: when it comes, see `BalanceController`. Single strong kicks, well apart, push the body off its way as
            noise all the time does, and leave most actions as the controller chose them.
    """

    def __init__(
        self,
        shares: Mapping[str, NonNegative] | None = None,
        max_noise: NonNegative = 0.5,
        bursts: tuple[Size, Size] = (1, 15),
    ) -> None:
        self.shares = shares or {"hold": 0.25, "move": 0.55, "explore_upright": 0.1, "explore_floor": 0.1}
        if unknown := set(self.shares) - set(SOURCES):
            raise ValueError(f"unknown behaviours {sorted(unknown)}; there are {', '.join(SOURCES)}")
        if not sum(self.shares.values()):
            raise ValueError(f"shares={dict(self.shares)}: expected one that is more than 0.")
        if bursts[0] > bursts[1]:
            raise ValueError(f"bursts={list(bursts)}: expected the shortest first.")
        self.max_noise = max_noise
        self.bursts = bursts

    def episodes(self, rows: int, seed: int, steps: int) -> Episodes:
        """Starts and policy of N episodes of `steps` control steps; the same arguments give the same episodes."""
        repertoire = build_repertoire()
        rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
        weights = np.array([self.shares.get(name, 0.0) for name in SOURCES])
        last_rows = np.rint(rows * np.cumsum(weights) / weights.sum()).astype(int)
        hold, move, upright, floor = np.diff(last_rows, prepend=0)

        schedules = [self._hold(repertoire, rng) for _ in range(hold)]
        schedules += [self._wander(repertoire, steps, rng) for _ in range(move)]
        longest = max((len(knots) for knots, _ in schedules), default=2)
        knots = torch.tensor([k + k[-1:] * (longest - len(k)) for k, _ in schedules]).view(-1, longest)
        times = torch.tensor(
            [t + [t[-1] + 1 + i for i in range(longest - len(t))] for _, t in schedules], dtype=torch.float64
        ).view(-1, longest)
        noise = torch.from_numpy(rng.uniform(0, self.max_noise, hold + move))
        correlation = torch.from_numpy(rng.choice([0.0, 0.5], hold + move))
        balancing = BalanceController(
            repertoire.poses, knots, times, noise, correlation, int(rng.integers(2**31)), self.bursts
        )
        exploring = ExplorationController(upright + floor, NU, CONTROL_SECONDS, seed=int(rng.integers(2**31)))

        qpos = np.stack([pose.qpos for pose in repertoire.poses])
        starts = [
            _disturbed(qpos[knots[:, 0]], 0.02, 0.02, generator),
            _disturbed(np.tile(qpos[0], (upright, 1)), 0.1, 0.5, generator),
        ]
        if floor:
            starts.append(HUMANOID.start(BatchSimulation(HUMANOID, num_threads=1), floor, generator))
        source = torch.repeat_interleave(torch.arange(len(SOURCES)), torch.tensor([hold, move, upright, floor]))
        policy = TensorDictModule(_Rows(balancing, exploring), in_keys=["physics"], out_keys=["action"])
        rises = torch.zeros(len(source), dtype=torch.bool)
        return Episodes(torch.from_numpy(np.concatenate(starts)), policy, source, rises)

    @staticmethod
    def _hold(repertoire: Repertoire, rng: np.random.Generator) -> tuple[list[int], list[float]]:
        """Breakpoints of a row that keeps one pose: half of the time one with a name, else any there is."""
        pose = int(rng.integers(repertoire.named if rng.random() < 0.5 else len(repertoire.poses)))
        return [pose, pose], [0.0, 1.0]

    @staticmethod
    def _wander(repertoire: Repertoire, steps: int, rng: np.random.Generator) -> tuple[list[int], list[float]]:
        """Breakpoints (poses passed, control steps) of a row that stays, moves, stays, moves."""
        place = 0 if rng.random() < 0.6 else int(rng.integers(repertoire.keys))
        knots, times = [place], [0.0]
        while times[-1] < steps:
            knots.append(place)
            # Where many behaviours begin, to stay hides which one does; rows that hold show how to stand.
            stay = (0.0, 0.1) if place == 0 else (0.25, 2.5)
            times.append(times[-1] + rng.uniform(*stay) / CONTROL_SECONDS)
            if place == 0:  # half of the moves go to a posture with a name
                first, last = (1, repertoire.named) if rng.random() < 0.5 else (repertoire.named, repertoire.keys)
                target = int(rng.integers(first, last))
            else:
                target = 0 if rng.random() < 0.5 else int(rng.choice(repertoire.neighbours[place]))
            passed, seconds = repertoire.moves[place, target], rng.uniform(0.4, 1.6)
            if rng.random() < 0.2:  # turns back half-way
                there = passed[: len(passed) // 2 + 1]
                knots += [*there[1:], there[-1], *there[-2::-1]]
                times += _arrivals(times[-1], len(there), seconds / 2)
                times.append(times[-1] + rng.uniform(0.25, 2.5) / CONTROL_SECONDS)
                times += _arrivals(times[-1], len(there), seconds / 2)
            else:
                knots += passed[1:]
                times += _arrivals(times[-1], len(passed), seconds)
                place = target
        return knots, [float(t) for t in times]

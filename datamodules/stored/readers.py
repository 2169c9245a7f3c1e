"""Readers for the data sets that offline RL papers use: files of ExORL, MOOD, D4RL and OGBench become a
`TransitionDataset`.

In ExORL and MOOD files index t + 1 holds the action and the reward that LED to observation t + 1, and index 0 of both
is a dummy. Transition t is therefore (observation[t], action[t + 1], reward[t + 1], observation[t + 1]), with the
physics state of index t + 1, the arrival. Nothing is ever unpickled. Files are read whole, into memory;
`TransitionDataset.save` keeps the result in a form that opens faster.

Legend: T steps of an episode, N episodes, n rows, O observation size, A action size, P physics size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict

from components.files import visible_files
from datamodules.stored.arrays import Hdf5File, NpzFile, to_flags, to_float, to_int64
from datamodules.stored.transitions import TransitionDataset

# (observation, action) sizes; other domains are taken as they come
_DOMAIN_SIZES = {
    "humanoid": (67, 21),
    "walker": (24, 6),
    "cheetah": (17, 6),
    "quadruped": (78, 12),
    "point_mass_maze": (4, 2),
    "halfcheetah": (17, 6),
    "hopper": (11, 3),
    "walker2d": (17, 6),
    "ant": (111, 8),
    "antmaze": (29, 8),
}

_D4RL_STEPS = 1000  # the time limit that D4RL assumes where a file has no timeouts
_BLOCK = 64  # episodes of an HDF5 file read at once


def read_exorl(folder: str | Path, domain: str, max_episodes: int = 5000) -> TransitionDataset:
    """Read a folder of ExORL episodes, `*.npz` in sorted order.

    Each file holds `observation` [T+1, O], `action` [T+1, A], `reward` [T+1, 1] (four columns in the maze's RND
    files, all kept), `discount` [T+1, 1] of ones and zeros (0 where terminated) and optionally `physics` [T+1, P]. The
    last transition of a file is marked truncated unless it terminated.

    Args:
        folder: where the `.npz` files lie.
        domain: name of the domain, e.g. "walker"; sizes of known domains are checked.
        max_episodes: the first so many files are read. Explorers grow more diverse with time, so this changes the data.

    Raises:
        FileNotFoundError: no such folder, or no `.npz` in it.
        ValueError: a file is truncated, lacks a key, or has other lengths, sizes or values than expected.
    """
    files = exorl_files(folder, max_episodes)
    if not files:
        raise FileNotFoundError(f"{folder}: expected a folder of ExORL episodes (*.npz), found none.")
    dimensions = {"observation": (2,), "action": (2,), "reward": (1, 2), "discount": (1, 2), "physics": (2,)}
    with NpzFile(files[0]) as arrays:
        keys = [key for key in dimensions if key != "physics" or key in arrays]
    # a first pass over the headers, so that the second can write where the data stay
    shapes = []
    for file in files:
        with NpzFile(file) as arrays:
            shapes.append({key: arrays.shape(key, *dimensions[key]) for key in keys})
    builder = _Builder(domain, shapes[0], transitions=sum(shape["observation"][0] - 1 for shape in shapes))
    for file in files:
        with NpzFile(file) as arrays:
            block = {key: arrays.read(key, *dimensions[key])[None] for key in keys}
        discount = block.pop("discount")
        if not np.isin(discount[:, 1:], (0, 1)).all():
            raise ValueError(f"{file}: expected discounts of 0 or 1, found others.")
        builder.add(file, {**block, "terminated": discount == 0})
    return builder.finish({"made_by": "exorl", "origin": Path(folder).name, "first_file": files[0].name})


def exorl_files(folder: str | Path, max_episodes: int) -> list[Path]:
    """The first so many episodes in a folder."""
    return visible_files(Path(folder), "*.npz")[:max_episodes]


def read_mood(file: str | Path) -> TransitionDataset:
    """Read a MOOD mixture, named `{mixture}__{domain}_{task}.hdf5`.

    The file holds `observation` [N, T+1, O], `action` [N, T+1, A], `reward` and `terminated` [N, T+1], optionally
    `physics` [N, T+1, P] and `source` [N] (which behaviour an episode came from; 0 where there is none). The last
    transition of an episode is marked truncated unless it terminated.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the name has another form, or the file is truncated, lacks a key, or has other lengths, sizes or
            values than expected.
    """
    file = Path(file)
    name = re.fullmatch(r"(?P<mixture>.+)__(?P<domain_task>[^_].*)", file.stem)
    domains = "|".join(sorted(_DOMAIN_SIZES, key=len, reverse=True))
    parts = re.fullmatch(rf"(?P<domain>{domains}|[^_]+)_(?P<task>.+)", name["domain_task"]) if name else None
    if name is None or parts is None:
        raise ValueError(f"{file}: expected a name of the form MIXTURE__DOMAIN_TASK.hdf5, found {file.name!r}.")
    dimensions = {"observation": 3, "action": 3, "reward": 2, "terminated": 2, "physics": 3}
    with Hdf5File(file) as h5:
        shapes = {key: h5.shape(key, n) for key, n in dimensions.items() if key != "physics" or key in h5}
        n, length = shapes["observation"][:2]
        for key, shape in shapes.items():
            if shape[:2] != (n, length):
                raise ValueError(f"{file}: expected {key} of shape [{n}, {length}, ...], found {list(shape)}.")
        source = h5.read("source", 1) if "source" in h5 else np.zeros(n, np.int64)
        if source.shape != (n,):
            raise ValueError(f"{file}: expected source of shape [{n}], found {list(source.shape)}.")
        source = to_int64(file, "source", source)
        widths = {key: shape[1:] for key, shape in shapes.items()}
        builder = _Builder(parts["domain"], widths, transitions=n * (length - 1))
        for first in range(0, n, _BLOCK):
            block = slice(first, first + _BLOCK)
            builder.add(file, {key: h5.read(key, dimensions[key], rows=block) for key in shapes}, source[block])
    return builder.finish(
        {"made_by": "mood", "origin": file.name, "mixture": name["mixture"], "task": parts["task"]},
    )


def read_d4rl(file: str | Path) -> TransitionDataset:
    """Read a D4RL file as D4RL's own transition builder does.

    The file holds `observations` [N, O], `actions` [N, A], `rewards`, `terminals` and `timeouts` [N] (without
    timeouts, episodes end after 1000 steps), optionally `next_observations` [N, O], `infos/qpos` and `infos/qvel`.
    The next observation is the next row's, rows with a timeout are dropped because the next row is another episode's,
    and so is the last row. A terminal row keeps its transition, with `terminated` set; its next observation is taken
    from `next_observations` where the file has them. Where it has not, as in AntMaze, whose episodes go on after
    success, it is the next row's, as in D4RL. Physics of an arrival that the file does not hold is NaN.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is truncated, lacks a key, or has other lengths, sizes or values than expected.
    """
    file = Path(file)
    optional = ("timeouts", "next_observations", "infos/qpos", "infos/qvel")
    with Hdf5File(file) as h5:
        keys = ["observations", "actions", "rewards", "terminals", *(key for key in optional if key in h5)]
        rows = {key: h5.read(key, 1 if key in ("rewards", "terminals", "timeouts") else 2) for key in keys}
    n = _rows(file, rows)
    terminal = to_flags(file, "terminals", rows["terminals"])
    timeout = to_flags(file, "timeouts", rows["timeouts"]) if "timeouts" in rows else _assumed_timeouts(terminal)
    observation = to_float(file, "observations", rows["observations"])
    following, unknown = np.roll(observation, -1, axis=0), np.zeros(n, bool)
    if "next_observations" in rows:
        unknown = terminal
        following[unknown] = to_float(file, "next_observations", rows["next_observations"])[unknown]
    arrays = {
        "observation": observation,
        "action": to_float(file, "actions", rows["actions"]),
        "next.observation": following,
        "next.reward": to_float(file, "rewards", rows["rewards"])[:, None],
        "next.terminated": terminal[:, None],
        "source": np.zeros(n, np.int64),
    }
    if "infos/qpos" in rows and "infos/qvel" in rows:
        parts = [to_float(file, key, rows[key], np.float64) for key in ("infos/qpos", "infos/qvel")]
        arrays["next.physics"] = np.roll(np.concatenate(parts, axis=1), -1, axis=0)
        arrays["next.physics"][unknown] = np.nan
    domain = re.sub(r"^ant_?maze.*", "antmaze", re.split(r"-|_(?!maze)", file.stem.lower())[0])
    _require_sizes(file, domain, observation.shape[1], rows["actions"].shape[1])
    keep = ~timeout
    keep[-1] = False
    kept = kept_rows(file, arrays, keep, terminal | timeout)
    return as_dataset(kept, {"domain": domain, "made_by": "d4rl", "origin": file.name})


def _rows(file: Path, arrays: Mapping[str, np.ndarray]) -> int:
    """How many rows all arrays of a file have."""
    n = len(arrays["observations"])
    for key, values in arrays.items():
        if len(values) != n:
            raise ValueError(f"{file}: expected {n} rows in {key}, as in observations, found {len(values)}.")
    return n


def read_ogbench(
    file: str | Path, goal: Sequence[float] | None = None, first: int = 0, tolerance: float = 0.5
) -> TransitionDataset:
    """Read a file of OGBench (arXiv 2410.20092) whose observations are vectors.

    It holds `observations` [N, O], `actions` [N, A] and `terminals` [N], which are 1 at the last state of an episode:
    the action there led nowhere, and nothing ended for good. Of `qpos` [N, q] and `qvel` [N, v], where there are both,
    the arrival's are kept as physics. There are no rewards; with a goal they are those of OGBench's tasks of one goal
    in mazes: -1 in every state, 0 in one whose `qpos` lies at the goal, after which nothing is expected to come.

    Args:
        goal: where to be, two numbers or more; None for rewards of 0.
        first: the place in `qpos` of the goal's first coordinate: 0 of a body in a maze, 15 of an ant's ball.
        tolerance: distance that counts as there: 0.5, or 1 of a point in a maze.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is truncated, lacks a key, or has other lengths, sizes or values than expected.
    """
    if goal is not None and len(goal) < 2:
        raise ValueError(f"goal={list(goal)}: expected at least two numbers, found {len(goal)}.")
    file = Path(file)
    with NpzFile(file) as npz:
        optional = [key for key in ("qpos", "qvel") if key in npz]
        asked = optional if goal is None else {"qpos", *optional}
        keys = ["observations", "actions", "terminals", *asked]
        rows = {key: npz.read(key, 1 if key == "terminals" else 2) for key in keys}
    n = _rows(file, rows)
    last = to_flags(file, "terminals", rows["terminals"])
    if not last[-1:].all():
        raise ValueError(f"{file}: expected the last row to end an episode in terminals, found that it does not.")
    observation = to_float(file, "observations", rows["observations"])
    arrived = np.zeros(n, bool)
    if goal is not None:
        qpos = to_float(file, "qpos", rows["qpos"], np.float64)
        if qpos.shape[1] < first + len(goal):
            raise ValueError(f"{file}: expected at least {first + len(goal)} numbers in qpos, found {qpos.shape[1]}.")
        arrived = np.linalg.norm(qpos[:, first : first + len(goal)] - np.asarray(goal), axis=1) <= tolerance
    arrays = {
        "observation": observation,
        "action": to_float(file, "actions", rows["actions"]),
        "next.observation": np.roll(observation, -1, axis=0),
        "next.reward": np.full((n, 1), 0.0 if goal is None else -1.0, np.float32) + arrived[:, None],
        "next.terminated": arrived[:, None],
        "source": np.zeros(n, np.int64),
    }
    if "qpos" in rows and "qvel" in rows:
        parts = [to_float(file, key, rows[key], np.float64) for key in ("qpos", "qvel")]
        arrays["next.physics"] = np.roll(np.concatenate(parts, axis=1), -1, axis=0)
    kept = kept_rows(file, arrays, ~last, last)
    del kept["left_out"]  # no action was rewarded there
    return as_dataset(kept, {"domain": None, "made_by": "ogbench", "origin": file.name})


def kept_rows(
    file: Path, arrays: Mapping[str, np.ndarray], keep: np.ndarray, ends: np.ndarray
) -> dict[str, np.ndarray]:
    """Transitions of those rows of flat data that say where they led.

    Args:
        arrays: columns [n, width] by the names of `TransitionDataset`'s files, without what is returned besides.
        keep: bool [n]; at most the last row of an episode may be left out.
        ends: bool [n], rows that end an episode.

    Returns:
        the columns' kept rows, `episode`, `next.truncated`, and `left_out`.

    Raises:
        ValueError: no row is kept.
    """
    if not keep.any():
        raise ValueError(f"{file}: expected at least one transition, found none in {len(keep)} rows.")
    reward = arrays["next.reward"]
    before = np.flatnonzero(keep[:-1] & ~keep[1:] & ~ends[:-1])
    left_out = np.full_like(reward, np.nan)
    left_out[before] = reward[before + 1]
    kept = {name: values[keep] for name, values in {**arrays, "left_out": left_out}.items()}
    # an episode all of whose rows are left out has no number
    kept["episode"] = np.unique((np.cumsum(ends) - ends)[keep], return_inverse=True)[1]
    final = np.append(np.diff(kept["episode"]) != 0, True)[:, None]
    kept["next.truncated"] = final & ~kept["next.terminated"]
    return kept


class _Builder:
    """Fills preallocated arrays with the transitions of episodes that start with a dummy action and reward."""

    def __init__(self, domain: str, shapes: Mapping[str, tuple[int, ...]], transitions: int) -> None:
        self.domain = domain
        self.widths = {key: shape[1] if len(shape) > 1 else 1 for key, shape in shapes.items()}
        n = max(transitions, 0)
        self.arrays = {
            "observation": np.empty((n, self.widths["observation"]), np.float32),
            "action": np.empty((n, self.widths["action"]), np.float32),
            "next.observation": np.empty((n, self.widths["observation"]), np.float32),
            "next.reward": np.empty((n, self.widths["reward"]), np.float32),
            "next.terminated": np.empty((n, 1), bool),
            "next.truncated": np.zeros((n, 1), bool),
            "episode": np.empty(n, np.int64),
            "source": np.empty(n, np.int64),
        }
        if "physics" in shapes:
            self.arrays["next.physics"] = np.empty((n, self.widths["physics"]), np.float64)
        self.filled = 0
        self.episodes = 0

    def add(self, file: Path, block: Mapping[str, np.ndarray], source: np.ndarray | None = None) -> None:
        """Add B episodes of one length: arrays [B, T+1] or [B, T+1, width], with `source` [B] or 0 for all."""
        batch, length = block["observation"].shape[:2]
        steps = length - 1
        if steps < 1:
            raise ValueError(f"{file}: expected episodes of at least 2 rows, found {length}.")
        _require_sizes(file, self.domain, block["observation"].shape[2], block["action"].shape[2])
        flat = {}
        for key, values in block.items():
            width = 1 if key == "terminated" else self.widths[key]
            if values.shape[:2] != (batch, length) or values.size != batch * length * width:
                raise ValueError(
                    f"{file}: expected {key} of {length} rows and width {width}, found shape {list(values.shape[1:])}."
                )
            # the dummy first row may hold anything
            flat[key] = values.reshape(batch, length, width)[:, 1:].reshape(-1, width)
        observation = to_float(file, "observation", block["observation"], whole=False)
        rows = slice(self.filled, self.filled + batch * steps)
        self.arrays["observation"][rows] = observation[:, :-1].reshape(batch * steps, -1)
        self.arrays["next.observation"][rows] = observation[:, 1:].reshape(batch * steps, -1)
        self.arrays["action"][rows] = to_float(file, "action", flat["action"], whole=False)
        self.arrays["next.reward"][rows] = to_float(file, "reward", flat["reward"], whole=False)
        self.arrays["next.terminated"][rows] = to_flags(file, "terminated", flat["terminated"])
        if "next.physics" in self.arrays:
            self.arrays["next.physics"][rows] = to_float(file, "physics", flat["physics"], np.float64, whole=False)
        final = slice(rows.start + steps - 1, rows.stop, steps)
        self.arrays["next.truncated"][final] = ~self.arrays["next.terminated"][final]
        self.arrays["episode"][rows] = self.episodes + np.repeat(np.arange(batch), steps)
        self.arrays["source"][rows] = 0 if source is None else np.repeat(source, steps)
        self.filled = rows.stop
        self.episodes += batch

    def finish(self, manifest: dict[str, Any]) -> TransitionDataset:
        return as_dataset(self.arrays, {"domain": self.domain, **manifest})


def as_dataset(arrays: dict[str, np.ndarray], manifest: dict[str, Any]) -> TransitionDataset:
    """A data set of columns by the names of its files, but for `next.done`."""
    arrays["next.done"] = arrays["next.terminated"] | arrays["next.truncated"]
    if "left_out" in arrays and np.isnan(arrays["left_out"]).all():
        del arrays["left_out"]
    data = TensorDict(batch_size=[len(arrays["observation"])])
    for name, values in arrays.items():
        data[tuple(name.split("."))] = torch.from_numpy(values)
    return TransitionDataset(data, manifest)


def _assumed_timeouts(terminal: np.ndarray) -> np.ndarray:
    """Timeouts [N] of a file without any: every 1000th step since the last end of an episode, as D4RL counts."""
    timeout, start = np.zeros(len(terminal), dtype=bool), 0
    for end in [*np.flatnonzero(terminal), len(terminal)]:
        timeout[start + _D4RL_STEPS - 1 : end + 1 : _D4RL_STEPS] = True
        start = end + 1
    return timeout


def _require_sizes(file: Path, domain: str, observation: int, action: int) -> None:
    expected = _DOMAIN_SIZES.get(domain, (observation, action))
    if (observation, action) != expected:
        raise ValueError(
            f"{file}: expected observations of size {expected[0]} and actions of size {expected[1]} for {domain}, "
            f"found {observation} and {action}."
        )

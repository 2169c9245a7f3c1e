"""Readers for the data sets that offline RL papers use: ExORL, MOOD and D4RL files become a `TransitionDataset`.

In ExORL and MOOD files index t + 1 holds the action and the reward that LED to observation t + 1, and index 0 of both
is a dummy. Transition t is therefore (observation[t], action[t + 1], reward[t + 1], observation[t + 1]), with the
physics state of index t + 1, the arrival. Nothing is ever unpickled. Files are read whole, into memory;
`TransitionDataset.save` keeps the result in a form that opens faster.

Legend: T steps of an episode, N episodes, O observation size, A action size, P physics size.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from tensordict import TensorDict

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
    folder = Path(folder)
    files = sorted(folder.glob("*.npz"))[:max_episodes] if folder.is_dir() else []
    if not files:
        raise FileNotFoundError(f"{folder}: expected a folder of ExORL episodes (*.npz), found none.")
    keys = ["observation", "action", "reward", "discount"]
    with _npz(files[0]) as arrays:
        keys += ["physics"] * ("physics" in arrays)
    # a first pass over the headers, so that the second can write where the data stay
    shapes = [_npz_shapes(file, keys) for file in files]
    builder = _Builder(domain, shapes[0], transitions=sum(shape["observation"][0] - 1 for shape in shapes))
    for file in files:
        with _npz(file) as arrays:
            block = {key: arrays[key][None] for key in keys}
        discount = block.pop("discount")
        if not np.isin(discount[:, 1:], (0, 1)).all():
            raise ValueError(f"{file}: expected discounts of 0 or 1, found others.")
        builder.add(file, {**block, "terminated": discount == 0})
    return builder.finish({"made_by": "exorl", "origin": folder.name, "first_file": files[0].name})


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
    with _hdf5(file) as h5:
        columns = {key: _column(file, h5, key, ndim) for key, ndim in (("observation", 3), ("action", 3))}
        columns |= {key: _column(file, h5, key, 2) for key in ("reward", "terminated")}
        if "physics" in h5:
            columns["physics"] = _column(file, h5, "physics", 3)
        n, length = columns["observation"].shape[:2]
        for key, column in columns.items():
            if column.shape[:2] != (n, length):
                raise ValueError(f"{file}: expected {key} of shape [{n}, {length}, ...], found {list(column.shape)}.")
        source = _column(file, h5, "source", 1)[:] if "source" in h5 else np.zeros(n)
        if source.shape != (n,):
            raise ValueError(f"{file}: expected source of shape [{n}], found {list(source.shape)}.")
        shapes = {key: column.shape[1:] for key, column in columns.items()}
        builder = _Builder(parts["domain"], shapes, transitions=n * (length - 1))
        for first in range(0, n, _BLOCK):
            block = slice(first, first + _BLOCK)
            builder.add(file, {key: column[block] for key, column in columns.items()}, source[block])
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
    with _hdf5(file) as h5:
        rows = {
            key: _column(file, h5, key, ndim)[:]
            for key, ndim in (("observations", 2), ("actions", 2), ("rewards", 1), ("terminals", 1))
        }
        for key, ndim in (("timeouts", 1), ("next_observations", 2), ("infos/qpos", 2), ("infos/qvel", 2)):
            if key in h5:
                rows[key] = _column(file, h5, key, ndim)[:]
    n = len(rows["observations"])
    for key, values in rows.items():
        if len(values) != n:
            raise ValueError(f"{file}: expected {n} rows in {key}, as in observations, found {len(values)}.")
        _require_finite(file, key, values)
    terminal = rows["terminals"].astype(bool)
    timeout = rows["timeouts"].astype(bool) if "timeouts" in rows else _assumed_timeouts(terminal)

    observation, last = rows["observations"].astype(np.float32), slice(0, n - 1)
    keep = ~timeout[last]
    if not keep.any():
        raise ValueError(f"{file}: expected at least one transition, found none in {n} rows.")
    following, unknown = observation[1:].copy(), np.zeros(n - 1, dtype=bool)
    if "next_observations" in rows:
        unknown = terminal[last]
        following[unknown] = rows["next_observations"][last][unknown]
    # an episode ends with a terminal or a timeout; a dropped row ends the one before it
    ends = (terminal | timeout)[last]
    episode = np.concatenate([[0], np.cumsum(ends)[:-1]])[keep]
    episode = np.unique(episode, return_inverse=True)[1]
    arrays = {
        "observation": observation[last][keep],
        "action": rows["actions"][last][keep],
        "next.observation": following[keep],
        "next.reward": rows["rewards"][last][keep, None],
        "next.terminated": terminal[last][keep, None],
        "episode": episode,
        "source": np.zeros(keep.sum()),
    }
    if "infos/qpos" in rows and "infos/qvel" in rows:
        physics = np.concatenate([rows["infos/qpos"], rows["infos/qvel"]], axis=1).astype(np.float64)[1:]
        physics[unknown] = np.nan
        arrays["next.physics"] = physics[keep]
    final = np.append(np.diff(episode) != 0, True)[:, None]
    arrays["next.truncated"] = final & ~arrays["next.terminated"]
    domain = re.sub(r"^ant_?maze.*", "antmaze", re.split(r"-|_(?!maze)", file.stem.lower())[0])
    _require_sizes(file, domain, observation.shape[1], rows["actions"].shape[1])
    return _dataset(arrays, {"domain": domain, "made_by": "d4rl", "origin": file.name})


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
            arrived = values.reshape(batch, length, width)[:, 1:]
            flat[key] = arrived.reshape(-1, width)
            # the dummy first row may hold anything, except for the observation
            _require_finite(file, key, values if key == "observation" else arrived)
        rows = slice(self.filled, self.filled + batch * steps)
        self.arrays["observation"][rows] = block["observation"][:, :-1].reshape(batch * steps, -1)
        self.arrays["next.observation"][rows] = flat["observation"]
        self.arrays["action"][rows] = flat["action"]
        self.arrays["next.reward"][rows] = flat["reward"]
        self.arrays["next.terminated"][rows] = flat["terminated"]
        if "next.physics" in self.arrays:
            self.arrays["next.physics"][rows] = flat["physics"]
        final = slice(rows.start + steps - 1, rows.stop, steps)
        self.arrays["next.truncated"][final] = ~self.arrays["next.terminated"][final]
        self.arrays["episode"][rows] = self.episodes + np.repeat(np.arange(batch), steps)
        self.arrays["source"][rows] = 0 if source is None else np.repeat(source, steps)
        self.filled = rows.stop
        self.episodes += batch

    def finish(self, manifest: dict[str, Any]) -> TransitionDataset:
        return _dataset(self.arrays, {"domain": self.domain, **manifest})


def _dataset(arrays: dict[str, np.ndarray], manifest: dict[str, Any]) -> TransitionDataset:
    arrays["next.done"] = arrays["next.terminated"] | arrays["next.truncated"]
    data = TensorDict(batch_size=[len(arrays["observation"])])
    for name, values in arrays.items():
        dtype = {"episode": np.int64, "source": np.int64, "next.physics": np.float64}.get(name, np.float32)
        tensor = torch.from_numpy(values if values.dtype == bool else values.astype(dtype, copy=False))
        data[tuple(name.split("."))] = tensor
    return TransitionDataset(data, manifest)


@contextmanager
def _npz(file: Path) -> Iterator[np.lib.npyio.NpzFile]:
    """Open an .npz file; whatever fails while it is open becomes one sentence."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            yield arrays
    except KeyError as error:
        raise ValueError(f"{file}: expected the array {error}, found none.") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{file}: expected a complete .npz file of numbers, found a damaged one ({error}).") from error


def _npz_shapes(file: Path, keys: list[str]) -> dict[str, tuple[int, ...]]:
    """Shapes of arrays in an .npz file, from their headers alone."""
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    shapes = {}
    with _npz(file) as arrays, zipfile.ZipFile(file) as archive:
        for key in keys:
            if key not in arrays:
                raise KeyError(key)
            with archive.open(f"{key}.npy") as stream:
                shapes[key] = read_header[np.lib.format.read_magic(stream)](stream)[0]
    if len(shapes["observation"]) != 2 or len(shapes["action"]) != 2:
        raise ValueError(
            f"{file}: expected observation and action of two dimensions, "
            f"found {list(shapes['observation'])} and {list(shapes['action'])}."
        )
    return shapes


@contextmanager
def _hdf5(file: Path) -> Iterator[h5py.File]:
    """Open an HDF5 file; whatever fails while it is open becomes one sentence."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: expected an HDF5 file, found nothing there.")
    try:
        with h5py.File(file, "r") as h5:
            yield h5
    except OSError as error:
        raise ValueError(f"{file}: expected a complete HDF5 file, found a damaged one ({error}).") from error


def _column(file: Path, h5: h5py.File, key: str, ndim: int) -> h5py.Dataset:
    if not isinstance(h5.get(key), h5py.Dataset):
        raise ValueError(f"{file}: expected the array {key!r}, found only {sorted(h5)}.")
    column = h5[key]
    if column.ndim != ndim or column.dtype.kind not in "fiub":
        raise ValueError(
            f"{file}: expected {key} to be numbers of {ndim} dimensions, found {column.dtype} {list(column.shape)}."
        )
    return column


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


def _require_finite(file: Path, key: str, values: np.ndarray) -> None:
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError(f"{file}: expected finite numbers in {key}, found NaN or infinity.")

"""Data of one's own: flat arrays in .npz or HDF5 files, and Minari's data sets.

Legend: n rows, O observation size, A action size, P physics size.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from components.checks import Number
from components.files import read_text, visible_files
from datamodules.stored.arrays import ArrayFile, Hdf5File, NpzFile, to_flags, to_float
from datamodules.stored.readers import as_dataset, kept_rows
from datamodules.stored.transitions import TransitionDataset

_KINDS = {".npz": NpzFile, ".hdf5": Hdf5File, ".h5": Hdf5File}
_MINARI = "main_data.hdf5"
_METADATA = "metadata.json"
_EPISODE = re.compile(r"episode_[0-9]{1,18}")
# what is read -> its keys, the first that is there, and its number of dimensions
_ARRAYS = {
    "observations": (("observations",), (2,)),
    "actions": (("actions",), (2,)),
    "rewards": (("rewards",), (1, 2)),
    "terminals": (("terminals", "terminations"), (1, 2)),
    "timeouts": (("timeouts", "truncations"), (1, 2)),
    "next_observations": (("next_observations",), (2,)),
    "physics": (("physics",), (2,)),
    "next_physics": (("next_physics",), (2,)),
}
_REQUIRED = ("observations", "actions", "rewards", "terminals")
_ROUNDING = 1e-5  # by which actions may exceed their bounds

Bounds = Sequence[Number | Sequence[Number]]


def read_own(path: str | Path, action_range: Bounds | None = None) -> TransitionDataset:
    """Read a file, or all files of a folder in sorted order.

    Row t of a file holds `observations` [n, O], `actions` [n, A], `rewards` [n], `terminals` (or `terminations`) [n]
    and `timeouts` (or `truncations`) [n], which may be left out where terminals end every episode. An episode ends
    where one of the two is 1, and with its file; a terminal stops bootstrapping, a timeout does not.

    The next observations are `next_observations` [n, O] where the file has them. Where it has not, they are the next
    rows': a row that ends an episode without being terminal is left out then, since nobody knows where it led, and a
    terminal row keeps its own observation, which no target looks at. A file of one episode may have n + 1 observations
    instead. `physics`, the simulator's states at the observations, and `next_physics` follow the same rules.

    Minari's data sets (a folder, or its `main_data.hdf5`) have a group of such an episode, `episode_K`, for each.

    Args:
        path: a file `.npz`, `.hdf5` or `.h5`, or a folder of such; hidden files are left out.
        action_range: the lowest and the highest actions, numbers or one for each dimension, which become -1 and 1. None
            takes those that Minari's metadata say, and elsewhere -1 and 1.

    Returns:
        a data set of any domain; `source` is the number of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file is damaged, lacks a key, or has other lengths, sizes or values than expected.
    """
    if action_range is not None and not _are_bounds(action_range):
        raise ValueError(f"action_range={action_range}: expected two numbers or two lists, the lower first.")
    parts: list[dict[str, np.ndarray]] = []
    for number, file in enumerate(own_files(path)):
        with _KINDS[file.suffix](file) as arrays:
            metadata, groups = _minari(arrays)
            bounds = _action_bounds(file, metadata) if action_range is None else action_range
            for prefix in groups or [""]:
                part = _read_rows(arrays, prefix, bounds)
                part["source"] = np.full(len(part["episode"]), number)
                if parts:
                    _check_widths(file, part, parts[0])
                    part["episode"] += parts[-1]["episode"][-1] + 1
                parts.append(part)
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return as_dataset(arrays, {"domain": None, "made_by": "own", "origin": Path(path).name})


def own_files(path: str | Path) -> list[Path]:
    """The files of a data set.

    Raises:
        FileNotFoundError, ValueError: there are none, or they are of another kind.
    """
    path = Path(path)
    kinds = ", ".join(_KINDS)
    if not path.is_dir():
        if path.suffix not in _KINDS:
            raise ValueError(f"path={path}: expected a file of one of {kinds}, or a folder of such, found another.")
        return [path]
    if (path / "data" / _MINARI).exists():
        return [path / "data" / _MINARI]
    files = [file for file in visible_files(path, "*") if file.suffix in _KINDS]
    if not files:
        raise FileNotFoundError(f"path={path}: expected files of one of {kinds} in this folder, found none.")
    return files


def own_metadata(files: Sequence[Path]) -> list[Path]:
    """What lies beside the files of a data set, and may be read along with them."""
    return [path for path in sorted({file.with_name(_METADATA) for file in files}) if path.is_file()]


def _read_rows(arrays: ArrayFile, prefix: str, bounds: Bounds | None) -> dict[str, np.ndarray]:
    """The transitions of a file, or of one group in it, by the names of `TransitionDataset`'s files."""
    file = arrays.file
    rows, keys = _read_arrays(arrays, prefix)
    n = len(rows["actions"])
    terminal = to_flags(file, keys["terminals"], rows["terminals"]).reshape(n)
    ends = terminal.copy()
    if "timeouts" in rows:
        ends |= to_flags(file, keys["timeouts"], rows["timeouts"]).reshape(n)
    one_episode = len(rows["observations"]) > n
    if one_episode and ends[:-1].any():
        raise ValueError(
            f"{file}: expected a single episode, as {keys['observations']} has a row more than actions, found its end "
            f"in row {int(ends.argmax())} of {n}."
        )
    if not one_episode and "timeouts" not in rows and not terminal.any():
        raise ValueError(
            f"{file}: expected the array 'timeouts' (or 'truncations'), all 0 for a single episode, since "
            f"{keys['terminals']} ends none; found neither."
        )
    ends[-1] = True

    def arrived(name: str, dtype: type[np.floating]) -> np.ndarray:
        """Where rows led, the own values of those that nobody knows of."""
        after = f"next_{name}"
        if after in rows:
            return to_float(file, keys[after], rows[after], dtype)
        values = to_float(file, keys[name], rows[name], dtype)
        return values[1:] if one_episode else np.where(ends[:, None], values, np.roll(values, -1, axis=0))

    columns = {
        "observation": to_float(file, keys["observations"], rows["observations"])[:n],
        "action": _scaled(file, keys["actions"], rows["actions"], bounds),
        "next.observation": arrived("observations", np.float32),
        "next.reward": to_float(file, keys["rewards"], rows["rewards"]).reshape(n, 1),
        "next.terminated": terminal[:, None],
    }
    if "physics" in rows or "next_physics" in rows:
        columns["next.physics"] = arrived("physics", np.float64)
    known = one_episode or "next_observations" in rows
    return kept_rows(file, columns, np.full(n, True) if known else terminal | ~ends, ends)


def _read_arrays(arrays: ArrayFile, prefix: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """What there is of `_ARRAYS`, of lengths and widths that fit together, and the keys that it was found under."""
    file, rows, keys = arrays.file, {}, {}
    for name, (known, dimensions) in _ARRAYS.items():
        there = [prefix + key for key in known if prefix + key in arrays]
        keys[name] = there[0] if there else prefix + known[0]
        if isinstance(arrays, Hdf5File) and arrays.is_group(keys[name]):
            raise ValueError(f"{file}: expected {keys[name]} to be one array, found a dictionary of several.")
        if not there and name == "terminals":
            there = arrays.listed(prefix.rstrip("/"))
            raise ValueError(
                f"{file}: expected the array '{prefix}terminals' (or 'terminations'), 1 where an episode ended for "
                f"good, beside 'timeouts' (or 'truncations'), 1 where it was cut off; found only {there}."
            )
        if there or name in _REQUIRED:
            rows[name] = arrays.read(keys[name], *dimensions)
    if "next_observations" in rows and "physics" in rows and "next_physics" not in rows:
        raise ValueError(f"{file}: expected {keys['next_physics']} beside physics and next_observations, found none.")

    n = len(rows["actions"])
    more = int(len(rows["observations"]) == n + 1 and "next_observations" not in rows)
    for name, values in rows.items():
        expected = n + more if name in ("observations", "physics") else n
        if len(values) != expected:
            raise ValueError(
                f"{file}: expected {expected} rows in {keys[name]}, found {len(values)}; actions have {n}."
            )
        if name in ("rewards", "terminals", "timeouts") and values.size != n:
            raise ValueError(f"{file}: expected one number in a row of {keys[name]}, found {list(values.shape)}.")
    if "next_observations" in rows and rows["next_observations"].shape != rows["observations"].shape:
        size, found = rows["observations"].shape[1], rows["next_observations"].shape[1]
        raise ValueError(f"{file}: expected {keys['next_observations']} of size {size}, found {found}.")
    return rows, keys


def _scaled(file: Path, key: str, action: np.ndarray, bounds: Bounds | None) -> np.ndarray:
    """Actions as numbers from -1 to 1."""
    values = to_float(file, key, action, np.float64)
    low, high = (-1.0, 1.0) if bounds is None else _limits(file, bounds, action.shape[1])
    scaled = values if bounds is None else 2 * (values - low) / (high - low) - 1
    if np.abs(scaled).max() > 1 + _ROUNDING:
        of = "from -1 to 1" if bounds is None else f"in the action_range {bounds}"
        raise ValueError(
            f"{file}: expected {key} {of}, found {values.min():g} to {values.max():g}; their bounds are set as "
            "datamodule.dataset.action_range=[LOW,HIGH]."
        )
    return scaled.clip(-1, 1).astype(np.float32)


def _limits(file: Path, bounds: Bounds, width: int) -> tuple[np.ndarray, np.ndarray]:
    try:
        low, high = (np.broadcast_to(np.asarray(bound, np.float64), width) for bound in bounds)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{file}: expected two numbers or two lists of {width} as action_range, found {bounds}."
        ) from error
    if not (np.isfinite([low, high]).all() and (low < high).all()):
        raise ValueError(f"{file}: expected finite bounds, the lower first, as action_range, found {bounds}.")
    return low, high


def _are_bounds(bounds: Bounds) -> bool:
    """Whether these can be the bounds of actions, whatever the width of those."""
    try:
        low, high = (np.asarray(bound, np.float64) for bound in bounds)
        return bool(np.isfinite(low).all() and np.isfinite(high).all() and (low < high).all())
    except (TypeError, ValueError):
        return False


def _check_widths(file: Path, part: dict[str, np.ndarray], first: dict[str, np.ndarray]) -> None:
    """Raise a ValueError if what is read of a file does not go with what was read before."""
    for name in {**first, **part}:
        widths = [list(each[name].shape[1:]) if name in each else "none" for each in (first, part)]
        if widths[0] != widths[1]:
            raise ValueError(
                f"{file}: expected {name} of width {widths[0]}, as in what was read before, found {widths[1]}."
            )


def _minari(arrays: ArrayFile) -> tuple[dict[str, Any], list[str]]:
    """The metadata of a Minari data set, and the groups of its episodes in order; nothing of other files."""
    groups = sorted((name for name in arrays.names() if _EPISODE.fullmatch(name)), key=lambda name: int(name[8:]))
    path = arrays.file.with_name(_METADATA)
    prefixes = [f"{group}/" for group in groups]
    if not groups or not path.exists():
        return {}, prefixes
    try:
        metadata = json.loads(read_text(path, "Minari's metadata"))
        expected = metadata["total_episodes"]
    except (json.JSONDecodeError, RecursionError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected Minari's metadata, found something else ({error!r}).") from error
    if expected != len(groups):
        raise ValueError(f"{arrays.file}: expected {expected} episodes, as {_METADATA} says, found {len(groups)}.")
    return metadata, prefixes


def _action_bounds(file: Path, metadata: dict[str, Any]) -> Bounds | None:
    """What the metadata of a Minari data set say of its actions."""
    if not metadata:
        return None
    try:
        space = json.loads(metadata["action_space"])
        if space["type"] != "Box":
            raise ValueError(f"its type is {space['type']}")
        return space["low"], space["high"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{file.with_name(_METADATA)}: expected a Box as action_space, found another ({error})."
        ) from error

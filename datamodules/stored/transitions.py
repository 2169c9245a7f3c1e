"""Data sets of transitions: their form in memory and on disk.

A data set is a flat TensorDict with one row per transition. On disk it is a folder with one `.npy` file per entry and a
`manifest.json` that says what made it. The files are read by memory mapping, so that loading costs one pass for the
checksum and several processes share one copy; nothing is ever unpickled.

Legend: n transitions, E episodes, O observation size, A action size, R reward columns, P physics size.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from components.files import check_file, is_damage, read_json, replacing
from components.structure import COUNT, check_structure

MANIFEST = "manifest.json"
FORMAT = 1
DISCOUNTING = "the next value counts unless terminated; truncated does not stop it"

# file name without its ending -> dtype of the entry; the entry's key is the name split at the dots
_DTYPES = {
    "observation": torch.float32,
    "action": torch.float32,
    "next.observation": torch.float32,
    "next.reward": torch.float32,
    "next.terminated": torch.bool,
    "next.truncated": torch.bool,
    "next.done": torch.bool,
    "next.physics": torch.float64,
    "episode": torch.int64,
    "source": torch.int64,
    "left_out": torch.float32,
}
_RECORD = {"bytes": COUNT, "crc32": str, "dtype": str, "shape": [COUNT]}  # of one file, in the manifest
_OPTIONAL = {"next.physics", "left_out"}
_PER_TRANSITION = {"episode", "source"}  # shape [n]; every other entry is [n, width]
_FLAGS = {"next.terminated", "next.truncated", "next.done"}  # width 1
_UNKNOWN = {"next.physics", "left_out"}  # NaN where nobody knows
_CHUNK = 2**18  # transitions
_SHAPED_LIKE = {"next.observation": "observation", "left_out": "next.reward"}


@dataclass
class TransitionDataset:
    """A data set of transitions and the record of what made it.

    Attributes:
        data: TensorDict of batch size [n] with `observation` float32 [n, O], `action` float32 [n, A],
            `("next", "observation")` float32 [n, O], `("next", "reward")` float32 [n, R] (R is 1 except for files that
            store several rewards), `("next", "terminated" | "truncated" | "done")` bool [n, 1], optionally
            `("next", "physics")` float64 [n, P] (the simulator's state on arrival, from which rewards of other tasks
            are recomputed), `episode` int64 [n] (0, 0, ..., 1, 1, ...: episodes are contiguous and in order),
            `source` int64 [n] (which behaviour the episode came from), and optionally `left_out` float32 [n, R]: the
            reward of the step after, where that ended the episode and is not in the data because nobody knows where it
            led; NaN elsewhere. Without it returns would be short of a reward.
        manifest: what made the data; `domain` is required, None for any; everything must be JSON. `load` adds sizes and
            checksums.

    Raises:
        ValueError: an entry is missing, unknown, or has the wrong type or shape.
    """

    data: TensorDict
    manifest: dict[str, Any]

    def __post_init__(self) -> None:
        if "domain" not in self.manifest:
            raise ValueError("The manifest of a data set must name its domain: expected the key 'domain', found none.")
        _check(self.data)

    def __len__(self) -> int:
        return self.data.batch_size[0]

    @property
    def domain(self) -> str | None:
        return self.manifest["domain"]

    @property
    def observation_dim(self) -> int:
        return self.data["observation"].shape[1]

    @property
    def action_dim(self) -> int:
        return self.data["action"].shape[1]

    @property
    def episodes(self) -> int:
        """The number of episodes, E."""
        return int(self.data["episode"][-1]) + 1

    def episode_lengths(self) -> Tensor:
        """Transitions in each episode, int64 [E]."""
        return torch.bincount(self.data["episode"], minlength=self.episodes)

    def episode_returns(self, reward: Tensor) -> Tensor:
        """Undiscounted return of every episode under a reward of the caller's choice.

        Args:
            reward: [n], or [n, T] for T tasks at once; one value per transition, in the order of the data.

        Returns:
            [E] or [E, T], in the reward's own type, summed in double precision.

        Raises:
            ValueError: the number of rewards is not the number of transitions.
        """
        if reward.shape[0] != len(self):
            raise ValueError(f"Expected one reward for each of {len(self)} transitions, found {reward.shape[0]}.")
        lengths = self.episode_lengths().to(reward.device)
        return torch.segment_reduce(reward.double(), "sum", lengths=lengths, axis=0).to(reward.dtype)

    def stored_returns(self) -> Tensor:
        """Undiscounted return [E, R] of every episode by the stored rewards, those of steps that were left out too."""
        returns = self.episode_returns(self.data["next", "reward"])
        if "left_out" in self.data.keys():  # noqa: SIM118 - not a mapping
            known = self.data["left_out"].isfinite().all(1)
            returns.index_add_(0, self.data["episode"][known], self.data["left_out"][known])
        return returns

    def loose_ends(self) -> int:
        """The number of transitions that led elsewhere than where the next one of the same episode begins."""
        loose = 0
        for rows in torch.arange(len(self)).split(_CHUNK):
            first, last = int(rows[0]), min(int(rows[-1]) + 2, len(self))
            chunk = self.data[first:last]
            same = chunk["episode"][1:] == chunk["episode"][:-1]
            led, began = chunk["next", "observation"][:-1][same], chunk["observation"][1:][same]
            loose += int((~torch.isclose(led, began, rtol=1e-3)).any(1).sum())
        return loose

    def chosen(self, sources: Sequence[str | int] | None, episodes: int | None, seed: int) -> TransitionDataset:
        """The data set of some of the episodes, whole and in their order.

        Args:
            sources: keep episodes of these, by their names in the manifest's `sources` or by number; None for all.
            episodes: keep so many of those, drawn at random; None for all.
            seed: of that draw.

        Raises:
            ValueError: there is no such source, or there are fewer episodes than asked for.
        """
        names = self.manifest.get("sources", [])
        of_episode = torch.zeros(self.episodes, dtype=torch.int64)
        of_episode[self.data["episode"]] = self.data["source"]
        kept = torch.ones(self.episodes, dtype=torch.bool)
        if sources is not None:
            there = of_episode.unique().tolist()
            known = [names[number] if number < len(names) else number for number in there]
            numbers = []
            for source in sources:
                if source not in known and source not in there:
                    words = ", ".join(map(str, known))
                    raise ValueError(f"datamodule.sources: expected some of {words}, found {source}.")
                numbers.append(there[known.index(source)] if source in known else source)
            kept = torch.isin(of_episode, torch.tensor(numbers, dtype=torch.int64))
        if episodes is not None:
            among = kept.nonzero()[:, 0]
            if episodes > len(among):
                raise ValueError(f"datamodule.max_episodes={episodes}: expected at most the {len(among)} there are.")
            drawn = torch.randperm(len(among), generator=torch.Generator().manual_seed(seed))[:episodes]
            kept = torch.zeros_like(kept).index_fill_(0, among[drawn], True)
        data = self.data[kept[self.data["episode"]]]
        data["episode"] = data["episode"].unique_consecutive(return_inverse=True)[1]
        chosen = {"sources": None if sources is None else list(sources), "episodes": episodes, "seed": seed}
        return TransitionDataset(data, {**self.manifest, "chosen": chosen})

    def next_actions(self) -> Tensor:
        """The action after each, [n, A]; NaN after the last of an episode."""
        following, episode = self.data["action"].roll(-1, 0), self.data["episode"]
        following[episode != episode.roll(-1)] = torch.nan
        following[-1] = torch.nan  # of a single episode
        return following

    def last_of_episode(self) -> Tensor:
        """The place of the last transition of each one's episode, int64 [n]."""
        return (self.episode_lengths().cumsum(0) - 1)[self.data["episode"]]

    def rewarded(self, reward: Tensor, of: str) -> TransitionDataset:
        """The data set with other rewards [n, 1], of the words `of`."""
        data = self.data.exclude("left_out")
        data["next", "reward"] = reward
        return TransitionDataset(data, {**self.manifest, "reward": of})

    def save(self, folder: str | Path) -> None:
        """Write the data set to a new folder, which appears at once and whole; see `write_dataset`."""
        write_dataset(folder, [self], self.manifest)

    @classmethod
    def load(cls, folder: str | Path, domain: str | None = None) -> TransitionDataset:
        """Open a saved data set by memory mapping, after checking the size and checksum of every file.

        The tensors may be written to: changes stay in this process and never reach the files.

        Args:
            folder: a folder written by `save`.
            domain: the domain the caller needs, e.g. "humanoid"; None accepts any.

        Raises:
            FileNotFoundError: there is no such folder, or a file in it is missing.
            ValueError: a file is truncated or corrupt, has another shape than the manifest says, or the data set is of
                another domain or format.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: expected the folder of a data set, found nothing there.")
        manifest = _read_manifest(folder / MANIFEST)
        if domain is not None and manifest["domain"] != domain:
            raise ValueError(f"{folder}: expected a data set of domain {domain!r}, found {manifest['domain']!r}.")
        entries = {_key(name): _open_npy(folder / f"{name}.npy", stored) for name, stored in manifest["files"].items()}
        try:
            return cls(_tensordict(entries), manifest)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error


def write_dataset(folder: str | Path, parts: Sequence[TransitionDataset], manifest: dict[str, Any]) -> None:
    """Write the concatenation of data sets as one, atomically, without holding it in memory.

    Episodes are numbered through. The files are written and flushed in a hidden folder beside `folder`, which is then
    renamed: a process killed at any instant leaves either no `folder` or a whole one (and perhaps the hidden
    `.saving-PID.NAME`, which may be deleted).

    Args:
        folder: must not exist yet; its parents are made.
        parts: one or more data sets with the same entries and widths.
        manifest: what made the data, with at least `domain`; sizes and checksums are added.

    Raises:
        FileExistsError: `folder` exists.
        ValueError: the parts do not fit together.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder}: expected no such folder yet, found one; nothing was written.")
    _check_parts(parts)
    with replacing(folder, shared=True) as temporary:
        temporary.mkdir()
        files = {
            name: _write_npy(temporary / f"{name}.npy", _chunks(parts, name))
            for name in _DTYPES
            if _key(name) in parts[0].data.keys(True, True)
        }
        complete = {
            **manifest,
            "format": FORMAT,
            "discounting": DISCOUNTING,
            "transitions": sum(len(part) for part in parts),
            "episodes": sum(part.episodes for part in parts),
            "observation_dim": parts[0].observation_dim,
            "action_dim": parts[0].action_dim,
            "files": files,
        }
        (temporary / MANIFEST).write_text(json.dumps(complete, indent=2, sort_keys=True))


def _key(name: str) -> str | tuple[str, ...]:
    return tuple(name.split(".")) if "." in name else name


def _tensordict(entries: dict[str | tuple[str, ...], Tensor]) -> TensorDict:
    data = TensorDict(batch_size=[len(entries["observation"])] if "observation" in entries else [0])
    for key, value in entries.items():
        if value.shape[0] != data.batch_size[0]:
            raise ValueError(f"entry {key!r}: expected {data.batch_size[0]} transitions, found {value.shape[0]}.")
        data[key] = value
    return data


def _check(data: TensorDict) -> None:
    """Raise a ValueError of one sentence unless `data` has the form that TransitionDataset promises."""
    if len(data.batch_size) != 1 or data.batch_size[0] == 0:
        raise ValueError(f"Expected a batch size of [n] with n > 0 transitions, found {list(data.batch_size)}.")
    n = data.batch_size[0]
    found = {".".join(key) if isinstance(key, tuple) else key for key in data.keys(True, True)}
    if missing := _DTYPES.keys() - _OPTIONAL - found:
        raise ValueError(f"Expected the entry {sorted(missing)[0]!r}, found only {sorted(found)}.")
    if unknown := found - _DTYPES.keys():
        raise ValueError(f"Expected only the entries {sorted(_DTYPES)}, found {sorted(unknown)[0]!r}.")
    for name in found:
        value, dtype = data[_key(name)], _DTYPES[name]
        if not isinstance(value, Tensor) or value.dtype != dtype:
            raise ValueError(f"Entry {name!r}: expected {dtype}, found {getattr(value, 'dtype', type(value))}.")
        if name in _PER_TRANSITION:
            wanted = f"[{n}]" if value.shape != (n,) else None
        elif name in _FLAGS:
            wanted = f"[{n}, 1]" if value.shape != (n, 1) else None
        elif name in _SHAPED_LIKE:
            shape = data[_key(_SHAPED_LIKE[name])].shape
            wanted = str(list(shape)) if value.shape != shape else None
        else:
            wanted = f"[{n}, width]" if value.ndim != 2 or value.shape[1] == 0 else None
        if wanted:
            raise ValueError(f"Entry {name!r}: expected shape {wanted}, found {list(value.shape)}.")
        # A sum is cheap, and finite unless something in it is not, or it is too large itself.
        if value.is_floating_point() and name not in _UNKNOWN and not value.sum().isfinite():
            for row in (~value.isfinite().all(1)).nonzero()[:1].flatten().tolist():
                raise ValueError(f"Entry {name!r}, row {row}: expected finite numbers, found {value[row].tolist()}.")
    episode = data["episode"]
    steps = episode.diff()
    if episode[0] != 0 or ((steps != 0) & (steps != 1)).any():
        raise ValueError("Entry 'episode': expected indices that start at 0 and grow by 0 or 1, found others.")


def _check_parts(parts: Sequence[TransitionDataset]) -> None:
    if not parts:
        raise ValueError("Expected at least one part to write, found none.")
    for key, value in parts[0].data.items(True, True):
        for part in parts[1:]:
            if key not in part.data.keys(True, True) or part.data[key].shape[1:] != value.shape[1:]:
                other = part.data.get(key, None)
                found = "none" if other is None else f"width {list(other.shape[1:])}"
                raise ValueError(f"Entry {key!r}: expected width {list(value.shape[1:])} in every part, found {found}.")
    if any(set(part.data.keys(True, True)) != set(parts[0].data.keys(True, True)) for part in parts):
        raise ValueError("Expected the same entries in every part, found some that only a later part has.")


def _chunks(parts: Sequence[TransitionDataset], name: str) -> list[np.ndarray]:
    chunks, first_episode = [], 0
    for part in parts:
        value = part.data[_key(name)]
        chunks.append((value + first_episode if name == "episode" else value).detach().cpu().contiguous().numpy())
        first_episode += part.episodes
    return chunks


def _write_npy(path: Path, chunks: list[np.ndarray]) -> dict[str, Any]:
    """Write chunks, joined along their first dimension, as one .npy file; returns its record for the manifest."""
    shape = (sum(len(chunk) for chunk in chunks), *chunks[0].shape[1:])
    header = {"descr": np.lib.format.dtype_to_descr(chunks[0].dtype), "fortran_order": False, "shape": shape}
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for chunk in chunks:
            file.write(chunk.data.cast("B"))
        size = file.tell()
    return {"shape": list(shape), "dtype": str(chunks[0].dtype), "bytes": size, "crc32": _crc32(chunks)}


def _open_npy(path: Path, stored: dict[str, Any]) -> Tensor:
    check_file(path, f"a file of {stored['bytes']} bytes")
    size = path.stat().st_size
    if size != stored["bytes"]:
        raise ValueError(f"{path}: expected {stored['bytes']} bytes, found {size}; the file is truncated or altered.")
    try:
        array = np.load(path, mmap_mode="c", allow_pickle=False)
    except Exception as error:  # a damaged header makes NumPy raise whatever it comes upon
        if not is_damage(error):
            raise
        raise ValueError(f"{path}: expected an array in .npy format, found something else ({error}).") from error
    if list(array.shape) != stored["shape"] or str(array.dtype) != stored["dtype"] or not array.flags.c_contiguous:
        raise ValueError(
            f"{path}: expected {stored['dtype']} {stored['shape']} as in {MANIFEST}, "
            f"found {array.dtype} {list(array.shape)}."
        )
    # summed through the mapping, which also spares random access the page faults later
    checksum = _crc32([array])
    if checksum != stored["crc32"]:
        raise ValueError(f"{path}: expected checksum {stored['crc32']}, found {checksum}; the file is corrupt.")
    return torch.from_numpy(array)


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest = read_json(path, {"format": int}, "the manifest of a data set")
    if manifest["format"] != FORMAT:
        found = manifest["format"]
        raise ValueError(f"{path}: expected the manifest of a data set of format {FORMAT}, found format {found}.")
    check_structure(manifest, {"domain": (str, None), "files": {str: _RECORD}}, str(path))
    if unknown := manifest["files"].keys() - _DTYPES.keys():  # before names become paths
        raise ValueError(f"{path}: expected records of the files {sorted(_DTYPES)}, found {sorted(unknown)[0]!r}.")
    return manifest


def _crc32(chunks: list[np.ndarray]) -> str:
    value = 0
    for chunk in chunks:
        value = zlib.crc32(chunk.data.cast("B"), value)
    return f"{value:08x}"

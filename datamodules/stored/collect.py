"""Collecting a data set through TorchRL collectors so that an interrupted collection goes on where it stopped.

A data set is the concatenation of numbered shards, each made from (seed, number) alone. Whatever kills the process, and
whenever, the next call makes the shards that are missing, and the finished files are the same, byte for byte, as those
of a collection that was never interrupted (on the same machine with the same versions).

Legend: rows are environments stepped together, steps their common length.
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.collectors import Collector
from torchrl.envs import EnvBase
from tqdm import tqdm

from components.files import locking
from components.wording import counted
from datamodules.stored.transitions import TransitionDataset, write_dataset

_BATCH_STEPS = 100  # steps between two looks at the progress
_LINE_SECONDS = 10.0
_PACKAGES = ("torch", "torchrl", "tensordict", "numpy", "mujoco", "dm_control")


@dataclass(frozen=True)
class Shard:
    """What one shard is collected from.

    Attributes:
        env: environment of batch size [rows] with `observation` and, if rewards are to be recomputed, `physics`.
        policy: a TensorDictModule, or any function that writes `action` into the TensorDict it is given.
        steps: environment steps of every row.
        source: int64 [rows], which behaviour drives each row.
        keep: takes the collected TensorDict [rows, steps] and returns a bool mask [rows, steps] of the transitions to
            keep; None keeps all.
    """

    env: EnvBase
    policy: Callable[[TensorDictBase], TensorDictBase]
    steps: int
    source: Tensor
    keep: Callable[[TensorDictBase], Tensor] | None = None


def dataset_folder(root: str | Path, name: str, recipe: Mapping[str, Any]) -> Path:
    """`root/NAME-HASH`: another recipe is another folder, so that no data set is ever taken for another.

    Raises:
        ValueError: the name is a path, out of `root`.
    """
    if Path(name).name != name:
        raise ValueError(f"{name}: expected the name of a data set, found a path.")
    return Path(root) / f"{name}-{hashlib.sha256(_canonical(recipe).encode()).hexdigest()[:8]}"


def collect_dataset(
    root: str | Path,
    name: str,
    recipe: Mapping[str, Any],
    make_shard: Callable[[int, int], Shard],
    *,
    expected_seconds: float,
) -> TransitionDataset:
    """Load the data set of a recipe, collecting first what is missing of it.

    Finished shards lie in `root/NAME-HASH.partial` until the data set is complete. Processes that want the same data
    set (a sweep, the ranks of one run) wait for the first and then load what it made; this rests on a file lock, and
    where a network file system has none, one process is to make it before the others start.

    An episode of the data set is an unbroken run of kept transitions of one row, without a reset inside. Its last
    transition is marked truncated unless it terminated.

    Args:
        root: where data sets are stored.
        name: name of the data set, e.g. "humanoid-balance".
        recipe: everything that decides what the data are, as JSON: `domain`, `seed`, `shards` (how many) and whatever
            parameters `make_shard` depends on. It becomes part of the folder's name and of the manifest.
        make_shard: called with the shard's number and a seed derived from it; must depend on nothing else. The
            environment's seed and PyTorch's global random state are set for it, and restored afterwards.
        expected_seconds: how long the whole collection should take, for the line printed before it starts.

    Raises:
        ValueError: the recipe lacks a key; a shard has a wrong shape, numbers that are not finite, or keeps nothing;
            the stored data set is damaged or of another recipe.
    """
    if missing := {"domain", "seed", "shards"} - recipe.keys():
        raise ValueError(f"Expected the key {sorted(missing)[0]!r} in the recipe of {name}, found {sorted(recipe)}.")
    recipe = json.loads(_canonical(recipe))
    folder = dataset_folder(root, name, recipe)
    partial = folder.with_name(f"{folder.name}.partial")
    if not folder.exists() or partial.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with making(folder):
            if not folder.exists():
                _collect(folder, partial, recipe, make_shard, expected_seconds)
            shutil.rmtree(partial, ignore_errors=True)
    return _load(folder, recipe)


@contextmanager
def making(folder: Path) -> Iterator[None]:
    """Hold the lock of a data set's folder, waiting for it if need be; the system releases it if the process dies.

    What killed processes left of it is deleted.
    """

    def taken() -> None:
        print(f"Waiting for another process that is making {folder}.", flush=True)

    with locking(folder.with_name(f".{folder.name}.lock"), taken):
        for leftover in folder.parent.glob(f".saving-*.{glob.escape(folder.name)}"):
            shutil.rmtree(leftover)
        yield


def _collect(
    folder: Path,
    partial: Path,
    recipe: Mapping[str, Any],
    make_shard: Callable[[int, int], Shard],
    expected_seconds: float,
) -> None:
    partial.mkdir(exist_ok=True)
    for leftover in partial.glob(".saving-*"):
        shutil.rmtree(leftover)  # of a killed process: under the lock nobody else is writing
    shards = [partial / f"shard-{number:05d}" for number in range(recipe["shards"])]
    missing = [number for number, shard in enumerate(shards) if not shard.exists()]
    found = len(shards) - len(missing)
    already = f", {found} of them are there already" if found else ""
    print(
        f"Collecting {folder.name}: {counted(len(shards), 'shard')} into {folder}{already}; "
        f"about {_duration(expected_seconds * len(missing) / len(shards))}.",
        flush=True,
    )
    with _Progress(folder.name, len(shards), found) as progress:
        for number in missing:
            seed = int(np.random.SeedSequence([recipe["seed"], number]).generate_state(1)[0] >> 1)
            with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
                torch.manual_seed(seed)
                shard = make_shard(number, seed)
                shard.env.set_seed(seed)
                collected = _run(shard, progress)
            data = _transitions(collected, shard, f"Shard {number} of {folder.name}")
            manifest = {"domain": recipe["domain"], "made_by": "collect", "recipe": recipe, "versions": _versions()}
            TransitionDataset(data, manifest).save(shards[number])
    parts = [_load(shard, recipe) for shard in shards]
    # a collection may have been continued after an update
    versions = sorted({json.dumps(part.manifest["versions"], sort_keys=True) for part in parts})
    write_dataset(
        folder,
        parts,
        {
            "domain": recipe["domain"],
            "made_by": "collect",
            "recipe": recipe,
            "versions": [json.loads(text) for text in versions],
        },
    )


def _run(shard: Shard, progress: _Progress) -> TensorDict:
    """Step the shard's environment through a collector; returns what it gave, [rows, steps], on the CPU."""
    if len(shard.env.batch_size) != 1:
        raise ValueError(f"Expected an environment of batch size [rows], found {list(shard.env.batch_size)}.")
    rows = shard.env.batch_size[0]
    if shard.source.shape != (rows,):
        raise ValueError(f"Expected one source for each of {rows} rows, found shape {list(shard.source.shape)}.")
    batches = math.ceil(shard.steps / _BATCH_STEPS)
    batch_steps = math.ceil(shard.steps / batches)
    collector = Collector(
        shard.env,
        shard.policy,
        frames_per_batch=rows * batch_steps,
        total_frames=rows * batch_steps * batches,
        storing_device="cpu",
        track_traj_ids=False,
        auto_register_policy_transforms=False,
    )
    collected = []
    try:
        for batch in collector:
            collected.append(batch)
            progress.advance(1 / batches, rows * batch_steps)
    finally:
        collector.shutdown()
    return torch.cat(collected, dim=1)[:, : shard.steps]


def _transitions(collected: TensorDictBase, shard: Shard, what: str) -> TensorDict:
    """Flatten [rows, steps] to the kept transitions [n], row after row, and number their episodes."""
    rows, steps = collected.batch_size
    kept = torch.ones(rows, steps, dtype=torch.bool) if shard.keep is None else shard.keep(collected)
    if kept.dtype != torch.bool or kept.shape != (rows, steps):
        raise ValueError(f"{what}: expected a bool mask [{rows}, {steps}], found {kept.dtype} {list(kept.shape)}.")
    if not kept.any():
        raise ValueError(f"{what}: expected transitions to keep, found none.")
    done = collected["next", "done"].reshape(rows, steps)
    terminated = collected["next", "terminated"].reshape(rows, steps)
    never = torch.zeros(rows, 1, dtype=torch.bool)
    follows = kept[:, :-1] & kept[:, 1:] & ~done[:, :-1]  # transition t + 1 continues the episode of t
    first = kept & ~torch.cat([never, follows], dim=1)
    last = kept & ~torch.cat([follows, never], dim=1)
    truncated = (collected.get(("next", "truncated"), done & ~terminated)).reshape(rows, steps) | (last & ~terminated)
    data = TensorDict(
        {
            "observation": collected["observation"][kept].float(),
            "action": collected["action"][kept].float(),
            "next": {
                "observation": collected["next", "observation"][kept].float(),
                "reward": collected["next", "reward"][kept].float(),
                "terminated": terminated[kept][:, None],
                "truncated": truncated[kept][:, None],
                "done": (terminated | truncated)[kept][:, None],
            },
            "episode": first[kept].cumsum(0) - 1,
            "source": shard.source.to("cpu", torch.int64)[:, None].expand(rows, steps)[kept],
        },
        batch_size=[int(kept.sum())],
    )
    if ("next", "physics") in collected.keys(True):
        data["next", "physics"] = collected["next", "physics"][kept].double()
    for key, value in data.items(True, True):
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"{what}: expected finite numbers in {key!r}, found NaN or infinity.")
    return data


def _load(folder: Path, recipe: Mapping[str, Any]) -> TransitionDataset:
    data = TransitionDataset.load(folder, recipe["domain"])
    if data.manifest.get("recipe") != recipe:
        raise ValueError(
            f"{folder}: expected a data set of the recipe {_canonical(recipe)}, "
            f"found {_canonical(data.manifest.get('recipe'))}."
        )
    return data


def _canonical(recipe: Any) -> str:
    return json.dumps(recipe, sort_keys=True, allow_nan=False)


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


class _Progress:
    """A bar on a terminal, otherwise a line every ten seconds."""

    def __init__(self, name: str, shards: int, done: int) -> None:
        self.name, self.shards, self.first, self.done = name, shards, done, float(done)
        self.transitions = 0
        self.started = self.printed = time.monotonic()
        self.bar = tqdm(
            desc=f"Collecting {name}",
            total=shards,
            initial=done,
            disable=not sys.stderr.isatty(),
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed} elapsed, {remaining} left{postfix}",
        )

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def advance(self, shards: float, transitions: int) -> None:
        self.done += shards
        self.transitions += transitions
        now = time.monotonic()
        speed = self.transitions / max(now - self.started, 1e-9)
        self.bar.set_postfix_str(f"{speed:,.0f} steps/s", refresh=False)
        self.bar.update(shards)
        if self.bar.disable and now - self.printed >= _LINE_SECONDS:
            self.printed = now
            left = (now - self.started) * (self.shards - self.done) / (self.done - self.first)
            print(
                f"Collecting {self.name}: {self.done:.1f} of {self.shards} shards, {speed:,.0f} steps/s, "
                f"about {_duration(left)} left.",
                flush=True,
            )


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"

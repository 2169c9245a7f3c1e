"""Data sets in files, published ones and a user's own: read once, and kept in a form that opens fast.

The first use of a copy reads it whole and writes it as a `TransitionDataset` below `root`; later uses, and the other
processes of a run, map that. Another copy, or a changed one, is another folder.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from components.buildable import buildable
from components.checks import Count, CountOrZero, NonNegative, Number, checked
from components.files import check_file
from components.wording import size
from datamodules.stored.collect import dataset_folder, making
from datamodules.stored.own_files import Bounds, own_files, own_metadata, read_own
from datamodules.stored.readers import exorl_files, read_d4rl, read_exorl, read_mood, read_ogbench
from datamodules.stored.transitions import TransitionDataset

_BYTES_PER_SECOND = 100e6  # what reading, converting and writing manages at least
_FILES_PER_SECOND = 300  # .npz files, whose decompression is not counted in bytes


@buildable(writes="root")
@checked
def exorl_dataset(root: str, folder: str, domain: str, max_episodes: Count = 5000) -> TransitionDataset:
    """The ExORL episodes in a folder.

    Args:
        root: where the converted data set is kept.
        folder: of the `*.npz` files.
        domain: such as ``walker``.
        max_episodes: the first so many files, in sorted order, are read.

    Raises:
        FileNotFoundError: there are no episodes.
        ValueError: see `read_exorl`.
    """
    files = exorl_files(folder, max_episodes)
    if not files:
        raise FileNotFoundError(
            f"datamodule.dataset.folder={folder}: expected ExORL's episodes of {domain} (*.npz), found none; they are "
            f"in buffer/ of https://dl.fbaipublicfiles.com/exorl/{domain}/rnd.zip, whose 10,000 episodes take 1 "
            "(point_mass_maze) to 8 GB (quadruped)."
        )
    settings = {"domain": domain, "max_episodes": max_episodes}
    return _kept(root, f"exorl-{domain}", files, settings, lambda: read_exorl(folder, domain, max_episodes))


@buildable(writes="root")
def mood_dataset(root: str, file: str) -> TransitionDataset:
    """A MOOD mixture, an HDF5 file named `MIXTURE__DOMAIN_TASK.hdf5`.

    Args:
        root: where the converted data set is kept.
        file: the mixture.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: see `read_mood`.
    """
    check_file(
        Path(file),
        "a MOOD mixture (MIXTURE__DOMAIN_TASK.hdf5 with physics, 0.8 GB; its authors, arXiv 2403.13097, "
        "https://github.com/facebookresearch/offline_rl, publish no download: ask them, or record your own agents)",
        "datamodule.dataset.file",
    )
    return _kept(root, Path(file).stem, [Path(file)], {}, lambda: read_mood(file))


@buildable(writes="root")
def d4rl_dataset(root: str, folder: str, name: str) -> TransitionDataset:
    """A D4RL locomotion data set.

    Args:
        root: where the converted data set is kept.
        folder: of the HDF5 files.
        name: D4RL's own, such as ``hopper-medium-replay-v2``, which lies in `hopper_medium_replay-v2.hdf5`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: see `read_d4rl`.
    """
    stem, _, version = name.rpartition("-v")
    file = Path(folder) / f"{stem.replace('-', '_')}-v{version}.hdf5"
    if not file.is_file():
        raise FileNotFoundError(
            f"datamodule.dataset.folder={folder}: expected {file.name} in it for datamodule.dataset.name={name}, found "
            f"none; it is at http://rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco_v{version}/{file.name}, some "
            "100 to 600 MB."
        )
    return _kept(root, f"d4rl-{name}", [file], {"version": 2}, lambda: read_d4rl(file))


@buildable(writes="root")
@checked
def ogbench_dataset(
    root: str,
    file: str,
    goal: Sequence[Number] | None = None,
    first: CountOrZero = 0,
    tolerance: NonNegative = 0.5,
) -> TransitionDataset:
    """An OGBench data set of vectors.

    Args:
        root: where the converted data set is kept.
        file: such as `antmaze-large-navigate-v0.npz`.
        goal, first, tolerance: see `read_ogbench`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: see `read_ogbench`.
    """
    path = Path(file)
    check_file(
        path,
        "a file of OGBench (arXiv 2410.20092, https://rail.eecs.berkeley.edu/datasets/ogbench), 10 MB to 2 GB",
        "datamodule.dataset.file",
    )
    goal = None if goal is None else list(goal)
    settings = {"goal": goal, "first": first, "tolerance": tolerance}
    return _kept(root, path.stem, [path], settings, lambda: read_ogbench(path, **settings))


@buildable(writes="root")
@checked
def own_dataset(root: str, path: str, action_range: Bounds | None = None) -> TransitionDataset:
    """Data of one's own.

    Args:
        root: where the converted data set is kept.
        path, action_range: see `read_own`.

    Raises:
        FileNotFoundError, ValueError: see `read_own`.
    """
    files = own_files(path)
    for file in files:
        check_file(file, "a file of transitions", "path")
    settings = {"action_range": action_range}
    files += own_metadata(files)
    return _kept(root, f"own-{Path(path).stem}", files, settings, lambda: read_own(path, action_range))


def _kept(
    root: str,
    name: str,
    files: Sequence[Path],
    settings: dict[str, Any],
    read: Callable[[], TransitionDataset],
) -> TransitionDataset:
    """What `read` makes of the files, from `root/NAME-HASH` if it was read before."""
    stats = [file.stat() for file in files]
    found = [[file.name, stat.st_size, stat.st_mtime_ns] for file, stat in zip(files, stats)]
    # the version is to be raised when the same files are read in another way
    folder = dataset_folder(root, name, {"version": 1, **settings, "files": found})
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with making(folder):
            if not folder.is_dir():
                total = sum(stat.st_size for stat in stats)
                seconds = max(1, round(total / _BYTES_PER_SECOND + len(files) / _FILES_PER_SECOND))
                what = files[0].name if len(files) == 1 else f"{len(files)} files"
                print(
                    f"Reading {what} ({size(total)}) in {files[0].parent}, to be kept in {folder}; about {seconds} s.",
                    flush=True,
                )
                read().save(folder)
    return TransitionDataset.load(folder)

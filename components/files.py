"""Files and folders: read with a sentence for what is wrong with one, and written either whole or not at all."""

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from components.structure import check_structure

OUT_OF_MEMORY = re.compile(r"(tried|unable) to allocate [\d.]+ \w+", re.IGNORECASE)
"""What errors of torch and NumPy say where memory is not enough; those of torch are of no type of their own."""


def check_file(path: Path, expected: str, key: str | None = None) -> None:
    """Raise a FileNotFoundError unless there is an ordinary file: not a folder, or a pipe, which would be waited for.

    Args:
        expected: what it should be, and where to get it, as in "a file of questions from https://...".
        key: of the configuration, which names the file.
    """
    if path.is_file():
        return
    if path.is_dir():
        found = "a folder"
    elif path.is_symlink():
        found = "a link that leads to no file"
    else:
        found = "something else" if path.exists() else "none"
    raise FileNotFoundError(f"{'' if key is None else f'{key}='}{path}: expected {expected}, found {found}.")


def visible_files(folder: Path, pattern: str) -> list[Path]:
    """Files below a folder that match, in sorted order.

    Hidden ones, such as `._data.npz` of a Mac, and those in hidden folders, as `.ipynb_checkpoints`, are nobody's data.
    """
    found = sorted(folder.glob(pattern))
    return [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def read_text(path: Path, expected: str) -> str:
    """The text of a file in UTF-8.

    Args:
        expected: see `check_file`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is in another encoding.
    """
    check_file(path, expected)
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text in UTF-8, found something else ({error}).") from error


def read_json(path: Path, structure: Any, expected: str = "a file of JSON") -> Any:
    """What a file of JSON holds.

    Args:
        structure: see `components.structure.check_structure`.
        expected: see `check_file`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else; names the part.
    """
    try:
        content = json.loads(read_text(path, expected))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, found something else ({error}).") from error
    check_structure(content, structure, str(path))
    return content


@contextmanager
def replacing(path: str | Path, *, shared: bool = False) -> Iterator[Path]:
    """Where to write a file or a folder, which takes the place of `path` once it is whole and on the disk.

    A kill at any instant, a full disk or any other error leaves what was there before, and no half of what was to
    come; what a killed process left goes when the same is written next, unless it was `shared`.

    Args:
        path: its folder is made if need be. A folder takes the place of nothing or of an empty one only.
        shared: other processes may write the same at this time; each of them has a place of its own then.

    Raises:
        OSError: the system refused something; `filename` is `path`, or a folder that could not be made.
    """
    path = Path(path)
    temporary = path.with_name(f".saving{f'-{os.getpid()}' * shared}.{path.name}")
    with naming(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove(temporary)
            yield temporary
            _flush(temporary)
            os.replace(temporary, path)
            _flush_one(path.parent)
        except BaseException as error:
            with suppress(OSError):
                _remove(temporary)
            if isinstance(error, OSError) and str(error.filename).startswith(str(temporary)):
                error.filename = str(path)  # the one that is known to others
            raise


@contextmanager
def locking(path: str | Path, taken: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of a file, which is made if need be; the system releases it if the process dies.

    On a file system without locks nothing is held.

    Args:
        taken: called where another process holds it, before that is waited for; may raise instead.

    Raises:
        OSError: the file can't be made, or is a link, which is not followed.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            taken()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Have errors of the system say which file they are about, and be what they are whatever a library made of them."""
    try:
        yield
    except Exception as error:
        system = _system_error(error)
        if system is None or system.filename is not None:
            raise
        raise OSError(system.errno, system.strerror, str(path)) from error


def is_damage(error: Exception) -> bool:
    """Whether what a library raised over a file tells of the file, and not of memory or of what the system refused."""
    if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)):
        return False
    system = _system_error(error)
    # Where a damaged file has a library look for a place before its beginning, the system calls that invalid.
    return system is None or system.errno in (0, errno.EINVAL)


def _system_error(error: Exception) -> OSError | None:
    """The error of the system that an error is or comes from: most libraries have an OSError of it, but not all."""
    if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):  # torch
        error = error.__context__
    if isinstance(error, OSError):
        return None if error.errno is None else error
    found = re.search(r"\(os error (\d+)\)$", str(error))  # what is written in Rust, such as safetensors
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else None


def reserve(folder: str | Path) -> None:
    """Give all files in a folder the room on the disk that their sizes promise.

    A file that is mapped into memory has none at first: where the disk is full when a page is written, the system ends
    the process without a word.

    Raises:
        ValueError: the disk has not enough; says how many bytes are needed and how many are free.
    """
    files = [(path, path.stat()) for path in Path(folder).rglob("*") if path.is_file()]
    needed = sum(max(0, found.st_size - 512 * found.st_blocks) for _, found in files)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(f"{folder}: expected {needed} bytes of free space for what is to be stored, found {free}.")
    if not hasattr(os, "posix_fallocate"):  # to have looked is all that can be done
        return
    for path, found in files:
        if not found.st_size:
            continue
        with naming(path), open(path, "r+b") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, found.st_size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # of a file system that can't
                    raise


def _flush(path: Path) -> None:
    for part in (*path.rglob("*"), path):
        _flush_one(part)


def _flush_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

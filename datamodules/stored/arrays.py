"""Arrays of numbers in .npz and HDF5 files that anybody may have written.

What a file claims is compared with its size before anything is allocated, nothing is unpickled, and whatever a library
raises over a damaged file is one sentence. Conversions are checked: a number that does not fit is never made another.
"""

import math
import os
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import h5py
import numpy as np

from components.files import check_file, is_damage

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_LARGEST_RATIO = 1100  # deflate, by which both formats are packed, makes at most 1,032 bytes of one
_SMALL = 2**20  # bytes
_MEMORY = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
_LONGEST_REASON = 120
_LISTED = 12  # names in an error


class ArrayFile(ABC):
    """The arrays of numbers in a file, by key; a context manager.

    Args:
        file: is opened and left open.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: here and in all methods: the file is damaged.
    """

    kind: str
    free_claim = _SMALL
    """Bytes that an array may claim whatever the file has of it."""

    def __init__(self, file: Path) -> None:
        self.file = file
        check_file(file, f"an {self.kind} file")
        with self._library():
            self._open()

    def __enter__(self) -> "ArrayFile":
        return self

    def __exit__(self, *_: object) -> None:
        with self._library():
            self._close()

    @abstractmethod
    def names(self, group: str = "") -> list[str]:
        """Names of what is in the file or in a group of it; of groups, not of what is in them."""

    def listed(self, group: str = "") -> str:
        """The first names, for a sentence."""
        names = self.names(group)
        return ", ".join([*names[:_LISTED], *(["..."] if len(names) > _LISTED else [])]) or "none"

    @abstractmethod
    def __contains__(self, key: str) -> bool: ...

    def shape(self, key: str, *dimensions: int) -> tuple[int, ...]:
        """The shape of an array of numbers, [rows] or [rows, width, ...], none of which is 0.

        Args:
            dimensions: how many are expected, one of these.

        Raises:
            ValueError: there is no such array, or another.
        """
        if key not in self:
            there = self.listed(key.rpartition("/")[0])
            raise ValueError(f"{self.file}: expected the array {key!r}, found only {there}.")
        with self._library():
            shape, dtype, packed = self._describe(key)
        if len(shape) not in dimensions or dtype.kind not in "fiub" or 0 in shape:
            sizes = ("rows", "width", "depth")
            expected = " or ".join(f"[{', '.join(sizes[:count])}]" for count in dimensions)
            raise ValueError(
                f"{self.file}: expected {key} to be numbers {expected}, none of them 0, found {dtype} {list(shape)}."
            )
        claimed = math.prod(shape) * dtype.itemsize
        if claimed > _LARGEST_RATIO * min(packed, os.path.getsize(self.file)) + self.free_claim:
            raise self._damaged(f"{key} would have {claimed:.2g} bytes and has {packed}")
        return shape

    def read(self, key: str, *dimensions: int, rows: slice = slice(None)) -> np.ndarray:
        """An array, or some of its rows, after the checks of `shape`."""
        self.shape(key, *dimensions)
        with self._library():
            return self._read(key, rows)

    @contextmanager
    def _library(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a damaged file makes libraries raise whatever they come upon
            if not is_damage(error):
                raise
            reason = next(iter(str(error).splitlines()), "")[:_LONGEST_REASON] or type(error).__name__
            raise self._damaged(reason) from error

    def _damaged(self, reason: str) -> ValueError:
        return ValueError(f"{self.file}: expected a complete {self.kind} file, found a damaged one ({reason}).")

    @abstractmethod
    def _open(self) -> None: ...

    @abstractmethod
    def _close(self) -> None: ...

    @abstractmethod
    def _describe(self, key: str) -> tuple[tuple[int, ...], np.dtype, int]:
        """Shape, type, and the bytes that hold it in the file."""

    @abstractmethod
    def _read(self, key: str, rows: slice) -> np.ndarray: ...


class NpzFile(ArrayFile):
    """Arrays as `numpy.savez` and `savez_compressed` write them."""

    kind = ".npz"

    def _open(self) -> None:
        self._archive = zipfile.ZipFile(self.file)
        self._members = {info.filename.removesuffix(".npy"): info for info in self._archive.infolist()}
        self._layouts: dict[str, tuple[int, np.dtype, tuple[int, ...], Literal["C", "F"]]] = {}

    def _close(self) -> None:
        self._archive.close()

    def names(self, group: str = "") -> list[str]:
        return sorted(self._members)

    def __contains__(self, key: str) -> bool:
        return key in self._members

    def _describe(self, key: str) -> tuple[tuple[int, ...], np.dtype, int]:
        member = self._members[key]
        with self._archive.open(member) as stream:
            shape, in_columns, dtype = _HEADERS[np.lib.format.read_magic(stream)](stream)
            begin = stream.tell()
        size = begin + math.prod(shape) * dtype.itemsize
        if dtype.kind != "O" and (size != member.file_size or min(shape, default=0) < 0):
            raise ValueError(f"{key} would have {size} bytes and has {member.file_size}")
        self._layouts[key] = begin, dtype, shape, "F" if in_columns else "C"
        return shape, dtype, member.compress_size

    def _read(self, key: str, rows: slice) -> np.ndarray:
        begin, dtype, shape, order = self._layouts[key]  # to read a header takes longer than a short array
        content = self._archive.read(self._members[key])
        return np.frombuffer(content, dtype, offset=begin).reshape(shape, order=order)[rows]


class Hdf5File(ArrayFile):
    """Arrays of an HDF5 file; keys of those in groups are paths, as in `infos/qpos`."""

    kind = "HDF5"
    free_claim = _MEMORY  # what was never written has no place in a file, and all the same its fill value

    def _open(self) -> None:
        self._h5 = h5py.File(self.file, "r")

    def _close(self) -> None:
        self._h5.close()

    def names(self, group: str = "") -> list[str]:
        with self._library():
            return sorted(self._find(group) if group and self.is_group(group) else self._h5)

    def __contains__(self, key: str) -> bool:
        with self._library():
            return isinstance(self._find(key), h5py.Dataset)

    def is_group(self, key: str) -> bool:
        """Whether there are arrays below `key`."""
        with self._library():
            return isinstance(self._find(key), h5py.Group)

    def _find(self, key: str) -> h5py.Dataset | h5py.Group | None:
        """What a key means; links are not followed, for they may lead to another file, or to one that has no end."""
        found = self._h5
        for name in key.split("/"):
            if not isinstance(found, h5py.Group) or not found.id.links.exists(name.encode()):
                return None
            if found.id.links.get_info(name.encode()).type != h5py.h5l.TYPE_HARD:
                raise ValueError(f"{key} is a link")
            found = found[name]
        return found

    def _describe(self, key: str) -> tuple[tuple[int, ...], np.dtype, int]:
        array = self._find(key)
        if array.is_virtual or array.external:
            raise ValueError(f"{key} is in another file")
        return array.shape or (), array.dtype, array.id.get_storage_size()

    def _read(self, key: str, rows: slice) -> np.ndarray:
        return self._find(key)[rows]


def to_float(
    file: Path, key: str, values: np.ndarray, dtype: type[np.floating] = np.float32, *, whole: bool = True
) -> np.ndarray:
    """Numbers in another precision.

    Args:
        whole: whether these are all rows of the file, so that one of them can be named.

    Raises:
        ValueError: they are not finite, or not any more.
    """
    with np.errstate(over="ignore"):
        converted = values.astype(dtype, copy=False)
    if not (finite := np.isfinite(converted)).all():
        found = values[~finite][0]
        row = f" in row {np.argwhere(~finite)[0][0]}" if whole else ""
        if np.isfinite(found):
            raise ValueError(
                f"{file}: expected numbers of at most {np.finfo(dtype).max:.2g} in {key}, found {found:g}{row}."
            )
        raise ValueError(f"{file}: expected finite numbers in {key}, found {found}{row}.")
    return converted


def to_flags(file: Path, key: str, values: np.ndarray) -> np.ndarray:
    """0 and 1 as bool.

    Raises:
        ValueError: there are others.
    """
    if values.dtype != bool and (others := (values != 0) & (values != 1)).any():
        raise ValueError(f"{file}: expected only 0 and 1 in {key}, found {values[others][0]:g}.")
    return values.astype(bool, copy=False)


def to_int64(file: Path, key: str, values: np.ndarray) -> np.ndarray:
    """Whole numbers.

    Raises:
        ValueError: there are others, or larger ones.
    """
    fits = values == np.trunc(values) if values.dtype.kind == "f" else np.ones(values.shape, bool)
    if values.dtype.kind in "fu":
        fits &= np.abs(values) < 2**63
    if not fits.all():
        raise ValueError(f"{file}: expected whole numbers of 64 bits in {key}, found {values[~fits][0]:g}.")
    return values.astype(np.int64, copy=False)

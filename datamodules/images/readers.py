"""Labelled images, from files as they are published and from scikit-learn.

Dimensions: n images, C channels, H height and width.
"""

import gzip
import io
import itertools
import math
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from components.buildable import buildable
from components.checks import Count, checked
from components.files import check_file, is_damage

_FASHION_SIZE = (28, 28)
_PIECE = 2**20  # bytes decompressed at once


class LabelledImages(NamedTuple):
    """Images [n, C, H, H] uint8 and their labels [n] int64, for training and for tests."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@buildable()
@checked
def digits(per_class: Count = 130) -> LabelledImages:
    """Scikit-learn's 1,797 digits of 8 x 8 pixels; the first `per_class` of each are for training, the rest for tests.

    Raises:
        ValueError: scikit-learn is not there, or a class would be left without a test.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError('digits: expected scikit-learn (pip install "tenfold[images]"), found none.') from error
    loaded = load_digits()
    images = torch.from_numpy((loaded.images * (255 / 16)).round().astype(np.uint8))[:, None]
    labels = torch.from_numpy(loaded.target).long()
    smallest = int(labels.bincount().min())
    if not 1 <= per_class < smallest:
        raise ValueError(f"per_class={per_class}: expected from 1 to {smallest - 1}, the smallest class but one image.")
    place = torch.zeros_like(labels)
    for label in range(10):
        place[labels == label] = torch.arange(int((labels == label).sum()))
    train = place < per_class
    return LabelledImages(images[train], labels[train], images[~train], labels[~train])


@buildable()
def fashion_mnist(folder: str = "/usr/share/datasets/fashion-mnist") -> LabelledImages:
    """Fashion-MNIST from its four gzipped IDX files: 60,000 and 10,000 images of 28 x 28 pixels.

    Args:
        folder: where they are; that of Debian's package `dataset-fashion-mnist` by itself.

    Raises:
        FileNotFoundError, ValueError: a file is missing or damaged.
    """
    parts = []
    for which in ("train", "t10k"):
        images = _read_idx(Path(folder) / f"{which}-images-idx3-ubyte.gz", 3)
        labels = _read_idx(Path(folder) / f"{which}-labels-idx1-ubyte.gz", 1)
        if len(labels) and labels.max() > 9:
            raise ValueError(f"{folder}: expected labels from 0 to 9 of {which} images, found {labels.max()}.")
        if len(images) != len(labels):
            raise ValueError(
                f"{folder}: expected as many labels as {which} images, {len(images)}, found {len(labels)}."
            )
        parts += [torch.from_numpy(images)[:, None], torch.from_numpy(labels).long()]
    return LabelledImages(*parts)


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """An IDX file of bytes: magic number, sizes, values."""
    check_file(
        path,
        "a file of Fashion-MNIST (30 MB in all; `apt-get install dataset-fashion-mnist` puts it under "
        "/usr/share/datasets/fashion-mnist)",
    )
    try:
        with gzip.open(path) as file:
            header = file.read(4 + 4 * dimensions)
            if header[:4] != bytes([0, 0, 8, dimensions]) or len(header) < 4 + 4 * dimensions:
                raise ValueError(f"{path}: expected an IDX file of bytes in {dimensions} dimensions, found another.")
            shape = struct.unpack(f">{dimensions}I", header[4:])
            if shape[0] == 0 or shape[1:] not in ((), _FASHION_SIZE):
                raise ValueError(f"{path}: expected images of {_FASHION_SIZE} and their labels, found {list(shape)}.")
            expected = math.prod(shape)
            # as much as comes, never what the header claims, and no more
            pieces = iter(lambda: file.read(_PIECE), b"")
            data = b"".join(itertools.islice(pieces, expected // _PIECE + 1))
    except (OSError, EOFError, zlib.error) as error:
        if not is_damage(error):
            raise
        raise ValueError(f"{path}: expected a gzipped IDX file, found a damaged one ({error}).") from error
    if len(data) != expected:
        raise ValueError(f"{path}: expected {expected} values after its header, found {len(data)}.")
    return np.frombuffer(data, np.uint8).reshape(shape).copy()


@buildable()
def cifar100(folder: str) -> LabelledImages:
    """CIFAR-100 from its python files, `train` and `test`: 50,000 and 10,000 images of 32 x 32 pixels.

    The files are pickles. They are read by an unpickler that calls nothing, and of arrays makes bytes only.

    Args:
        folder: `cifar-100-python`.

    Raises:
        FileNotFoundError, ValueError: a file is missing, damaged, or of another kind.
    """
    parts = []
    for which in ("train", "test"):
        path = Path(folder) / which
        check_file(
            path,
            "a file of CIFAR-100 (unpack cifar-100-python.tar.gz, 169 MB, from "
            "https://www.cs.toronto.edu/~kriz/cifar.html, and set dataset.folder)",
        )
        try:
            content = _Inert(io.BytesIO(path.read_bytes()), encoding="bytes").load()
            images, labels = _bytes_matrix(content[b"data"]), content[b"fine_labels"]
        except Exception as error:  # unpickling raises many types for many kinds of damage
            if not is_damage(error):
                raise
            raise ValueError(f"{path}: expected a python file of CIFAR-100, found another ({error!r}).") from error
        if type(labels) is not list or any(type(label) is not int or not 0 <= label < 100 for label in labels):
            raise ValueError(f"{path}: expected fine_labels, a list of numbers from 0 to 99, found another.")
        if images.shape != (len(labels), 3072):
            raise ValueError(f"{path}: expected data [{len(labels)}, 3072], found {list(images.shape)}.")
        parts += [torch.from_numpy(images.reshape(-1, 3, 32, 32)), torch.tensor(labels, dtype=torch.int64)]
    return LabelledImages(*parts)


class _Inert(pickle.Unpickler):
    """Reads a pickle without making what it names: of arrays it keeps what is said of them, all else is an error."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return _Array
        if module == "numpy" and name in ("ndarray", "dtype"):
            return _Said
        if (module, name) == ("_codecs", "encode"):  # how bytes are written by protocols that have none
            return lambda text, encoding: text.encode("latin1")
        raise pickle.UnpicklingError(f"it would call {module}.{name}")


class _Said:
    """What a pickle says of an object: the arguments that make it, and its state."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Array(_Said):
    pass


def _bytes_matrix(said: Any) -> np.ndarray:
    """The array of which this is said, if it is a matrix of bytes in C order.

    It is made from nothing but its bytes: NumPy's own way takes types and flags from the file, and with them pointers.
    """
    if not isinstance(said, _Array):
        raise ValueError(f"data of type {type(said).__name__}")
    _, (rows, columns), kind, in_fortran_order, data = said.state
    if kind.arguments[0] not in ("u1", b"u1") or in_fortran_order or type(data) is not bytes:
        raise ValueError(f"data of type {kind.arguments[0]!r}")
    return np.frombuffer(data, np.uint8).reshape(rows, columns).copy()

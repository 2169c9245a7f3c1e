import gzip
import pickle
import struct

import numpy as np
import pytest
import torch

from datamodules.images.readers import cifar100, digits, fashion_mnist


def write_idx(path, values: np.ndarray) -> None:
    header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    with gzip.open(path, "wb") as file:
        file.write(header + values.tobytes())


@pytest.fixture
def idx_folder(tmp_path):
    generator = np.random.default_rng(0)
    for which, count in (("train", 30), ("t10k", 20)):
        write_idx(tmp_path / f"{which}-images-idx3-ubyte.gz", generator.integers(0, 256, (count, 28, 28), np.uint8))
        write_idx(tmp_path / f"{which}-labels-idx1-ubyte.gz", np.arange(count, dtype=np.uint8) % 10)
    return tmp_path


def test_idx_files_are_read(idx_folder):
    data = fashion_mnist(str(idx_folder))
    assert data.images.shape == (30, 1, 28, 28)
    assert data.test_images.shape == (20, 1, 28, 28)
    assert data.images.dtype == torch.uint8
    assert data.labels.tolist() == [index % 10 for index in range(30)]
    generator = np.random.default_rng(0)
    assert np.array_equal(data.images[:, 0].numpy(), generator.integers(0, 256, (30, 28, 28), np.uint8))


def test_damaged_and_missing_idx_files_are_named(idx_folder):
    path = idx_folder / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for damaged, message in (
        (whole[: len(whole) // 2], "expected a gzipped IDX file, found a damaged one"),
        (b"nothing", "expected a gzipped IDX file, found a damaged one"),
        (gzip.compress(b"nothing"), "expected an IDX file of bytes in 3 dimensions, found another"),
        (gzip.compress(gzip.decompress(whole)[:-7]), "expected 23520 values after its header, found 23513"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            fashion_mnist(str(idx_folder))
    write_idx(path, np.zeros((7, 28, 28), np.uint8))
    with pytest.raises(ValueError, match="expected as many labels as train images, 7, found 30"):
        fashion_mnist(str(idx_folder))
    labels = idx_folder / "train-labels-idx1-ubyte.gz"
    write_idx(labels, np.full(7, 10, np.uint8))
    with pytest.raises(ValueError, match="expected labels from 0 to 9 of train images, found 10"):
        fashion_mnist(str(idx_folder))
    path.unlink()
    with pytest.raises(FileNotFoundError, match="`apt-get install dataset-fashion-mnist`"):
        fashion_mnist(str(idx_folder))


def write_cifar(folder, protocol: int = 2, **changes) -> None:
    generator = np.random.default_rng(1)
    for which, count in (("train", 12), ("test", 5)):
        content = {
            b"data": generator.integers(0, 256, (count, 3072), np.uint8),
            b"fine_labels": [3 * index for index in range(count)],
            b"coarse_labels": [0] * count,
            b"filenames": [b"picture.png"] * count,
            b"batch_label": b"testing batch",
            **changes,
        }
        (folder / which).write_bytes(pickle.dumps(content, protocol))


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_python_files_of_cifar_are_read(tmp_path, protocol):
    write_cifar(tmp_path, protocol)
    data = cifar100(str(tmp_path))
    expected = np.random.default_rng(1).integers(0, 256, (12, 3072), np.uint8)
    assert data.images.shape == (12, 3, 32, 32)
    assert data.images[4, 2, 5, 6].item() == expected[4, 2 * 1024 + 5 * 32 + 6]  # planes, then rows
    assert data.labels.tolist() == [3 * index for index in range(12)]
    assert len(data.test_images) == 5


def test_a_pickle_that_calls_anything_is_refused(tmp_path):
    class Calls:
        def __reduce__(self):
            return exec, ("raise SystemExit('it was called')",)

    write_cifar(tmp_path, b=Calls())
    with pytest.raises(
        ValueError, match=r"expected a python file of CIFAR-100, found another .*it would call __builtin"
    ):
        cifar100(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({b"data": np.zeros((12, 3071), np.uint8)}, r"expected data \[12, 3072\], found \[12, 3071\]"),
        ({b"data": np.zeros((12, 3072))}, r"found another .*data of type 'f8'"),
        ({b"data": np.zeros((12, 3072), np.uint8, order="F")}, "found another .*data of type 'u1'"),
        ({b"data": [0] * 12}, "found another .*data of type list"),
        ({b"fine_labels": [100] * 12}, "expected fine_labels, a list of numbers from 0 to 99, found another"),
        ({b"fine_labels": [0.5] * 12}, "expected fine_labels, a list of numbers"),
        ({b"fine_labels": "x"}, "expected fine_labels, a list of numbers"),
    ],
)
def test_other_contents_are_named(tmp_path, changes, message):
    write_cifar(tmp_path)
    generator = np.random.default_rng(1)
    content = {b"data": generator.integers(0, 256, (12, 3072), np.uint8), b"fine_labels": [0] * 12, **changes}
    (tmp_path / "train").write_bytes(pickle.dumps(content, 2))
    with pytest.raises(ValueError, match=message):
        cifar100(str(tmp_path))
    (tmp_path / "train").write_bytes(b"\x80\x02")
    with pytest.raises(ValueError, match="expected a python file of CIFAR-100, found another"):
        cifar100(str(tmp_path))
    (tmp_path / "train").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected a file of CIFAR-100 .*, found none"):
        cifar100(str(tmp_path))


@pytest.mark.parametrize("entry", [b"data", b"fine_labels"])
def test_arrays_of_types_that_a_file_makes_up_are_refused(tmp_path, entry):
    """NumPy takes flags from a type's state: bytes of the file would be followed as pointers to objects."""

    class Kind:
        def __reduce__(self):
            return np.dtype, ("O", False, True), (3, "|", None, None, None, -1, -1, 0)

    class Pointers:
        def __reduce__(self):
            reconstruct = np._core.multiarray._reconstruct
            return reconstruct, (np.ndarray, (0,), b"b"), (1, (1536, 2), Kind(), False, b"\x41" * 8 * 3072)

    write_cifar(tmp_path)
    content = {b"data": np.zeros((12, 3072), np.uint8), b"fine_labels": [0] * 12, entry: Pointers()}
    (tmp_path / "train").write_bytes(pickle.dumps(content, 2))
    with pytest.raises(ValueError, match=r"expected fine_labels, a list|found another .*data of type 'O'"):
        cifar100(str(tmp_path))


def test_digits_are_split_once():
    data = digits(130)
    assert data.images.shape == (1300, 1, 8, 8)
    assert len(data.test_images) == 497
    assert data.labels.bincount().tolist() == [130] * 10
    assert data.images.unique().tolist() == [round(value * 255 / 16) for value in range(17)]
    with pytest.raises(ValueError, match="per_class=174: expected from 1 to 173"):
        digits(174)

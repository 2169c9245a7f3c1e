"""Files of every format with bytes flipped, cut out or put in: read, or refused in a sentence that names the file."""

import gzip
import json
import os
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from components.language.experts import Expert
from datamodules.images.readers import fashion_mnist
from datamodules.language.questions import ARC, GSM8K, MATH
from datamodules.stored.arrays import Hdf5File
from datamodules.stored.own_files import read_own
from datamodules.stored.readers import read_d4rl, read_exorl, read_mood
from datamodules.stored.transitions import TransitionDataset

DAMAGES = 150  # of each format


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)


def write_hdf5(path: Path, **settings: object) -> Callable[[dict[str, np.ndarray]], Path]:
    def write(arrays: dict[str, np.ndarray]) -> Path:
        with h5py.File(path, "w") as file:
            for key, values in arrays.items():
                file.create_dataset(key, data=values, **settings)
        return path

    return write


def exorl(folder: Path) -> tuple[Path, Callable[[], object]]:
    path = folder / "episode_000000_5.npz"
    arrays = {
        "observation": numbers(6, 3),
        "action": numbers(6, 2),
        "reward": numbers(6, 1),
        "discount": np.ones((6, 1)),
    }
    np.savez_compressed(path, **arrays)
    return path, lambda: read_exorl(folder, "toy")


def mood(folder: Path) -> tuple[Path, Callable[[], object]]:
    shapes = {"observation": (4, 6, 3), "action": (4, 6, 2), "reward": (4, 6), "physics": (4, 6, 2)}
    arrays = {key: numbers(*shape) for key, shape in shapes.items()}
    path = write_hdf5(folder / "a__toy_run.hdf5")(
        {**arrays, "terminated": np.zeros((4, 6), bool), "source": np.arange(4)}
    )
    return path, lambda: read_mood(path)


def d4rl(folder: Path) -> tuple[Path, Callable[[], object]]:
    arrays = {
        "observations": numbers(40, 3),
        "actions": numbers(40, 2),
        "rewards": numbers(40),
        "infos/qpos": numbers(40, 2),
    }
    ends = {"terminals": np.arange(40) % 13 == 12, "timeouts": np.arange(40) % 9 == 8}
    path = write_hdf5(folder / "toy.hdf5", compression="gzip")({**arrays, **ends})
    return path, lambda: read_d4rl(path)


def minari(folder: Path) -> tuple[Path, Callable[[], object]]:
    arrays = {}
    for episode in range(3):
        one = {
            "observations": numbers(6, 3),
            "actions": numbers(5, 2),
            "rewards": numbers(5),
            "terminations": np.zeros(5),
        }
        arrays |= {f"episode_{episode}/{key}": values for key, values in one.items()}
    path = write_hdf5(folder / "main_data.hdf5")(arrays)
    return path, lambda: read_own(path)


def metadata(folder: Path) -> tuple[Path, Callable[[], object]]:
    minari(folder)
    space = {"type": "Box", "low": [-1, -1], "high": [1, 1]}
    path = folder / "metadata.json"
    path.write_text(json.dumps({"total_episodes": 3, "action_space": json.dumps(space)}))
    return path, lambda: read_own(folder)


def own(folder: Path) -> tuple[Path, Callable[[], object]]:
    path = folder / "own.npz"
    ends = {"terminals": np.arange(40) % 13 == 12, "timeouts": np.arange(40) % 9 == 8}
    np.savez(path, observations=numbers(40, 3), actions=numbers(40, 2), rewards=numbers(40), **ends)
    return path, lambda: read_own(path)


def saved(name: str) -> Callable[[Path], tuple[Path, Callable[[], object]]]:
    def write(folder: Path) -> tuple[Path, Callable[[], object]]:
        read_own(own(folder)[0]).save(folder / "saved")
        return folder / "saved" / name, lambda: TransitionDataset.load(folder / "saved")

    return write


def idx(name: str) -> Callable[[Path], tuple[Path, Callable[[], object]]]:
    def write(folder: Path) -> tuple[Path, Callable[[], object]]:
        for which in ("train", "t10k"):
            for kind, shape in (("images-idx3", (4, 28, 28)), ("labels-idx1", (4,))):
                content = bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)
                values = (9 * np.abs(numbers(*shape))).astype(np.uint8)
                (folder / f"{which}-{kind}-ubyte.gz").write_bytes(gzip.compress(content + values.tobytes()))
        return folder / name, lambda: fashion_mnist(str(folder))

    return write


def gsm8k(folder: Path) -> tuple[Path, Callable[[], object]]:
    lines = "".join(json.dumps({"question": f"{n} ü?", "answer": f"So:\n#### {n}"}) + "\n" for n in range(6))
    for name in ("train", "test"):
        (folder / f"{name}.jsonl").write_text(lines)
    return folder / "test.jsonl", lambda: GSM8K(folder).splits(0)


def arc(folder: Path) -> tuple[Path, Callable[[], object]]:
    choices = [{"text": "this", "label": "A"}, {"text": "that", "label": "B"}]
    line = json.dumps({"question": {"stem": "Which?", "choices": choices}, "answerKey": "B"}) + "\n"
    for name in ("Train", "Dev", "Test"):
        (folder / f"ARC-Easy-{name}.jsonl").write_text(3 * line)
    return folder / "ARC-Easy-Dev.jsonl", lambda: ARC(folder).splits(0)


def math(folder: Path) -> tuple[Path, Callable[[], object]]:
    for name in ("train", "test"):
        (folder / name / "algebra").mkdir(parents=True)
        (folder / name / "algebra" / "1.json").write_text(json.dumps({"problem": "1?", "solution": "\\boxed{1}"}))
    return folder / "test" / "algebra" / "1.json", lambda: MATH(folder).splits(0)


def expert(folder: Path) -> tuple[Path, Callable[[], object]]:
    path = folder / "expert.safetensors"
    Expert({"a.up": torch.rand(5), "b.up": torch.rand(3)}, "base", "sums", 1.0, "nuclear").save(path)
    return path, lambda: Expert.load(path, "base")


FORMATS = {
    "exorl": exorl,
    "mood": mood,
    "d4rl": d4rl,
    "minari": minari,
    "minari_metadata": metadata,
    "own": own,
    "saved_array": saved("action.npy"),
    "saved_manifest": saved("manifest.json"),
    "idx_images": idx("train-images-idx3-ubyte.gz"),
    "idx_labels": idx("train-labels-idx1-ubyte.gz"),
    "gsm8k": gsm8k,
    "arc": arc,
    "math": math,
    "expert": expert,
}


def damaged(content: bytes, chance: random.Random) -> bytes:
    """Some of the bytes flipped, overwritten, cut out or put in, at the ends more often than in between."""
    found = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 8))):
        size = len(found)
        place = chance.choice(
            (chance.randrange(size), chance.randrange(min(size, 200)), size - 1 - chance.randrange(min(size, 200)))
        )
        length = chance.choice((1, 1, 4, 16))
        kind = chance.randrange(5)
        if kind == 0:
            found[place] ^= 1 << chance.randrange(8)
        elif kind == 1:
            found[place : place + length] = chance.choice((b"\xff", b"\0", b"[")) * length
        elif kind == 2:
            found[place : place + length] = chance.randbytes(length)
        elif kind == 3:
            del found[place : place + length]
        else:
            found[place:place] = chance.randbytes(length)
        if not found:
            break
    return bytes(found[: chance.randrange(len(found) + 1)] if chance.random() < 0.1 else found)


@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_file_is_read_or_named(name, tmp_path):
    path, read = FORMATS[name](tmp_path)
    read()
    whole = path.read_bytes()
    chance = random.Random(name)
    refused = []
    for _ in range(DAMAGES):
        path.write_bytes(damaged(whole, chance))
        try:
            read()
        except (ValueError, FileNotFoundError) as error:
            refused.append(str(error))
    assert len(refused) > DAMAGES / 5
    named = path.parent.name if name in ("saved_manifest", "saved_array", "minari_metadata") else path.name
    assert all(named in sentence and len(sentence) < 500 and "\n" not in sentence for sentence in refused)
    path.write_bytes(whole)
    read()


@pytest.mark.timeout(20)  # a pipe would be waited for
@pytest.mark.parametrize("name", [name for name in FORMATS if name != "minari_metadata"])
def test_what_is_no_file_is_named(name, tmp_path):
    path, read = FORMATS[name](tmp_path)
    for make in (path.mkdir, lambda: path.symlink_to(path), lambda: os.mkfifo(path)):
        path.unlink() if not path.is_dir() else path.rmdir()
        make()
        with pytest.raises(FileNotFoundError, match=f"{path.name}: expected "):
            read()


def test_what_claims_more_than_it_has_is_never_made(tmp_path):
    """600 TB of numbers, in files of a few bytes."""
    rows = 9 * 2**44
    shapes = {"observations": (rows, 1), "actions": (rows, 1), "rewards": (rows,), "terminals": (rows,)}
    with h5py.File(tmp_path / "toy.hdf5", "w") as file:
        for key, shape in shapes.items():
            file.create_dataset(key, shape, np.float32)  # of which nothing is written
    with pytest.raises(ValueError, match=r"toy.hdf5: .* found a damaged one \(observations would have 6.3e\+14 bytes"):
        read_d4rl(tmp_path / "toy.hdf5")
    with zipfile.ZipFile(tmp_path / "own.npz", "w") as archive:
        for key, shape in shapes.items():
            with archive.open(f"{key}.npy", "w") as stream:
                header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(stream, header)
    with pytest.raises(
        ValueError, match=r"own.npz: .* found a damaged one \(observations would have 633318697599104 bytes"
    ):
        read_own(tmp_path / "own.npz")


@pytest.mark.parametrize("place", ["x", "group/x"])
def test_links_of_hdf5_files_are_not_followed(tmp_path, place):
    with h5py.File(tmp_path / "other.hdf5", "w") as file:
        file["group/x"] = file["x"] = numbers(3)
    os.mkfifo(tmp_path / "endless")  # who opens it waits for ever
    links = {
        "away": h5py.ExternalLink(tmp_path / "other.hdf5", "/group" if "/" in place else "x"),
        "endless": h5py.ExternalLink(tmp_path / "endless", "x"),
        "within": h5py.SoftLink("/own" if "/" in place else "/own/x"),
    }
    for name, link in links.items():
        with h5py.File(tmp_path / f"{name}.hdf5", "w") as file:
            file["own/x"] = numbers(3)
            file[place.split("/")[0]] = link
        with Hdf5File(tmp_path / f"{name}.hdf5") as file:
            assert file.shape("own/x", 1) == (3,)
            assert "missing/x" not in file
            with pytest.raises(ValueError, match=rf"{name}.hdf5: expected .*{place} is a link"):
                file.read(place, 1)


def test_what_was_never_written_is_what_it_is_filled_with(tmp_path):
    with h5py.File(tmp_path / "x.hdf5", "w") as file:
        file.create_dataset("timeouts", 2_000_000, bool)
        file.create_dataset("rewards", (2_000_000, 1), np.float32, chunks=(1000, 1), fillvalue=1)[0] = 5
    with Hdf5File(tmp_path / "x.hdf5") as file:
        assert not file.read("timeouts", 1).any()
        assert file.read("rewards", 2, rows=slice(0, 3)).tolist() == [[5], [1], [1]]


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), MemoryError()])
@pytest.mark.parametrize(
    ("name", "library"),
    [
        ("own", "zipfile.ZipFile.__init__"),
        ("d4rl", "h5py.File.__init__"),
        ("idx_images", "gzip.open"),
        ("expert", "components.language.experts.safe_open"),
        ("saved_array", "numpy.load"),
    ],
)
def test_memory_and_the_system_are_no_damage(name, library, error, tmp_path, monkeypatch):
    _, read = FORMATS[name](tmp_path)

    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(library, fails)
    with pytest.raises(type(error)):
        read()

"""What is written is whole or was never there, whatever stops it; and errors of the system name the file."""

import errno
import fcntl
import os
import resource
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from components.files import locking, naming, replacing, reserve

LIMIT = 100_000
LARGE = torch.arange(LIMIT)  # of eight times as many bytes


@contextmanager
def small_files():
    """The system refuses to write files of more than LIMIT bytes, as it refuses to write to a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write_by_torch(path: Path) -> None:
    with open(path, "wb") as file:
        torch.save({"weight": LARGE}, file)


def write_folder(path: Path) -> None:
    path.mkdir()
    (path / "first").write_text("whole")
    (path / "second").write_bytes(bytes(2 * LIMIT))


def write_then_raise(path: Path) -> None:
    path.touch()
    raise ValueError("mine")


WRITERS = {
    "python": lambda path: path.write_bytes(bytes(2 * LIMIT)),
    "torch": write_by_torch,
    "safetensors": lambda path: save_file({"weight": LARGE}, path),
    "folder": write_folder,
}


@pytest.mark.parametrize("name", WRITERS)
def test_what_does_not_fit_leaves_nothing_and_what_was_there(tmp_path, name):
    path = tmp_path / "file"
    if name != "folder":
        path.write_text("before")
    before = list(tmp_path.iterdir())
    with small_files(), pytest.raises(OSError, match="File too large") as caught, replacing(path) as temporary:
        WRITERS[name](temporary)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(path))
    assert list(tmp_path.iterdir()) == before
    assert name == "folder" or path.read_text() == "before"


@pytest.mark.parametrize("shared", [False, True])
def test_what_a_killed_process_left_goes_with_the_next_file(tmp_path, shared):
    path = tmp_path / "new" / "file"
    number = os.fork()
    if number == 0:
        with replacing(path, shared=shared) as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(number, 0)
    (left,) = path.parent.iterdir()
    assert left.name.startswith(".")
    with replacing(path) as temporary:
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert left.exists() == shared  # it might be another's that is writing


def test_a_folder_takes_the_place_of_an_empty_one_only(tmp_path):
    for folder, refused in ((tmp_path / "empty", False), (tmp_path / "full", True)):
        folder.mkdir()
        if refused:
            (folder / "other").touch()
            with pytest.raises(OSError, match="not empty") as caught, replacing(folder) as temporary:
                temporary.mkdir()
            assert caught.value.filename == str(folder)
        else:
            with replacing(folder) as temporary:
                temporary.mkdir()
                (temporary / "new").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["empty", "full", "new", "other"]


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(KeyError), naming(tmp_path):
        raise KeyError("mine")
    with pytest.raises(FileNotFoundError) as caught, naming(tmp_path):
        (tmp_path / "missing").read_text()
    assert caught.value.filename == str(tmp_path / "missing")
    with pytest.raises(ValueError, match="mine"), replacing(tmp_path / "file") as temporary:
        write_then_raise(temporary)
    assert not list(tmp_path.iterdir())


def test_reserved_files_have_their_room(tmp_path):
    for name in ("a/b", "c"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
        os.truncate(path, 2**20)
        assert path.stat().st_blocks == 0
    (tmp_path / "empty").touch()
    reserve(tmp_path)
    for name, size in (("a/b", 2**20), ("c", 2**20), ("empty", 0)):
        found = (tmp_path / name).stat()
        assert (found.st_size, 512 * found.st_blocks >= size) == (size, True)


def test_a_disk_without_the_room_is_one_sentence(small_disk):
    (small_disk / "there").write_bytes(bytes(2**20))
    (small_disk / "large").touch()
    os.truncate(small_disk / "large", 10**7)
    with pytest.raises(ValueError, match=rf"^{small_disk}: expected 10000000 bytes of free space .*, found 7340032\.$"):
        reserve(small_disk)
    os.truncate(small_disk / "large", 7 * 2**20)
    reserve(small_disk)


def test_a_lock_is_one_processes_until_it_leaves_it(tmp_path):
    class Taken(Exception):
        pass

    def taken():
        raise Taken

    with locking(tmp_path / "lock", taken), pytest.raises(Taken), locking(tmp_path / "lock", taken):
        pass
    with locking(tmp_path / "lock", taken):
        pass


def test_a_file_system_without_locks_is_written_to_all_the_same(tmp_path, monkeypatch):
    def refuse(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locking(tmp_path / "lock", pytest.fail), replacing(tmp_path / "file") as temporary:
        temporary.write_text("whole")
    assert (tmp_path / "file").read_text() == "whole"


def test_a_lock_follows_no_link(tmp_path):
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links") as caught, locking(tmp_path / "lock", pytest.fail):
        pass
    assert caught.value.filename == str(tmp_path / "lock")
    assert not (tmp_path / "elsewhere").exists()

"""Checkpoints are whole or absent, and files that are no checkpoints are named as such."""

import os
import signal
import time

import pytest
import torch

from launch.checkpoints import AtomicCheckpointIO, load_checkpoint

GOOD = {"learning_method": {"updates": 10}, "state_dict": {"weight": torch.arange(1000.0)}}


def test_kill_between_writing_and_renaming_leaves_the_previous_checkpoint(tmp_path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(GOOD, path)
    reached, reaching = os.pipe()
    writer = os.fork()
    if writer == 0:  # hangs before it renames

        def hang(*_):
            os.write(reaching, b"!")
            time.sleep(60)

        os.replace = hang
        AtomicCheckpointIO().save_checkpoint({"learning_method": {"updates": 20}, "state_dict": {}}, path)
        os._exit(1)
    assert os.read(reached, 1) == b"!"
    os.kill(writer, signal.SIGKILL)
    assert os.waitpid(writer, 0)[1] == signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2  # the unfinished one lies beside it, under another name
    assert load_checkpoint(path)["learning_method"]["updates"] == 10
    AtomicCheckpointIO().save_checkpoint(GOOD, path)
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_what_is_saved_comes_back(tmp_path):
    AtomicCheckpointIO().save_checkpoint(GOOD, tmp_path / "new" / "last.ckpt")
    loaded = AtomicCheckpointIO().load_checkpoint(tmp_path / "new" / "last.ckpt")
    assert torch.equal(loaded["state_dict"]["weight"], GOOD["state_dict"]["weight"])


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "foreign", "code"])
def test_files_that_are_no_checkpoints_are_named(tmp_path, damage):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(GOOD, path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("not a checkpoint")
    elif damage == "foreign":
        torch.save([1, 2, 3], path)
    else:
        torch.save({"learning_method": time.sleep}, path)  # would be called on loading a pickle without restraint
    with pytest.raises(ValueError, match=rf"^ckpt_path={path}: expected a (whole )?checkpoint[^\n]*, found [^\n]*\.$"):
        load_checkpoint(path)


def test_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a checkpoint file, found none"):
        load_checkpoint(tmp_path / "last.ckpt")

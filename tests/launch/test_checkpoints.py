"""Checkpoints are whole or absent, and files that are no checkpoints are named as such."""

import math
import os
import signal
import time

import lightning
import pytest
import torch

from launch.checkpoints import AtomicCheckpointIO, load_checkpoint

GOOD = {
    "state_dict": {"weight": torch.arange(1000.0)},
    "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"params": [0], "lr": 0.1}]}],
    "lr_schedulers": [],
    "callbacks": {},
    "learning_method": {
        "class": "Toy",
        "recipe": {"experiment": "x", "study": None, "spec": {}, "module": {}, "datamodule": {}},
        "updates": 10,
        "env_steps": 0,
        "seconds": 0.5,
        "processes": [{"random": {}, "tallies": []}],
    },
}


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
        AtomicCheckpointIO().save_checkpoint({**GOOD, "learning_method": {"updates": 20}}, path)
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
    with pytest.raises(FileNotFoundError, match=r"^ckpt_path=.*: expected a checkpoint file, found none"):
        load_checkpoint(tmp_path / "last.ckpt")


def paths(node, path=()):
    """Where the parts of a nested structure are."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield (*path, key)
        yield from paths(value, (*path, key))


def changed(node, path, change):
    """A copy in which `change` was done to the container and the key of one part."""
    if len(path) > 1:
        copied = dict(node) if isinstance(node, dict) else list(node)
        copied[path[0]] = changed(node[path[0]], path[1:], change)
        return copied
    copied = dict(node) if isinstance(node, dict) else list(node)
    change(copied, path[0])
    return copied


FREE = {"lr", "exp_avg"}  # the method takes its own settings, and compares what its optimisers keep


@pytest.mark.parametrize("path", [path for path in paths(GOOD) if not FREE & set(path)], ids=str)
def test_every_part_that_is_missing_or_of_another_type_is_named(tmp_path, path):
    def drop(node, key):
        del node[key]

    def replace(node, key):
        node[key] = {"odd": 1} if isinstance(node[key], list | str | int | float | torch.Tensor) else 5

    (tmp_path / "last.ckpt").touch()
    for change in (drop, replace):
        if change is drop and not isinstance(path[-1], str):
            continue  # lists may be shorter
        if change is drop and path == ("callbacks",):
            continue  # some have no state
        if change is drop and path[0] == "state_dict" and len(path) > 1:
            continue  # what there must be is the method's to know
        torch.save(changed(GOOD, path, change), tmp_path / "last.ckpt")
        with pytest.raises(
            ValueError, match=rf"^ckpt_path={tmp_path}/last.ckpt[^\n]*: expected [^\n]*, found [^\n]*\.$"
        ):
            load_checkpoint(tmp_path / "last.ckpt")


@pytest.mark.parametrize("seconds", [math.nan, math.inf, 10**400])
def test_clocks_are_numbers(tmp_path, seconds):
    torch.save(changed(GOOD, ("learning_method", "seconds"), lambda n, k: n.update({k: seconds})), tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"learning_method.seconds: expected a number, found (nan|inf|10000)"):
        load_checkpoint(tmp_path / "x.ckpt")


def test_what_lightning_would_go_by_is_not_taken_from_a_file(tmp_path):
    foreign = {"loops": {"fit_loop": 5}, "epoch": "x", "global_step": -1, "pytorch-lightning_version": "abc"}
    torch.save({**GOOD, **foreign, "SomeDataModule": {"data": {}}}, tmp_path / "x.ckpt")
    loaded = load_checkpoint(tmp_path / "x.ckpt")
    assert loaded.pop("pytorch-lightning_version") == lightning.__version__
    assert loaded.keys() == {*GOOD, "SomeDataModule"}


def test_flipped_bits_do_not_load(tmp_path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(GOOD, path)
    whole = path.read_bytes()
    place = whole.index(GOOD["state_dict"]["weight"].numpy().tobytes()) + 2000
    for flipped in (place, whole.index(b"exp_avg")):
        path.write_bytes(whole[:flipped] + bytes([whole[flipped] ^ 4]) + whole[flipped + 1 :])
        with pytest.raises(ValueError, match="expected a whole checkpoint, found a damaged or foreign file"):
            load_checkpoint(path)
    path.write_bytes(whole)
    assert torch.equal(load_checkpoint(path)["state_dict"]["weight"], GOOD["state_dict"]["weight"])


def test_memory_that_is_not_there_is_no_damage(tmp_path, monkeypatch):
    AtomicCheckpointIO().save_checkpoint(GOOD, tmp_path / "last.ckpt")
    monkeypatch.setattr(torch, "load", lambda *_, **__: torch.empty(2**57))
    with pytest.raises(RuntimeError, match="tried to allocate"):
        load_checkpoint(tmp_path / "last.ckpt")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink(path, path)])
def test_what_is_no_file_is_named(tmp_path, make):
    make(tmp_path / "last.ckpt")
    with pytest.raises(FileNotFoundError, match=rf"^ckpt_path={tmp_path}/last.ckpt: expected a checkpoint file, found"):
        load_checkpoint(tmp_path / "last.ckpt")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            torch.ones(3).to_sparse(),
            "expected a tensor of plain numbers in memory, found torch.float32, torch.sparse_coo",
        ),
        (torch.ones(3, 3).to_sparse_csr(), "found torch.float32, torch.sparse_csr"),
        (torch.ones(3, device="meta"), "expected a tensor of plain numbers in memory"),
        (torch._neg_view(torch.ones(3)), "expected a tensor of plain numbers in memory"),
        (torch.ones(3).to(torch.complex64), "found torch.complex64"),
        (torch.ones(3).to(torch.float8_e4m3fn), "found torch.float8_e4m3fn"),
        (torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "found torch.qint8"),
        ({1, 2}, "expected a plain value, found set"),
        (b"bytes", "expected a plain value, found bytes"),
        ({(1, 2): 3}, "expected a plain value, found tuple"),
        ("\ud800", "expected a plain value, found one that can't be written"),
    ],
)
@pytest.mark.parametrize(
    "path", [("state_dict", "weight"), ("learning_method", "recipe", "module"), ("callbacks", "x")]
)
def test_what_is_no_plain_value_is_not_taken(tmp_path, path, value, message):
    torch.save(changed({**GOOD, "callbacks": {"x": {}}}, path, lambda n, k: n.update({k: value})), tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=rf"^ckpt_path=[^\n]*{'.'.join(path)}[^\n]*{message}"):
        load_checkpoint(tmp_path / "x.ckpt")


def test_what_holds_itself_is_not_taken(tmp_path):
    module = {"x": 1}
    module["self"] = module
    torch.save(
        changed(GOOD, ("learning_method", "recipe"), lambda n, k: n.update({k: {**n[k], "module": module}})),
        tmp_path / "x.ckpt",
    )
    with pytest.raises(ValueError, match="expected at most 50 levels, found more"):
        load_checkpoint(tmp_path / "x.ckpt")


def test_tensors_have_memory_of_their_own(tmp_path):
    """What is written to in the order of its sizes must be as large, and nobody else's."""
    whole = torch.arange(6.0)
    state = {"expanded": torch.ones(1).expand(4), "whole": whole, "view": whole[2:4], "turned": whole.view(2, 3).T}
    torch.save({**GOOD, "state_dict": state}, tmp_path / "x.ckpt")
    loaded = load_checkpoint(tmp_path / "x.ckpt")["state_dict"]
    for name, tensor in loaded.items():
        assert torch.equal(tensor, state[name])
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        assert tensor.is_contiguous()
    assert len({tensor.data_ptr() for tensor in loaded.values()}) == 4


def test_callbacks_are_told_of_no_files(tmp_path):
    states = {"Stopping": {"wait": 1, "best": torch.ones(())}, "Checkpoints": {"last": {"path": "local:///home"}}}
    torch.save({**GOOD, "callbacks": states}, tmp_path / "x.ckpt")
    assert list(load_checkpoint(tmp_path / "x.ckpt")["callbacks"]) == ["Stopping"]

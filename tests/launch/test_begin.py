"""Runs that begin with the weights of another: `init_from`."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from datamodules.behaviours.trained import BEHAVIOURS
from launch.checkpoints import load_checkpoint

STILL = ("module.learning_rate=0", "module.backward_learning_rate=0", "module.actor_learning_rate=0")


@pytest.fixture(scope="module")
def source(program, one_arm, tmp_path_factory) -> Path:
    finished = program(*one_arm, f"output_root={tmp_path_factory.mktemp('source')}", "module.updates=10")
    assert finished.code == 0, finished.err
    return finished.folder


def saved(folder: Path) -> dict:
    return load_checkpoint(folder / "fb_aw_narrow" / "seed_0" / "checkpoints" / "last.ckpt")


def test_a_new_run_has_the_weights_and_a_resumed_one_its_own(program, one_arm, source, tmp_path):
    root = f"output_root={tmp_path}/runs"
    before = shutil.copytree(source, tmp_path / "source")
    began = program(*one_arm, root, "module.updates=5", *STILL, "seed=3", f"init_from={before}")
    assert began.code == 0, began.err
    (line,) = [line for line in began.out.splitlines() if "no resumption" in line]
    assert line.startswith("fb_aw_narrow, seed 3: no resumption, but a new run that begins with weights of ")
    assert "after 10 updates (taken: forward_map, backward_map, actor; left: nothing; unused: nothing)." in line
    run = load_checkpoint(began.folder / "fb_aw_narrow" / "seed_3" / "checkpoints" / "last.ckpt")
    actors = [
        {name: value for name, value in each["state_dict"].items() if "actor" in name} for each in (run, saved(source))
    ]
    assert actors[0]
    assert all(torch.equal(value, actors[1][name]) for name, value in actors[0].items())
    assert run["learning_method"]["updates"] == 5

    shutil.rmtree(before)  # the checkpoint wins: nobody asks for it again
    resumed = program("experiment=fb_overdrive", root, "ckpt_path=last", "module.updates=10")
    assert resumed.code == 0, resumed.err
    assert "seed 3: resuming after 5 updates" in resumed.out
    assert "no resumption" not in resumed.out


def test_an_arm_begins_with_the_weights_of_an_earlier_one_of_its_study(program, one_arm, tmp_path):
    tuned = '["datamodule.dataset.coverage=narrow","init_from=${study_dir}/fb_aw_narrow/seed_${seed}"]'
    finished = program(*one_arm, f"+arms.tuned={tuned}", f"output_root={tmp_path}", "module.updates=5", "seed=2")
    assert finished.code == 0, finished.err
    first = finished.folder / "fb_aw_narrow" / "seed_2" / "checkpoints" / "last.ckpt"
    assert f"tuned, seed 2: no resumption, but a new run that begins with weights of {first} after 5 " in finished.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["module.actor.hidden_dim=32"],
            r"The checkpoint's actor\.\S+ is .*; what fits is init_parts=\[forward_map,backward_map\]",
        ),
        (
            ["init_parts=[critic]"],
            r"init_parts=critic: expected a part such as forward_map, backward_map, actor, found",
        ),
        (["init_parts=actor"], r"init_parts=actor: expected a list, each of it a text"),
        (["init_from=nowhere"], r"init_from=nowhere: expected a checkpoint or a folder with one, found none"),
        (["init_from={two}"], r"init_from=\S+/two: expected one checkpoint, found 2; name one, such as \S+last\.ckpt"),
        (["init_from={text}"], r"init_from=\S+/text: expected a whole checkpoint, found"),
        ([f"init_from={BEHAVIOURS}/walker/run_late.safetensors"], r"run_late\.safetensors: expected the weights of a "),
    ],
)
def test_what_can_not_be_taken_is_one_sentence(program, one_arm, source, tmp_path, arguments, message):
    for name in "ab":
        shutil.copytree(source / "fb_aw_narrow", tmp_path / "two" / name)
    (tmp_path / "text").write_text("no checkpoint")
    given = [each.format(two=tmp_path / "two", text=tmp_path / "text") for each in arguments]
    begins = [] if any("init_from" in each for each in given) else [f"init_from={source}"]
    finished = program(*one_arm, f"output_root={tmp_path}/runs", "module.updates=5", *begins, *given)
    assert finished.code != 0
    assert finished.err.count("\n") == 1
    assert re.search(message, finished.err)
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").rglob("last.ckpt"))

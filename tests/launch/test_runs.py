"""Folders of runs, what they were started with, and what they go on with."""

import os
import shutil
import subprocess
import sys
from datetime import datetime
from types import SimpleNamespace

import pytest

from launch.recipes import study_of
from launch.runs import LOCK, check_links, lasting, locked, merged, new_folder, newest_run, write_overrides

BEGAN = ["experiment=fb_overdrive", "+own=1", "module.updates=5", "+preset=fb_mm", "num_seeds=2"]
HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "a")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


def test_programs_that_start_at_one_instant_get_folders_of_their_own(tmp_path, monkeypatch):
    instants = iter([datetime(2026, 11, 22, 12, 0, 0, each) for each in (5, 5, 5, 6)])
    monkeypatch.setattr("launch.runs.datetime", SimpleNamespace(now=lambda: next(instants)))
    names = [new_folder(tmp_path / "evaluations").name for _ in range(2)]
    assert names == ["2026-11-22_12-00-00-000005", "2026-11-22_12-00-00-000006"]


@pytest.mark.parametrize(
    ("starter", "environment"),
    [("torchrun", {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2"}), ("srun", {"SLURM_STEP_NUM_TASKS": "2"})],
)
def test_processes_of_one_run_have_one_folder(program, tmp_path, monkeypatch, starter, environment):
    for name, value in {**environment, "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    refused = program("experiment=fb_overdrive", f"output_root={tmp_path}")
    expected = (
        f"hydra.run.dir: expected one folder for the 2 processes that {starter} has started, found none; add hydra"
    )
    assert (refused.code, refused.err[: len(expected)], refused.err.count("\n")) == (1, expected, 1)
    refused = program("experiment=fb_overdrive", f"hydra.run.dir={tmp_path / 'run'}", "datamodule.dataset.episodes=20")
    expected = (
        f"trainer.devices: expected the 2 processes that {starter} has started, found 1; add trainer=ddp trainer.d"
    )
    assert (refused.code, refused.err[: len(expected)], refused.err.count("\n")) == (1, expected, 1)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_one_programs_until_it_ends_or_is_killed(tmp_path):
    with locked(tmp_path), pytest.raises(ValueError, match="no program is at work on, found one"), locked(tmp_path):
        pass
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / LOCK)], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(ValueError, match="no program is at work on, found one"), locked(tmp_path):
        pass
    holder.kill()
    holder.wait()
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("name", ["arm", "arm/seed_0/checkpoints", "arm/seed_0/replay/process_0"])
def test_links_to_folders_stay_in_that_of_the_run(tmp_path, name):
    """Which may itself be reached by one."""
    run, link = tmp_path / "runs" / "run", tmp_path / "runs" / "run" / name
    link.parent.mkdir(parents=True)
    (run / "mine").mkdir()
    (tmp_path / "outputs").symlink_to(tmp_path / "runs")
    link.symlink_to(run / "mine")
    check_links(tmp_path / "outputs" / "run")
    for elsewhere in (tmp_path, run / ".." / ".."):
        link.unlink()
        link.symlink_to(elsewhere)
        with pytest.raises(ValueError, match=rf"{name}: expected a folder in .*, found a link to {tmp_path}\.$"):
            check_links(tmp_path / "outputs" / "run")


@pytest.mark.parametrize("given", [[], BEGAN, BEGAN[:1], [BEGAN[2], BEGAN[0]]])
def test_what_is_given_again_changes_nothing(tmp_path, given):
    write_overrides(tmp_path, BEGAN)
    expected = ["experiment=fb_overdrive", "++own=1", "module.updates=5", "+preset=fb_mm", "num_seeds=2"]
    assert lasting(merged(tmp_path, given)) == lasting(BEGAN) == expected


def test_what_is_given_anew_takes_the_place_of_what_was(tmp_path):
    write_overrides(tmp_path, BEGAN)
    asked = merged(tmp_path, ["num_seeds=2", "module.updates=7", "own=2"])
    assert asked == ["experiment=fb_overdrive", "+preset=fb_mm", "num_seeds=2", "module.updates=7", "++own=2"]


def test_of_an_override_that_was_given_twice_the_last_counts(tmp_path):
    """As the other processes of a run give all of them again, when its folder remembers them already."""
    twice = ["experiment=fb_overdrive", "module.updates=240", "num_seeds=1", "module.updates=40"]
    write_overrides(tmp_path, twice)
    assert merged(tmp_path, twice) == twice
    assert merged(tmp_path, ["module.updates=50"])[-1] == "module.updates=50"


def test_the_newest_run_is_the_one_that_began_last(tmp_path):
    folders = ["2026-01-02_03-04-05-000006", "2026-01-02_03-04-05-000007", "best", "2026-01-02_03-04-05-000007 copy"]
    for name in folders:
        write_overrides(tmp_path / "x" / name, ["experiment=x"])
    assert newest_run(str(tmp_path), "x", "x").name == folders[1]
    for name in folders[:2]:
        shutil.rmtree(tmp_path / "x" / name)
    os.utime(tmp_path / "x" / folders[3] / "run.yaml", (1, 1))
    assert newest_run(str(tmp_path), "x", "x").name == "best"  # where there is no other


@pytest.mark.parametrize("arm", ["arm", "paper/arm"])
def test_the_study_of_a_checkpoint_is_found_below_arms_of_all_names(tmp_path, arm):
    write_overrides(tmp_path / "study", [])
    assert study_of(tmp_path / "study" / arm / "seed_0" / "checkpoints" / "last.ckpt") == tmp_path / "study"
    assert study_of(tmp_path / "other" / arm / "seed_0" / "checkpoints" / "last.ckpt") is None

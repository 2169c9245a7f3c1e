"""Stop anywhere, go on, and get every later number as the uninterrupted run would have given it."""

import json
import random
import re
import signal
import time
from pathlib import Path

import pytest

from callbacks.run_log import read_rows
from launch.checkpoints import load_checkpoint
from launch.runs import read_resumed, write_overrides

ARMS = ("fb_narrow", "fb_aw_narrow")


@pytest.fixture(scope="module")
def uninterrupted(program, two_arms, tmp_path_factory) -> Path:
    finished = program(*two_arms, f"output_root={tmp_path_factory.mktemp('whole')}")
    assert finished.code == 0, finished.err
    return finished.folder


@pytest.fixture(scope="module")
def interrupted(program, spawn, wait_for_updates, two_arms, tmp_path_factory):
    """A run that was killed, went on, was stopped by Ctrl-C, and went on to its end: what each part said."""
    root = tmp_path_factory.mktemp("interrupted")
    killed = spawn(*two_arms, f"output_root={root}")
    wait_for_updates(killed, root, "fb_narrow", 63)
    killed.kill()
    killed.wait()
    (folder,) = (root / "fb_overdrive").iterdir()
    at_kill = {
        "updates": int(read_rows(folder / "fb_narrow/seed_0/train.csv")[1][-1]["updates"]),
        "checkpoint": load_checkpoint(folder / "fb_narrow/seed_0/checkpoints/last.ckpt")["learning_method"]["updates"],
    }
    with open(folder / "fb_narrow/seed_0/train.csv", "a") as file:
        file.write("115,0,1.2")  # what a kill in the middle of a line leaves

    stopped = spawn(*two_arms, f"output_root={root}", "ckpt_path=last")
    wait_for_updates(stopped, root, "fb_aw_narrow", 53)
    first_results = (folder / "fb_narrow/seed_0/results.json").stat().st_mtime_ns
    stopped.send_signal(signal.SIGINT)
    out, err = stopped.communicate(timeout=60)

    finished = program("experiment=fb_overdrive", f"ckpt_path={folder}")
    assert finished.code == 0, finished.err
    return {
        "folder": folder,
        "at_kill": at_kill,
        "code": stopped.returncode,
        "out": out,
        "err": err,
        "finished": finished,
        "kept": first_results == (folder / "fb_narrow/seed_0/results.json").stat().st_mtime_ns,
    }


def test_run_that_was_killed_and_stopped_equals_the_uninterrupted_one(assert_same_runs, interrupted, uninterrupted):
    assert interrupted["at_kill"]["updates"] < 240
    assert interrupted["at_kill"]["checkpoint"] <= interrupted["at_kill"]["updates"]
    assert_same_runs(interrupted["folder"], uninterrupted, ARMS)


def test_the_report_is_that_of_the_uninterrupted_one(interrupted, uninterrupted):
    reports = []
    for folder in (interrupted["folder"], uninterrupted):
        text = (folder / "report.md").read_text().replace(str(folder.parents[1]), "ROOT")
        reports.append(re.sub(r"[\d., ]+ s \(", " TIME (", text))
    assert reports[0] == reports[1]


def test_finished_arms_are_kept(interrupted):
    assert interrupted["kept"]
    assert "1 of 2 runs done already" in interrupted["finished"].out
    assert "fb_aw_narrow, seed 0: resuming after" in interrupted["finished"].out


def test_ctrl_c_ends_the_study_with_one_line_that_says_how_to_go_on(interrupted):
    assert interrupted["code"] == 130
    expected = f"Stopped. Go on with: python train.py ckpt_path={interrupted['folder']}\n"
    assert interrupted["err"] == expected


def test_program_says_what_it_does_and_where(uninterrupted, interrupted):
    out, err = interrupted["finished"].out, interrupted["finished"].err
    assert err == ""
    first, *_, last = out.strip().splitlines()
    assert first.startswith("fb_overdrive: ")
    assert last == str(interrupted["folder"])
    assert (uninterrupted / "report.md").exists()
    assert not list(uninterrupted.rglob(".saving*"))
    assert not list(uninterrupted.rglob("*.log"))


def test_finished_study_only_reports_again(program, uninterrupted):
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("seed_0/**/*") if path.is_file()}
    again = program("experiment=fb_overdrive", f"ckpt_path={uninterrupted}")
    assert (again.code, again.folder) == (0, uninterrupted)
    assert "2 of 2 runs done already" in again.out
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_finished_study_goes_on_to_more_updates(assert_same_runs, program, one_arm, tmp_path):
    root = f"output_root={tmp_path}"
    short = program(*one_arm, root, "module.updates=40")
    # The command line of before with more updates: its deletions of arms are not applied twice.
    longer = program(*one_arm, root, "module.updates=60", "ckpt_path=last")
    assert (short.code, longer.code) == (0, 0), short.err + longer.err
    assert longer.folder == short.folder
    assert "resuming after 40 updates with module.updates=60 (was 40).\n" in longer.out
    whole = program(*one_arm, root, "module.updates=60")
    assert whole.folder != short.folder
    assert_same_runs(longer.folder, whole.folder, ["fb_aw_narrow"])
    # Remembered for the next time.
    assert "2 of 2" not in program("experiment=fb_overdrive", f"ckpt_path={longer.folder}").out
    assert json.loads((longer.folder / "fb_aw_narrow/seed_0/results.json").read_text())["updates"] == 60
    # What is changed is told for good, and what can't be is refused.
    other = program(*one_arm, root, "module.updates=80", "module.learning_rate=2e-3", f"ckpt_path={longer.folder}")
    changed = "after 60 updates with module.learning_rate=0.002 (was 0.001), module.updates=80 (was 60).\n"
    assert f"resuming {changed}" in other.out
    report = (longer.folder / "report.md").read_text()
    assert f"Resumed after 40 updates with module.updates=60 (was 40).\n\nResumed {changed}" in report
    summary = json.loads((longer.folder / "results.json").read_text())
    assert summary["resumed"] == read_resumed(longer.folder)
    assert summary["resumed"][1]["changes"]["module.learning_rate"] == {"before": 0.001, "now": 0.002}
    assert json.loads((whole.folder / "results.json").read_text())["resumed"] == []
    before = {path: path.read_bytes() for path in longer.folder.glob("*.*")}
    for _ in ("finished", "pending"):
        fewer = program(*one_arm, "module.updates=40", f"ckpt_path={longer.folder}")
        assert (fewer.code, "module.updates=40: expected at least 80, which fb_aw_narrow" in fewer.err) == (1, True)
        (longer.folder / "fb_aw_narrow/seed_0/results.json").unlink(missing_ok=True)
    assert {path: path.read_bytes() for path in longer.folder.glob("*.*")} == before


def test_run_that_was_killed_before_its_first_checkpoint_starts_over(program, one_arm, tmp_path):
    root = f"output_root={tmp_path}"
    whole = program(*one_arm, root, "module.updates=40")
    run = whole.folder / "fb_aw_narrow" / "seed_0"
    (run / "checkpoints" / "last.ckpt").unlink()
    (run / "results.json").unlink()
    expected = (run / "train.csv").read_text().splitlines()
    again = program("experiment=fb_overdrive", f"ckpt_path={whole.folder}")
    assert again.code == 0
    said = "fb_aw_narrow, seed 0: stopped before its first checkpoint, starts over."
    assert said in again.out
    assert said not in whole.out
    found = (run / "train.csv").read_text().splitlines()
    column = expected[0].split(",").index("seconds")
    strip = [[line.split(",")[:column] + line.split(",")[column + 1 :] for line in text] for text in (found, expected)]
    assert strip[0] == strip[1]


def test_a_checkpoint_of_lightnings_own_is_not_loaded_unawares(program, one_arm, tmp_path):
    run = tmp_path / "fb_aw_narrow" / "seed_0"
    run.mkdir(parents=True)
    (run / "hpc_ckpt_1.ckpt").touch()
    write_overrides(tmp_path, list(one_arm))
    finished = program(f"ckpt_path={tmp_path}")
    assert finished.code == 1
    assert f"{run}/hpc_ckpt_1.ckpt: expected none but last.ckpt, found what Lightning would load" in finished.err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_kills_at_random_instants(
    assert_same_runs, program, spawn, wait_for_updates, two_arms, uninterrupted, tmp_path
):
    generator = random.Random(0)
    arguments = [*two_arms, f"output_root={tmp_path}"]
    for number in range(10):
        process = spawn(*arguments, *(["ckpt_path=last"] if number else []))
        arm, updates = ARMS[number // 5], 10 + 22 * (number % 5)
        wait_for_updates(process, tmp_path, arm, updates)
        time.sleep(0.1 * generator.random())
        process.kill()
        process.wait()
        (folder,) = (tmp_path / "fb_overdrive").iterdir()
    assert program("experiment=fb_overdrive", f"ckpt_path={folder}").code == 0
    assert_same_runs(folder, uninterrupted, ARMS)

"""evaluate.py, as a person uses it."""

import contextlib
import io
import json
import sys
from pathlib import Path

import pytest
import torch

import evaluate
from launch.errors import run_reporting_errors


@pytest.fixture(scope="module")
def run_folder(program, one_arm, tmp_path_factory) -> Path:
    finished = program(*one_arm, f"output_root={tmp_path_factory.mktemp('evaluate')}", "module.updates=40")
    assert finished.code == 0, finished.err
    return finished.folder


def call(*arguments: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    argv, sys.argv = sys.argv, ["evaluate.py", *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run_reporting_errors(evaluate.main)
    finally:
        sys.argv = argv
    return code, out.getvalue(), err.getvalue()


def test_scores_draws_and_films_a_checkpoint(run_folder):
    code, out, err = call(f"ckpt_path={run_folder}", "episodes=3", "seconds=1")
    assert (code, err) == (0, "")
    folder = Path(out.strip().splitlines()[-1])
    written = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {"results.json", "report.md", "rewards.png", "contact_sheet.png", "goals_centre.mp4"} <= written
    metrics = json.loads((folder / "results.json").read_text())["metrics"]
    assert len(metrics["goals/score"]) == 3
    # The run's own final evaluation met the same starts and inferred its tasks from the same samples.
    own = json.loads((run_folder / "fb_aw_narrow" / "seed_0" / "results.json").read_text())["metrics"]
    assert metrics["goals/score"] == pytest.approx(own["goals/score"], abs=1e-6)


def test_a_reward_of_ones_own_is_inferred_and_scored(run_folder):
    code, out, err = call(
        f"ckpt_path={run_folder}", "reward=x > 0.5 and tolerance(y, -0.2, 0.2, 0.1) > 0.5", "episodes=2", "seconds=1"
    )
    assert (code, err) == (0, "")
    assert "goals/reward/return" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reward=hight > 1"], "unknown name 'hight'; available: effort, x, y"),
        (["reward=x >"], "not a valid expression"),
        (["protocol=sitting"], "Unknown protocol=sitting: expected one of goals."),
        (["reward=x > 30"], "is 0 in all of"),
        (["reward=1"], "says nothing"),
    ],
)
def test_wrong_input_is_one_sentence(run_folder, arguments, message):
    code, _, err = call(f"ckpt_path={run_folder}", *arguments)
    assert code == 1
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rewards=x"], "Unknown argument rewards=x: expected key=value, key one of ckpt_path"),
        (["reward"], "Unknown argument reward: expected key=value"),
        (["episodes=abc"], "episodes=abc: expected a whole number above 0, at most 65536."),
        (["episodes=0"], "episodes=0: expected a whole number above 0, at most 65536."),
        (["episodes=99999999999"], "episodes=99999999999: expected a whole number above 0, at most 65536."),
        (["seconds=inf"], "seconds=inf: expected a number above 0, at most 65536."),
        (["ckpt_path=x", "ckpt_path"], "Unknown argument ckpt_path: expected key=value"),
    ],
)
def test_wrong_command_line_is_one_sentence(run_folder, arguments, message):
    code, _, err = call(f"ckpt_path={run_folder}", *arguments)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_missing_and_foreign_checkpoints(tmp_path):
    assert "expected a checkpoint or a folder with one" in call(f"ckpt_path={tmp_path}")[2]
    foreign = tmp_path / "foreign.ckpt"
    torch.save({"weights": torch.zeros(3)}, foreign)
    assert "expected a checkpoint of this project, found another file" in call(f"ckpt_path={foreign}")[2]
    assert "ckpt_path is missing" in call()[2]


def test_evaluations_are_not_written_through_a_link(tmp_path):
    """Which is seen before the checkpoint is read."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "last.ckpt").touch()
    (run / "evaluations").symlink_to(tmp_path)
    code, _, err = call(f"ckpt_path={run}")
    assert code == 1
    assert err.startswith(f"{run / 'evaluations'}: expected a folder in {run}, found a link to {tmp_path}.")


def test_an_expert_is_evaluated_with_the_model_that_it_adapts(program, language_folder, tmp_path):
    """What its checkpoint does not hold, the model's weights, is read where they are."""
    trained = program(
        "experiment=svf_larger",
        "arms=null",
        "language_model=folder",
        f"language_model.path={language_folder}",
        *(f"protocol.{name}=4" for name in ("batch_size", "validation_questions", "test_questions")),
        "datamodule.other_questions=4",
        "updates=5",
        f"data_root={tmp_path}",
        f"output_root={tmp_path}",
    )
    assert trained.code == 0, trained.err
    code, out, err = call(f"ckpt_path={trained.folder}", f"data_root={tmp_path}")
    assert (code, err) == (0, "")
    found = json.loads((Path(out.strip().splitlines()[-1]) / "results.json").read_text())["metrics"]
    expected = json.loads((trained.folder / "svf_larger" / "seed_0" / "results.json").read_text())["metrics"]
    assert found == expected
    code, out, err = call(f"ckpt_path={trained.folder}", f"data_root={tmp_path}", "protocol=x")
    assert code != 0
    assert "protocol=x: expected an experiment with an environment, found one without" in err

"""evaluate.py, as a person uses it."""

import contextlib
import io
import json
import shlex
import sys
from pathlib import Path

import pytest
import torch

import evaluate
from launch.errors import run_reporting_errors
from launch.evaluation import DEFAULTS

REWARD = "x > 0.5 and tolerance(y, -0.2, 0.2, 0.1) > 0.5"


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
    results = json.loads((folder / "results.json").read_text())
    metrics = results["metrics"]
    assert len(metrics["goals/score"]) == 3
    assert "From the starts of `goals`: `top_right`; `top_left`; " in (folder / "report.md").read_text()
    # The run's own final evaluation met the same starts and inferred its tasks from the same samples.
    own = json.loads((run_folder / "fb_aw_narrow" / "seed_0" / "results.json").read_text())
    assert metrics["goals/score"] == pytest.approx(own["metrics"]["goals/score"], abs=1e-6)
    assert results["recipe"] == own["recipe"]


def test_a_reward_of_ones_own_is_inferred_and_scored(run_folder):
    code, out, err = call(f"ckpt_path={run_folder}", f"reward={REWARD}", "episodes=2", "seconds=1")
    assert (code, err) == (0, "")
    assert "goals/reward/return" in out
    report = (Path(out.strip().splitlines()[-1]) / "report.md").read_text()
    assert f"From the starts of `goals`: `reward`, which is `{REWARD}`.\n" in report
    command = shlex.split(report.partition("```bash\n")[2].partition("\n```")[0])
    checkpoint = run_folder / "fb_aw_narrow/seed_0/checkpoints/last.ckpt"
    expected = [f"ckpt_path={checkpoint}", f"reward={REWARD}", "episodes=2", "seconds=1.0"]
    assert command == ["python", "evaluate.py", *expected]


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
    assert all(any(folder.iterdir()) for folder in run_folder.rglob("evaluations/"))
    assert all(any(folder.iterdir()) for folder in run_folder.rglob("evaluations/*/"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rewards=x"], "Unknown argument rewards=x: expected key=value, key one of ckpt_path"),
        (["reward"], "Unknown argument reward: expected key=value"),
        (["episodes=abc"], "episodes=abc: expected a whole number."),
        (["episodes=0"], "episodes=0: expected at least 1."),
        (["episodes=99999999999"], "episodes=99999999999: expected at most 65536."),
        (["seconds=inf"], "seconds=inf: expected a finite number."),
        (["threads=0"], "threads=0: expected at least 1."),
        (["ckpt_path=x", "ckpt_path"], "Unknown argument ckpt_path: expected key=value"),
    ],
)
def test_wrong_command_line_is_one_sentence(run_folder, arguments, message):
    code, _, err = call(f"ckpt_path={run_folder}", *arguments)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_help_has_all_arguments_and_the_program_as_it_is_called(monkeypatch, capsys):
    for called, name in (("evaluate.py", "python evaluate.py"), ("/bin/tenfold-evaluate", "tenfold-evaluate")):
        monkeypatch.setattr(sys, "argv", [called, "--help"])
        evaluate.main()
        said = capsys.readouterr().out
        assert f"\n    {name} ckpt_path=PATH [" in said
        assert all(f"{key}=" in said for key in DEFAULTS)


def test_missing_and_foreign_checkpoints(tmp_path):
    assert "expected a checkpoint or a folder with one" in call(f"ckpt_path={tmp_path}")[2]
    foreign = tmp_path / "foreign.ckpt"
    torch.save({"weights": torch.zeros(3)}, foreign)
    assert "expected a checkpoint of this project, found another file" in call(f"ckpt_path={foreign}")[2]
    assert all("ckpt_path is missing" in call(*empty)[2] for empty in ([], ["ckpt_path="]))


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

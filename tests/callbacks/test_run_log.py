"""The record on disk: whole rows, new columns, and what a resumed run drops."""

import re

import pytest

from callbacks.run_log import RunLog, read_rows, recorded


def write(log, *updates, **metrics):
    for update in updates:
        log.log_metrics({"updates": update, "env_steps": 0, "seconds": 0.5 * update, "train/loss": update, **metrics})


@pytest.fixture
def log(tmp_path):
    return RunLog(tmp_path)


def test_groups_of_metrics_have_files_of_their_own(log, tmp_path):
    log.log_metrics({"updates": 1, "env_steps": 2, "seconds": 3, "train/loss": 0.5, "eval/walk/return": 7.0})
    assert (tmp_path / "train.csv").read_text() == "updates,env_steps,seconds,loss\n1,2,3,0.5\n"
    assert (tmp_path / "eval.csv").read_text() == "updates,env_steps,seconds,walk/return\n1,2,3,7.0\n"


def test_rows_after_a_checkpoint_are_dropped_and_a_torn_line_too(log, tmp_path):
    write(log, 1, 2, 3)
    with open(tmp_path / "train.csv", "a") as file:
        file.write("2,0")
    log.rewind(2)
    assert [row["updates"] for row in read_rows(tmp_path / "train.csv")[1]] == ["1", "2"]
    write(RunLog(tmp_path), 3)
    assert [row["updates"] for row in read_rows(tmp_path / "train.csv")[1]] == ["1", "2", "3"]


def test_torn_line_is_not_read(log, tmp_path):
    write(log, 1)
    with open(tmp_path / "train.csv", "a") as file:
        file.write("2,0,1.0,12")  # of 123: a row, but not the one that was meant
    assert [row["loss"] for row in read_rows(tmp_path / "train.csv")[1]] == ["1"]


def test_new_metric_gets_a_column(log, tmp_path):
    write(log, 1)
    write(log, 2, **{"train/noise": 0.1})
    write(log, 3)
    header, rows = read_rows(tmp_path / "train.csv")
    assert header[-1] == "noise"
    assert [row["noise"] for row in rows] == ["", "0.1", ""]


def test_a_log_that_is_no_text_is_named(log, tmp_path):
    write(log, 1)
    with open(tmp_path / "train.csv", "ab") as file:
        file.write(b"2,\xff\n")
    with pytest.raises(ValueError, match=r"train.csv: expected text in UTF-8, found something else"):
        log.rewind(2)


def test_what_was_recorded_comes_back_as_it_was_logged(log, tmp_path):
    logged = [
        {"updates": 5, "env_steps": 1, "seconds": 0.5, "train/loss": 0.1},
        {"updates": 5, "env_steps": 1, "seconds": 0.75, "eval/walk/return": 7.0},
        {"updates": 10, "env_steps": 2, "seconds": 1.0, "train/loss": 1e-17, "train/noise": 0.2},
        {"updates": 15, "env_steps": 3, "seconds": 1.5, "train/loss": 0.3},
    ]
    for row in logged:
        log.log_metrics(row)
    assert recorded(tmp_path, 10) == logged[:3]
    assert recorded(tmp_path / "none", 10) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step,loss\n1,2\n", "train.csv: expected the columns updates, env_steps, seconds, found step, loss."),
        ("updates,env_steps,seconds,loss\n1,0,1.0,2\nx,0,1.0,2\n", "line 3: expected a number as updates, found 'x'."),
        ("updates,env_steps,seconds,loss\n1.5,0,1.0,2\n", "line 2: expected a number as updates, found '1.5'."),
        ("updates,env_steps,seconds,loss\n1,,1.0,2\n", "line 2: expected a number as env_steps, found ''."),
        ("updates,env_steps,seconds,loss\n1,0,1.0,abc\n", "line 2: expected a number as loss, found 'abc'."),
        ("updates,env_steps,seconds,loss\n1,0,1.0\n", "line 2: expected 4 values as in its first line, found"),
        (
            f"updates,env_steps,seconds,loss\n1,0,1.0,{'2' * 200_000}\n",
            "line 1: expected values, found others (field larger",
        ),
        ("updates,env_steps,seconds,loss\n1,0,1.0,2,3\n", "line 2: expected 4 values as in its first line, found"),
    ],
)
def test_a_damaged_record_is_named_and_stays(log, tmp_path, text, message):
    (tmp_path / "train.csv").write_text(text)
    for use in (lambda: log.rewind(1), lambda: recorded(tmp_path, 1), lambda: write(log, 2)):
        with pytest.raises(ValueError, match=re.escape(message)):
            use()
    assert (tmp_path / "train.csv").read_text() == text


def test_tables_of_ones_own_are_left_alone(log, tmp_path):
    write(log, 1, 2)
    (tmp_path / "notes.csv").write_text("what,when\nmine,today\n")
    log.rewind(1)
    assert (tmp_path / "notes.csv").read_text() == "what,when\nmine,today\n"
    assert [row["updates"] for row in recorded(tmp_path, 5)] == [1]

"""Weights & Biases: who is logged in, and what is sent of a run that was stopped and resumed."""

import ast
import struct

import pytest

# In a process of its own: wandb replaces the streams of the process that imports it.
SESSIONS = """
import os, sys
from pathlib import Path
from types import SimpleNamespace
import wandb
from callbacks.run_log import RunLog
from launch.wandb_logger import Wandb, logged_in

folder = Path(sys.argv[1])
os.environ["NETRC"] = str(folder / "netrc")
assert not logged_in()
os.environ["WANDB_BASE_URL"] = "https://wandb.example.org"
(folder / "netrc").write_text("machine wandb.example.org login user password " + "0" * 40)
assert logged_in()
os.environ["WANDB_BASE_URL"] = "https://other.example.org"
assert not logged_in()
os.environ["WANDB_API_KEY"] = "0" * 40
assert logged_in()
del os.environ["WANDB_API_KEY"]


def session(name, rewound_to, *rows):
    loggers = [RunLog(folder / name), Wandb("tenfold", "name", folder / name)]
    loggers[1].experiment  # the trainer asks for it before anything is rewound
    for logger in loggers:
        logger.rewind(rewound_to)
    for second, (updates, group, value) in enumerate(rows):
        metrics = {"updates": updates, "env_steps": 0, "seconds": updates + 0.1 * second, f"{group}/x": value}
        for logger in loggers:
            logger.log_metrics(metrics, step=updates)
    return loggers[1]


BEFORE = (5, "train", 1.0), (10, "train", 2.0), (10, "eval", 3.0), (15, "train", 4.0), (20, "train", 5.0)
AFTER = (15, "train", 6.0), (20, "train", 7.0), (20, "eval", 8.0), (25, "train", 9.0)
first = session("stopped", 0, *BEFORE).experiment.id
again = session("stopped", 10, *AFTER).experiment.id
other = session("other", 0, *BEFORE).experiment.id  # finishes the one before
assert first == again != other
wandb.finish()
session("other", 20)  # resumed when training was over
wandb.finish()

sent = {}


def online(**settings):
    # A server that has heard of what came first, but for the last row, which was on its way.
    def log(row, step, commit):
        sent[step] = row

    step = max(sent, default=-1) + 1
    return SimpleNamespace(
        dir=folder / "wandb/run-x/files", starting_step=step, define_metric=lambda *names, **settings: None, log=log
    )


wandb.init = online
session("online", 0, *BEFORE)
del sent[4]
session("online", 10, *AFTER)
print([sent[step].get("train/x", sent[step].get("eval/x")) for step in sorted(sent)])
print([sent[step]["updates"] for step in sorted(sent)])
"""


@pytest.fixture(scope="module")
def sessions(run_program, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wandb")
    done = run_program("-c", SESSIONS, str(folder), WANDB_API_KEY="")
    assert (done.returncode, done.stderr) == (0, "")
    return folder, [ast.literal_eval(line) for line in done.stdout.splitlines()]


def offline_rows(path):
    """Number, updates, and the metric of every row in W&B's file: records in LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, whole, rows = path.read_bytes(), 7, b"", []
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # a header does not fit into the rest of the block
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        at += 7
        whole += content[at : at + length]
        at += length
        if kind in (1, 4):  # the only or the last part
            history = Record.FromString(whole).history
            found = {"/".join(item.nested_key) or item.key: ast.literal_eval(item.value_json) for item in history.item}
            if found:
                name = next(name for name in found if name.endswith("/x"))
                rows.append((history.step.num, found["updates"], name, found[name]))
            whole = b""
    return rows


def test_offline_one_session_holds_the_whole_run(sessions):
    (path,) = (sessions[0] / "stopped" / "wandb").glob("offline-run-*/*.wandb")
    assert offline_rows(path) == [
        (0, 5, "train/x", 1),
        (1, 10, "train/x", 2),
        (2, 10, "eval/x", 3),
        (3, 15, "train/x", 6),
        (4, 20, "train/x", 7),
        (5, 20, "eval/x", 8),
        (6, 25, "train/x", 9),
    ]


def test_resumed_when_training_was_over_nothing_is_lost(sessions):
    (path,) = (sessions[0] / "other" / "wandb").glob("offline-run-*/*.wandb")
    assert [row[-1] for row in offline_rows(path)] == [1, 2, 3, 4, 5]


def test_online_what_the_server_has_is_not_sent_again(sessions):
    values, updates = sessions[1]
    assert values == [1, 2, 3, 4, 7, 8, 9]  # of 15 updates the server keeps what it has; the run's settings had changed
    assert updates == [5, 10, 10, 15, 20, 20, 25]

"""What is asked to end ends within seconds, wherever it is, and goes on as if it had not."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from tensordict import TensorDictBase

import evaluate
from datamodules.environments.overdrive import OverdriveEnv
from datamodules.evaluation import EvaluationTask
from datamodules.stored.collect import Shard, collect_dataset
from launch.errors import run_reporting_errors
from launch.stops import stopping_at_once

ARM = "fb_aw_narrow"
SLOW = "datamodule.task.path=tests.launch.slow_task.SlowTask"
PATIENCE = 5.0  # seconds


@pytest.fixture(scope="module")
def arguments(one_arm) -> tuple[str, ...]:
    return (*one_arm, SLOW, "checkpoint_every=15", "module.updates=80")


@pytest.fixture(scope="module")
def uninterrupted(program, arguments, tmp_path_factory) -> Path:
    finished = program(*arguments, f"output_root={tmp_path_factory.mktemp('whole')}")
    assert finished.code == 0, finished.err
    return finished.folder


def test_sigterm_ends_an_evaluation_within_seconds_and_it_is_made_again(
    program, spawn, wait_for_updates, assert_same_runs, arguments, uninterrupted, tmp_path
):
    process = spawn(*arguments, f"output_root={tmp_path}", SLOW="0.5")  # 25 s for an evaluation of 50 steps
    wait_for_updates(process, tmp_path, ARM, 40)
    time.sleep(0.5)
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - asked < PATIENCE
    (folder,) = (tmp_path / "fb_overdrive").iterdir()
    assert not (folder / ARM / "seed_0" / "eval.csv").exists()  # it was the first evaluation, and had not ended
    assert process.returncode == 143
    found_by = Path(__file__).resolve().parents[2]
    assert err == f"Stopped. Go on with: PYTHONPATH={found_by} python train.py ckpt_path={folder} 'trust=[tests]'\n"

    refused = program(f"ckpt_path={folder}")
    assert (refused.code, refused.err.count("\n")) == (1, 1)
    assert "trust=tests" in refused.err
    finished = program(f"ckpt_path={folder}", "trust=[other,tests]")
    assert finished.code == 0, finished.err
    assert "resuming after 30 updates" in finished.out  # of 40, after which the evaluation began
    assert_same_runs(folder, uninterrupted, [ARM])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_a_collection_in_the_middle_of_a_shard(number, tmp_path):
    steps = 0

    def policy(seen: TensorDictBase) -> TensorDictBase:
        nonlocal steps
        steps += 1
        if steps == 40:
            os.kill(os.getpid(), number)
        return seen.set("action", torch.zeros(2, 2))

    def make_shard(_: int, seed: int) -> Shard:
        return Shard(OverdriveEnv(2, seed), policy, 1000, torch.zeros(2, dtype=torch.int64))

    recipe = {"domain": "overdrive", "seed": 0, "shards": 1}
    before = signal.getsignal(number)
    with pytest.raises(SIGTERMException) as stopped, stopping_at_once():
        collect_dataset(tmp_path, "points", recipe, make_shard, expected_seconds=1)
    assert stopped.value.code == 128 + number
    assert steps == 40
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size]
    assert signal.getsignal(number) == before


def test_a_second_signal_does_not_interrupt_the_end():
    with stopping_at_once():
        with pytest.raises(SIGTERMException):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_ends_evaluate(uninterrupted, monkeypatch):
    monkeypatch.setattr(EvaluationTask, "run", lambda *_: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(60))
    monkeypatch.setattr("sys.argv", ["evaluate.py", f"ckpt_path={uninterrupted}", "trust=tests"])
    began = time.monotonic()
    with pytest.raises(SystemExit) as stopped:
        run_reporting_errors(evaluate.main)
    assert stopped.value.code == 143
    assert time.monotonic() - began < PATIENCE

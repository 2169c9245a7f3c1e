"""Running the program: in this process where that shows the same, in a process of its own where signals are sent."""

import contextlib
import io
import json
import logging.config
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from callbacks.run_log import read_rows
from launch.checkpoints import load_checkpoint
from launch.errors import run_reporting_errors

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "experiment=fb_overdrive",
    "module.updates=240",
    "datamodule.updates_per_step=5",
    "datamodule.evaluate_every=40",
    "checkpoint_every=10",
    "module.log_every=5",
    "datamodule.dataset.episodes=20",
    "datamodule.episodes=3",
    "datamodule.curve_episodes=2",
    "datamodule.inference_samples=200",
    "num_seeds=1",
)
ONE_ARM = ("~arms.fb_narrow", "~arms.fb_full", "~arms.fb_aw_full")
TWO_ARMS = ("~arms.fb_full", "~arms.fb_aw_full")


@dataclass
class Finished:
    """What a run of the program gave."""

    code: int
    out: str
    err: str

    @property
    def folder(self) -> Path:
        """The run's folder, the last line printed."""
        return Path(self.out.strip().splitlines()[-1])


@pytest.fixture(scope="session")
def tiny() -> tuple[str, ...]:
    """Arguments of a run of a second, without a choice of arms."""
    return TINY


@pytest.fixture(scope="session")
def one_arm() -> tuple[str, ...]:
    return (*TINY, *ONE_ARM)


@pytest.fixture(scope="session")
def two_arms() -> tuple[str, ...]:
    return (*TINY, *TWO_ARMS)


@pytest.fixture(scope="session")
def program() -> Iterator[Callable[..., Finished]]:
    """Runs train.py in this process, on one thread as the other processes do, so that results can be compared."""
    threads, argv = torch.get_num_threads(), sys.argv
    torch.set_num_threads(1)
    patch = pytest.MonkeyPatch()
    # Hydra closes all log handlers to set up its own; that of absl, if loaded, takes pytest's stderr with it.
    patch.setattr(logging.config.DictConfigurator, "configure", lambda self: None)

    def run(*arguments: str) -> Finished:
        sys.argv = ["train.py", *arguments]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = run_reporting_errors(train.main)
            except SystemExit as end:  # --help
                code = end.code
        return Finished(code, out.getvalue(), err.getvalue())

    yield run
    patch.undo()
    torch.set_num_threads(threads)
    sys.argv = argv


@pytest.fixture(scope="session")
def spawn() -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts train.py in a process of its own."""
    processes = []

    def start(*arguments: str, **environment: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "train.py", *arguments],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Shells start background jobs with Ctrl-C ignored, and children inherit that.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.default_int_handler),
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def wait_for_updates() -> Callable[..., None]:
    """Waits until a run has recorded so many updates."""

    def wait(process: subprocess.Popen, root: Path, arm: str, updates: int, seconds: float = 120) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for path in root.glob(f"*/*/{arm}/seed_0/train.csv"):
                lines = path.read_text().splitlines()
                if len(lines) > 1 and int(lines[-1].split(",")[0] or 0) >= updates:
                    return
            if process.poll() is not None:
                out, err = process.communicate()
                raise AssertionError(f"the program ended before:\n{out}\n{err}")
            time.sleep(0.002)
        raise AssertionError(f"{arm} did not reach {updates} updates in {seconds} s")

    return wait


class Fork(multiprocessing.get_context("fork").Process):
    """A program that begins with all that this process has imported, which is most of what a start takes."""

    def poll(self) -> int | None:
        return self.exitcode

    def communicate(self) -> tuple[str, str]:
        return "", "what it said stands above"


@pytest.fixture(scope="session")
def run_and_kill(program, spawn, wait_for_updates) -> Callable[..., Path]:
    """Runs train.py, kills it when it has recorded so many updates, and returns the folder of its study.

    In a process that is started, instead of a fork of this one, where `anew`: graphics libraries bear no fork, nor do
    the threads by which transformers loads a model.
    """

    def ended(*arguments: str) -> None:
        finished = program(*arguments)
        os.write(2, f"{finished.out}{finished.err}".encode())

    def run(*arguments: str, root: Path, arm: str, updates: int, seconds: float = 0.0, anew: bool = False) -> Path:
        arguments = (*arguments, f"output_root={root}")
        if anew:
            process = spawn(*arguments)
        else:
            process = Fork(target=ended, args=arguments)
            process.start()
        wait_for_updates(process, root, arm, updates)
        time.sleep(seconds)
        process.kill()
        process.wait() if anew else process.join()
        (folder,) = root.glob("*/*")
        return folder

    return run


def flat(state: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of a nested state by path, wall-clock times left out."""
    if isinstance(state, dict):
        for key, value in state.items():
            if key != "seconds":
                yield from flat(value, f"{prefix}/{key}")
    elif isinstance(state, list | tuple):
        for index, value in enumerate(state):
            yield from flat(value, f"{prefix}/{index}")
    else:
        yield prefix, state


def checkpoint_leaves(run: Path) -> dict[str, Any]:
    checkpoint = load_checkpoint(run / "checkpoints" / "last.ckpt")
    data = [key for key in checkpoint if key.endswith("DataModule")]
    made_of = checkpoint["learning_method"]["recipe"]["datamodule"]["_target_"]
    # Batches of the others are functions of seed and update.
    assert data or made_of.endswith(
        ("RandomEpisodesDataModule", "BaseClassImages", "LanguageDataModule", "AdaptationDataModule")
    )
    checkpoint["learning_method"].pop("recipe")  # holds paths
    return dict(flat(checkpoint))


def timeless(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: values for name, values in metrics.items() if not name.endswith("_seconds")}


@pytest.fixture(scope="session")
def assert_same_runs() -> Callable[..., None]:
    """Bit-identical weights, targets, optimiser moments, random states, experience, records and results."""

    def check(
        found: Path, expected: Path, arms: Sequence[str], holds: Sequence[str] = ("target_", "exp_avg_sq")
    ) -> None:
        for arm in arms:
            runs = [folder / arm / "seed_0" for folder in (found, expected)]
            leaves = [checkpoint_leaves(run) for run in runs]
            assert leaves[0].keys() == leaves[1].keys()
            for part in holds:
                assert any(part in name for name in leaves[0])
            for name, value in leaves[1].items():
                same = torch.equal(leaves[0][name], value) if torch.is_tensor(value) else leaves[0][name] == value
                assert same, f"{arm}: {name}"
            for file in ("train.csv", "eval.csv"):
                if not (runs[1] / file).exists():  # nothing was validated
                    assert not (runs[0] / file).exists()
                    continue
                (header, rows), (expected_header, expected_rows) = (read_rows(run / file) for run in runs)
                assert header == expected_header
                for row in (*rows, *expected_rows):
                    row.pop("seconds")
                assert rows == expected_rows
            metrics = [json.loads((run / "results.json").read_text())["metrics"] for run in runs]
            assert timeless(metrics[0]) == timeless(metrics[1])
        studies = [json.loads((folder / "results.json").read_text())["arms"] for folder in (found, expected)]
        assert studies[0].keys() == studies[1].keys()
        for arm, metrics in studies[0].items():
            assert timeless(metrics) == timeless(studies[1][arm])

    return check

"""Running the program: in this process where that shows the same, in a process of its own where signals are sent."""

import contextlib
import io
import json
import logging.config
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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


PROGRAM = """
import os, runpy, signal, sys
sys.argv = ["train.py", *arguments]
os.chdir(root)
os.environ.update(environment)
for stream, file in ((1, out), (2, err)):
    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs with Ctrl-C ignored
runpy.run_path("train.py", run_name="__main__")
"""


class Started:
    """train.py in a process of its own, with what tests need of `subprocess.Popen`.

    A process that has imported what the program begins with, and has run nothing, is forked instead of started: the
    imports are most of what a start takes.
    """

    def __init__(self, context: Any, arguments: Sequence[str], environment: dict[str, str], files: Path) -> None:
        self.files = [files / "out", files / "err"]
        variables = dict(zip(("out", "err"), map(str, self.files)))
        variables |= {"arguments": arguments, "environment": environment, "root": str(ROOT)}
        self.process = context.Process(target=exec, args=(PROGRAM, variables))
        self.process.start()
        self.pid = self.process.pid
        self.kill = self.process.kill

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    poll = returncode.fget

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.returncode is None:
            raise TimeoutError(f"the program has not ended after {timeout} s")
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        return tuple(path.read_text() for path in self.files)


@pytest.fixture(scope="session")
def spawn(tmp_path_factory) -> Iterator[Callable[..., Started]]:
    """Starts train.py in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.launch.imported"])
    processes = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(ROOT))
        multiprocessing.forkserver.ensure_running()

    def start(*arguments: str, **environment: str) -> Started:
        process = Started(context, arguments, environment, tmp_path_factory.mktemp("program"))
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

    def wait(process: Started, root: Path, arm: str, updates: int, seconds: float = 120) -> None:
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


@pytest.fixture(scope="session")
def run_and_kill(spawn, wait_for_updates) -> Callable[..., Path]:
    """Runs train.py, kills it when it has recorded so many updates, and returns the folder of its study."""

    def run(*arguments: str, root: Path, arm: str, updates: int, seconds: float = 0.0) -> Path:
        process = spawn(*arguments, f"output_root={root}")
        wait_for_updates(process, root, arm, updates)
        time.sleep(seconds)
        process.kill()
        process.wait()
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

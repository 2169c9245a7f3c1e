import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from datamodules.pixels import workers
from datamodules.pixels.workers import WorkerGroup


class Counter:
    """Says where it lives and what it was told."""

    def __init__(self, least: int = 0) -> None:
        self.least = least
        self.told: list[int] = []

    def tell(self, number: int) -> list[int]:
        if number < self.least:
            raise ValueError(f"number={number}: expected at least {self.least}.")
        self.told.append(number)
        return self.told

    def place(self) -> tuple[int, int]:
        return os.getpid(), threading.get_ident()

    def kept(self) -> int:
        return len(workers._objects)

    def end(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_each_object_is_called_with_its_own_in_its_own_worker(count):
    group = WorkerGroup(count, Counter, 5)
    assert group.call("tell", [4, 1, 2], [40, 10, 20]) == [[40], [10], [20]]
    assert group.call("tell", range(5), range(5)) == [[0], [10, 1], [20, 2], [3], [40, 4]]
    places = group.call("place", range(5))
    assert len(set(places)) == count
    assert [places[row] for row in range(5)] == [places[row % count] for row in range(5)]
    assert places == group.call("place", range(5))
    other = WorkerGroup(count, Counter, 1)
    assert other.call("place", [0]) == places[:1]  # all groups share the workers
    if count == 1:
        process, thread = places[0]
        assert process == os.getpid()
        assert thread != threading.get_ident()
    else:
        assert os.getpid() not in {process for process, _ in places}


@pytest.mark.parametrize("count", [1, 2])
def test_what_objects_raise_comes_as_it_is_and_work_goes_on(count):
    group = WorkerGroup(count, partial(Counter, least=3), 2)
    with pytest.raises(ValueError, match="number=1: expected at least 3"):
        group.call("tell", [0, 1], [5, 1])
    assert group.call("tell", [1], [6])[0][-1] == 6
    with pytest.raises(TypeError):
        WorkerGroup(count, partial(Counter, unknown=1), 2)


@pytest.mark.parametrize("count", [1, 2])
def test_objects_go_with_their_group(count):
    lasting = WorkerGroup(count, Counter, count)
    gc.collect()  # what other tests left
    lasting.call("tell", range(count), [0] * count)
    before = lasting.call("kept", range(count))
    passing = WorkerGroup(count, Counter, 3 * count)
    assert lasting.call("kept", range(count)) == [kept + 3 for kept in before]
    del passing
    gc.collect()
    lasting.call("tell", range(count), [0] * count)
    assert lasting.call("kept", range(count)) == before


def run(script: str, **settings) -> subprocess.Popen:
    """A program that has made a group of two objects in two processes."""
    begin = (
        "import os, signal, time\n"
        "from tests_workers import Counter\n"
        "from datamodules.pixels.workers import WorkerGroup\n"
        "group = WorkerGroup(2, Counter, 2)\n"
        "print(*[process for process, _ in group.call('place', range(2))], flush=True)\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", begin + script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **settings,
    )


@pytest.fixture
def environment(tmp_path):
    """Where programs find the project, and this file under a name of its own."""
    (tmp_path / "tests_workers.py").write_text(Path(__file__).read_text())
    root = Path(__file__).resolve().parents[3]
    return {"cwd": root, "env": {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{tmp_path}"}}


def alive(process: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def test_workers_end_with_a_program_that_is_killed(environment):
    program = run("time.sleep(100)\n", **environment)
    processes = [int(number) for number in program.stdout.readline().split()]
    assert all(map(alive, processes))
    program.kill()
    program.wait()
    until = time.monotonic() + 20
    while any(map(alive, processes)) and time.monotonic() < until:
        time.sleep(0.01)
    assert not any(map(alive, processes))


def test_a_worker_that_was_killed_is_one_sentence(environment):
    program = run(
        "try:\n    group.call('end', [1])\nexcept ValueError as error:\n    print(error)\n",
        **environment,
    )
    out, err = program.communicate(timeout=60)
    assert program.returncode == 0
    assert "render_workers: a process that draws pictures has stopped" in out
    assert not err


def test_ctrl_c_is_for_the_program_alone(environment):
    # Shells start background jobs with Ctrl-C ignored, and children inherit that.
    heard = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    script = (
        "try:\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(100)\n"
        "except KeyboardInterrupt:\n"
        "    print(group.call('tell', [0, 1], [1, 2]))\n"
    )
    program = run(script, start_new_session=True, preexec_fn=heard, **environment)
    assert [program.stdout.readline() for _ in range(2)][1] == "ready\n"
    os.killpg(program.pid, signal.SIGINT)
    out, err = program.communicate(timeout=60)
    assert (program.returncode, out, err) == (0, "[[1], [2]]\n", "")


def test_a_worker_loads_no_torch():
    script = (
        "import sys\n"
        "import datamodules.pixels.tasks\n"
        "import datamodules.pixels.workers\n"
        "assert not {'torch', 'tensordict', 'torchrl'} & set(sys.modules)\n"
    )
    root = Path(__file__).resolve().parents[3]
    subprocess.run([sys.executable, "-c", script], cwd=root, env={**os.environ, "MUJOCO_GL": "egl"}, check=True)

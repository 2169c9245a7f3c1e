import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
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

    def modules(self) -> set[str]:
        return set(sys.modules)

    def end(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def fail(self) -> None:
        raise Strange("first", "second")


class Strange(Exception):
    """Can be pickled, but not be made again from what was."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(f"{one} and {other}")


class Second(Counter):
    """Only the first of a process can be made."""

    made = 0

    def __init__(self) -> None:
        super().__init__(1)
        self.tell(1 - Second.made)
        Second.made = 1


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


@contextlib.contextmanager
def run(script: str, **settings) -> Iterator[subprocess.Popen]:
    """A program that has made a group of two objects in two processes."""
    begin = (
        "import os, signal, time\n"
        "from tests_workers import Counter\n"
        "from datamodules.pixels.workers import WorkerGroup\n"
        "group = WorkerGroup(2, Counter, 2)\n"
        "print(*[process for process, _ in group.call('place', range(2))], flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", begin + script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **settings,
    ) as program:
        try:
            yield program
        finally:
            program.kill()


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


def assert_ended(processes: list[int]) -> None:
    until = time.monotonic() + 20
    while any(map(alive, processes)) and time.monotonic() < until:
        time.sleep(0.01)
    assert not any(map(alive, processes))


def test_workers_end_with_a_program_that_is_killed(environment):
    with run("time.sleep(100)\n", **environment) as program:
        processes = [int(number) for number in program.stdout.readline().split()]
        assert all(map(alive, processes))
        program.kill()
        program.wait()
        assert_ended(processes)


def test_a_worker_that_was_killed_is_one_sentence_and_replaced(environment):
    script = (
        "try:\n"
        "    group.call('end', [1])\n"
        "except ValueError as error:\n"
        "    print(error)\n"
        "print(WorkerGroup(2, Counter, 2).call('tell', [0, 1], [1, 2]))\n"
    )
    with run(script, **environment) as program:
        out, err = program.communicate(timeout=60)
    assert program.returncode == 0
    assert "render_workers: a process that draws pictures has stopped" in out
    assert out.endswith("[[1], [2]]\n")
    assert not err


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_signals_to_the_group_are_for_the_program_alone(environment, name):
    # Shells start background jobs with Ctrl-C ignored, and children inherit that.
    heard = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    script = (
        "signal.signal(signal.SIGTERM, signal.default_int_handler)\n"
        "try:\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(100)\n"
        "except KeyboardInterrupt:\n"
        "    print(group.call('tell', [0, 1], [1, 2]))\n"
    )
    with run(script, start_new_session=True, preexec_fn=heard, **environment) as program:
        assert [program.stdout.readline() for _ in range(2)][1] == "ready\n"
        os.killpg(program.pid, getattr(signal, name))
        out, err = program.communicate(timeout=60)
    assert (program.returncode, out, err) == (0, "[[1], [2]]\n", "")


@pytest.mark.parametrize("method", ["spawn", "fork"])
@pytest.mark.parametrize("daemon", [False, True])
def test_children_have_workers_of_their_own_and_end(environment, tmp_path, method, daemon):
    """As collectors in other processes do."""
    program = (
        "import multiprocessing\n"
        "from tests_workers import Counter\n"
        "from datamodules.pixels.workers import WorkerGroup\n"
        "def work():\n"
        "    print(WorkerGroup(2, Counter, 2).call('tell', [0, 1], [1, 2]), flush=True)\n"
        "if __name__ == '__main__':\n"
        f"    child = multiprocessing.get_context('{method}').Process(target=work, daemon={daemon})\n"
        "    child.start()\n"
        "    child.join()\n"
        "    print(child.exitcode)\n"
    )
    (tmp_path / "program.py").write_text(program)
    ended = subprocess.run(
        [sys.executable, str(tmp_path / "program.py")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **environment,
    )
    assert (ended.stdout, ended.stderr) == ("[[1], [2]]\n0\n", "")


def test_a_worker_runs_nothing_of_the_program_and_loads_no_torch(environment, tmp_path):
    """Whatever the program imports, and without `if __name__ == "__main__"`."""
    program = (
        "import torch\n"
        "from tests_workers import Counter\n"
        "from datamodules.environments.pixel_control import PixelControlEnv\n"
        "from datamodules.pixels.workers import WorkerGroup\n"
        "print('once', flush=True)\n"
        "env = PixelControlEnv('cheetah', 'run', 2, size=16, render_workers=2)\n"
        "env.reset()\n"
        "for modules in WorkerGroup(2, Counter, 2).call('modules', [0, 1]):\n"
        "    assert 'dm_control' in modules\n"
        "    assert not {'torch', 'tensordict', 'torchrl'} & modules, modules\n"
    )
    (tmp_path / "program.py").write_text(program)
    ended = subprocess.run(
        [sys.executable, str(tmp_path / "program.py")],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        **environment,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "once\n", "")


@pytest.mark.parametrize("count", [1, 2])
def test_errors_that_can_not_travel_keep_their_words(count):
    group = WorkerGroup(count, Counter, 2)
    with pytest.raises((RuntimeError, Strange), match="first and second"):
        group.call("fail", [1])
    assert group.call("tell", [1], [6]) == [[6]]


@pytest.mark.parametrize("count", [1, 2])
def test_objects_that_could_not_all_be_made_are_forgotten(count):
    lasting = WorkerGroup(count, Counter, count)
    gc.collect()
    lasting.call("tell", range(count), [0] * count)
    before = lasting.call("kept", range(count))
    with pytest.raises(ValueError, match="number=0: expected at least 1"):
        WorkerGroup(count, Second, 3 * count)
    gc.collect()
    lasting.call("tell", range(count), [0] * count)
    assert lasting.call("kept", range(count)) == before


def test_arguments_of_other_numbers_are_an_error():
    group = WorkerGroup(1, Counter, 2)
    with pytest.raises(ValueError, match="shorter"):
        group.call("tell", [0, 1], [3])

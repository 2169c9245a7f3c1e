"""Objects that live in workers: one thread of this process, or several processes."""

import functools
import itertools
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

_Key = tuple[int, int]  # a group's number, and the place of an object in it
_objects: dict[_Key, Any] = {}  # of the worker that this is
_numbers = itertools.count()


class WorkerGroup:
    """Objects that are called many at a time, each in the worker where it was made.

    A single worker is a thread, the same for all groups of this process; several are processes, which all groups share
    too. Each does one thing after the other, so that what is bound to a thread, as graphics contexts are, can be kept
    there. Workers end with the process that started them, however it ends.

    Args:
        workers: how many.
        make: makes an object, called in its worker; must be picklable where there are several.
        size: number of objects.

    Raises:
        ValueError: a process that works has stopped. What `make` and the objects raise comes as it is, or as a
            RuntimeError of the same words where it can't travel.
    """

    def __init__(self, workers: int, make: Callable[[], Any], size: int) -> None:
        process = os.getpid()  # threads and the ends of pipes do not survive a fork
        self._workers = [_thread(process)] if workers == 1 else [_process(process, i) for i in range(workers)]
        self._number = next(_numbers)
        # Collected at any moment, in the middle of a submission too: workers are told at the next one.
        for worker in self._workers:
            weakref.finalize(self, worker.forgotten.append, self._number).atexit = False
        self._submit(_make, make, range(size))

    def call(self, method: str, rows: Sequence[int], *arguments: Sequence[Any]) -> list[Any]:
        """What a method returns in each of `rows`, of which each has its own of every argument."""
        return self._submit(_call, method, rows, *arguments)

    def _submit(self, function: Callable, what: Any, rows: Sequence[int], *arguments: Sequence[Any]) -> list[Any]:
        calls: list[list[tuple]] = [[] for _ in self._workers]
        for row, *own in zip(rows, *arguments, strict=True):
            calls[row % len(calls)].append(((self._number, row), *own))
        try:
            futures = [worker.submit(function, what, own) for worker, own in zip(self._workers, calls) if own]
            results = {key: result for future in futures for key, result in future.result()}
        except BrokenExecutor as error:
            _process.cache_clear()  # groups to come have others
            raise ValueError(
                "render_workers: a process that draws pictures has stopped; its own error, if it had one, stands above."
                " With render_workers=1 the training process draws."
            ) from error
        return [results[self._number, row] for row in rows]


class _Worker:
    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.forgotten: deque[int] = deque()  # groups that are no more

    def submit(self, function: Callable, *arguments: Any) -> Any:
        gone = [self.forgotten.popleft() for _ in range(len(self.forgotten))]
        if gone:
            self.executor.submit(_forget, gone)
        return self.executor.submit(function, *arguments)


@functools.cache
def _thread(process: int) -> _Worker:
    return _Worker(ThreadPoolExecutor(1, thread_name_prefix="drawing"))


@functools.cache
def _process(process: int, index: int) -> _Worker:
    return _Worker(_Elsewhere())


class _Elsewhere(ThreadPoolExecutor):
    """A process, and the thread that asks it and waits for its answers.

    It is a program of its own rather than one of `multiprocessing`'s, which would run this program's main module again,
    with whatever that imports, could not be had by daemons, and would be waited for where it waits itself. It ends when
    its connection does, and no signal that is sent to a group of processes reaches it.
    """

    def __init__(self) -> None:
        super().__init__(1, thread_name_prefix="drawing")
        self._connection, theirs = multiprocessing.Pipe()
        with theirs:
            begin = f"import sys; sys.path[:] = {sys.path}; from datamodules.pixels import workers; "
            self._program = subprocess.Popen(
                [sys.executable, "-c", f"{begin}workers.serve({theirs.fileno()})"],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                # The cores belong to the other workers: Mesa is to draw in the thread that asks.
                env={"LP_NUM_THREADS": "0", **os.environ},
            )

    def submit(self, function: Callable, *arguments: Any) -> Future:  # type: ignore[override]
        return super().submit(self._ask, function, *arguments)

    def _ask(self, *work: Any) -> Any:
        try:
            self._connection.send(work)
            answer, error = self._connection.recv()
        except (OSError, EOFError) as ended:
            raise BrokenExecutor from ended
        if error is not None:
            raise error
        return answer


# --- in the worker ---


def serve(number: int) -> None:
    """Answer what is asked through the connection with this file's number, until nobody is there to ask."""
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):  # for the process that trains
        signal.signal(name, signal.SIG_IGN)
    connection = Connection(number)
    while True:
        try:
            function, *arguments = connection.recv()
        except (OSError, EOFError):
            return
        try:
            answer = function(*arguments), None
        except Exception as error:
            answer = None, _portable(error)
        try:
            connection.send(answer)
        except OSError:
            return


def _portable(error: Exception) -> Exception:
    """An error as it is if it arrives as such, its words otherwise."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _make(make: Callable[[], Any], calls: list[tuple]) -> list[tuple[_Key, None]]:
    _objects.update((key, make()) for (key,) in calls)
    return [(key, None) for (key,) in calls]


def _call(method: str, calls: list[tuple]) -> list[tuple[_Key, Any]]:
    return [(key, getattr(_objects[key], method)(*own)) for key, *own in calls]


def _forget(numbers: list[int]) -> None:
    for key in [key for key in _objects if key[0] in numbers]:
        del _objects[key]

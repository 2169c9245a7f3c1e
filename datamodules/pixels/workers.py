"""Objects that live in workers: one thread of this process, or several processes."""

import functools
import itertools
import multiprocessing
import os
import signal
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor, ThreadPoolExecutor
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
        ValueError: a process that works has stopped. What `make` and the objects raise comes as it is.
    """

    def __init__(self, workers: int, make: Callable[[], Any], size: int) -> None:
        process = os.getpid()  # threads and the ends of pipes do not survive a fork
        self._workers = [_thread(process)] if workers == 1 else [_process(process, i) for i in range(workers)]
        self._number = next(_numbers)
        self._submit(_make, make, range(size))
        # Collected at any moment, in the middle of a submission too: workers are told at the next one.
        for worker in self._workers:
            weakref.finalize(self, worker.forgotten.append, self._number).atexit = False

    def call(self, method: str, rows: Sequence[int], *arguments: Sequence[Any]) -> list[Any]:
        """What a method returns in each of `rows`, of which each has its own of every argument."""
        return self._submit(_call, method, rows, *arguments)

    def _submit(self, function: Callable, what: Any, rows: Sequence[int], *arguments: Sequence[Any]) -> list[Any]:
        calls: list[list[tuple]] = [[] for _ in self._workers]
        for row, *own in zip(rows, *arguments):
            calls[row % len(calls)].append(((self._number, row), *own))
        try:
            futures = [worker.submit(function, what, own) for worker, own in zip(self._workers, calls) if own]
            results = {key: result for future in futures for key, result in future.result()}
        except BrokenExecutor as error:
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
    context = multiprocessing.get_context("spawn")
    return _Worker(ProcessPoolExecutor(1, mp_context=context, initializer=_begin))


# --- in the worker ---


def _begin() -> None:
    """Once in every process that works, before it has loaded any graphics library."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that trains
    # The cores belong to the other workers: Mesa is to draw in the thread that asks.
    os.environ.setdefault("LP_NUM_THREADS", "0")
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _make(make: Callable[[], Any], calls: list[tuple]) -> list[tuple[_Key, None]]:
    _objects.update((key, make()) for (key,) in calls)
    return [(key, None) for (key,) in calls]


def _call(method: str, calls: list[tuple]) -> list[tuple[_Key, Any]]:
    return [(key, getattr(_objects[key], method)(*own)) for key, *own in calls]


def _forget(numbers: list[int]) -> None:
    for key in [key for key in _objects if key[0] in numbers]:
        del _objects[key]

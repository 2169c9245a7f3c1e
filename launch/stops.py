"""Ending a program at once when it is asked to end."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import lightning as L
from lightning.pytorch.utilities.exceptions import SIGTERMException

# The second is how schedulers say that time will be up.
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_DEAF_SECONDS = 5.0


@contextmanager
def stopping_at_once() -> Iterator[None]:
    """Inside, these signals raise SIGTERMException wherever the program is, as Ctrl-C raises its own.

    What is written is written beside its place and renamed: there is no instant at which a program could not stop.
    Further ones are not heard for a while, so that nothing interrupts the end.
    """
    heard = -math.inf

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal heard
        if time.monotonic() - heard > _DEAF_SECONDS:  # then the first was lost, as in an object's finaliser
            heard = time.monotonic()
            raise SIGTERMException(128 + number)

    before = {number: signal.signal(number, stop) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_signals(trainer: L.Trainer) -> None:
    """Keep Lightning from handling signals itself.

    It would wait for the end of a batch or of an evaluation, longer than schedulers do, and on SLURM write a checkpoint
    of its own and start the job again.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None

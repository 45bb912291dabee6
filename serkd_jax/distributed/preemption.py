"""Notices that this job must end soon: SIGTERM, which schedulers and clouds send before they kill.

Where several processes have joined, JAX's own service hears of it, spreads the notice, and tells
all to stop at the same call. One process alone hears of it here.
"""

import itertools
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import jax
from jax.experimental import multihost_utils

EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: what is done is kept; start it again


class Preempted(Exception):
    """Training was told to stop, and has saved where it was."""


_noticed = threading.Event()
_heeding = threading.Event()
_calls = itertools.count()


def listen() -> None:
    """From now on SIGTERM ends the program with `EXIT_STATUS`, when what it does is saved.

    Call it in the main thread, after the processes have joined.
    """

    def on_signal(number: int, frame: FrameType | None) -> None:
        del number, frame
        _noticed.set()
        if not _heeding.is_set():
            # Between stages, what is not whole is done again: there is nothing to save.
            print("told to end; start again to go on", file=sys.stderr)
            sys.exit(EXIT_STATUS)

    if jax.process_count() == 1:
        signal.signal(signal.SIGTERM, on_signal)


@contextmanager
def heeded() -> Iterator[None]:
    """Within it a notice does not end the program; the caller asks `noticed` often.

    Raises:
        Preempted: at its end, if there was a notice since the caller last asked.
    """
    _heeding.set()
    try:
        yield
        if noticed():
            raise Preempted("a stage is complete")
    finally:
        _heeding.clear()


def noticed() -> bool:
    """Whether to save and stop now; true at the same call in all processes, which all make."""
    return _noticed.is_set() or multihost_utils.reached_preemption_sync_point(next(_calls))

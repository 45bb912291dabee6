"""Notices that this job must end soon: SIGTERM, which schedulers and clouds send before SIGKILL.

If several processes have joined, JAX's own service receives the signal, spreads the notice and
makes all of them stop at the same call. If there is only one process, it is received here.
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

EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: the work so far is kept; start the program again


class Preempted(Exception):
    """Training was told to stop, and has saved its state."""


_noticed = threading.Event()
_heeding = threading.Event()
_calls = itertools.count()


def listen() -> None:
    """Makes SIGTERM end the program with `EXIT_STATUS` as soon as its work is saved.

    Call it in the main thread, after the processes have joined.
    """

    def on_signal(number: int, frame: FrameType | None) -> None:
        del number, frame
        _noticed.set()
        if not _heeding.is_set():
            # Between stages there is nothing to save: unfinished work is done again.
            print("told to end; start again to resume", file=sys.stderr)
            sys.exit(EXIT_STATUS)

    if jax.process_count() == 1:
        signal.signal(signal.SIGTERM, on_signal)


@contextmanager
def heeded() -> Iterator[None]:
    """Keeps a notice from ending the program; the caller must ask `noticed` often instead.

    Raises:
        Preempted: on leaving, if there was a notice since the caller last asked.
    """
    _heeding.set()
    try:
        yield
        if noticed():
            raise Preempted("a stage is complete")
    finally:
        _heeding.clear()


def noticed() -> bool:
    """Returns whether to save and stop now; all processes must call it and get the same answer."""
    return _noticed.is_set() or multihost_utils.reached_preemption_sync_point(next(_calls))

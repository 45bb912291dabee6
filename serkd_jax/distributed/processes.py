"""Starts a program as one of several processes, and ends it with an exit status."""

import hashlib
import os
import platform
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import jax
from absl import flags

from serkd_jax.distributed import parallel, preemption
from serkd_jax.errors import UserError, of_the_machine

_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, or auto.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", 0, "Number of processes in all.")
_PROCESS_ID = flags.DEFINE_integer("process_id", 0, "Number of this process, from 0.")


def run(work: Callable[[], None]) -> None:
    """Joins the processes that the flags describe, does the work, and ends the program.

    The exit status is 0 on success; 1 for an error that the user can correct; 75 if the program was
    told to end and should be started again; and another one, with a stack trace, for other errors.
    """
    joined = False
    signal.signal(signal.SIGINT, _interrupted)
    try:
        if _COORDINATOR.value:
            parallel.join_processes(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
            joined = True
        elif _NUM_PROCESSES.value or _PROCESS_ID.value:
            raise UserError("several processes need a --coordinator, so that they share the work")
        preemption.listen()
        _keep_compiled_programs()
        work()
    except UserError as error:
        _end(f"error: {error}", 1, joined)
    except preemption.Preempted as notice:
        print(f"told to end: {notice}; start again to resume", file=sys.stderr)
        sys.exit(preemption.EXIT_STATUS)
    except Exception as error:
        if told := of_the_machine(error):
            _end(f"error: {told}", 1, joined)
        traceback.print_exc()
        if "RESOURCE_EXHAUSTED" in str(error):
            _end("error: out of memory; see docs/scaling.md for settings that need less", 1, joined)
        _end("this is a bug, or one of the processes was lost; finished work is kept", 70, joined)


def _interrupted(*_: object) -> None:
    """Ends the program at Ctrl-C; an exception could be lost in a thread or in a library."""
    print("interrupted; finished work is kept: start again to resume", file=sys.stderr, flush=True)
    os._exit(130)


def _keep_compiled_programs() -> None:
    """Caches compiled programs, so that later runs on the same kind of machine can reuse them.

    The cache is in `~/.cache/serkd-jax`, or where `JAX_COMPILATION_CACHE_DIR` says; if that is set
    but empty, nothing is cached.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    root = Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"))
    if not root.is_absolute():  # a user without a home
        return
    # XLA compiles for the CPU's own instructions, and different machines may share a home.
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    instructions = [line for line in lines if line.startswith(("flags", "Features"))][:1]
    kind = hashlib.sha256(f"{platform.machine()} {instructions}".encode()).hexdigest()[:8]
    jax.config.update("jax_compilation_cache_dir", str(root / "serkd-jax" / kind))


def _end(message: str, status: int, joined: bool) -> None:
    print(message, file=sys.stderr, flush=True)
    if joined:  # JAX would wait for the other processes, which may be waiting for this one
        os._exit(status)
    sys.exit(status)

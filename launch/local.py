"""Runs a program in one or more processes on this machine, and restarts it where it stopped.

    python launch/local.py -m serkd_jax.main --config=configs/demo.py --workdir=runs/demo
    python launch/local.py --processes=2 --cpu-devices=4 -m serkd_jax.main --config=...

Call it in the repository's folder, in an environment with serkd-jax installed. Everything from -m
on is passed to Python unchanged; if there are several processes, each is also told where the others
are. The machine's GPUs are divided evenly among the processes.

If one process dies, the others are stopped, since they would wait for it for ever. Then all are
started again, unless the status says that the user must fix something (1 and 2). SIGTERM and Ctrl-C
are passed on as SIGTERM, on which the programs save and end with status 75; nothing is started
afterwards. A second signal kills them at once.
"""

import argparse
import math
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time

PREEMPTED = 75  # saved, and asks to be started again
NOT_TRIED_AGAIN = (0, 1, 2)  # done, an error to fix, bad flags


def main() -> int:
    """Starts the job, repeatedly if needed, until it is done or another try cannot help."""
    args = parse_args()
    environments = [os.environ | extra for extra in extra_environments(args)]
    if args.dry_run:
        for extra, command in zip(extra_environments(args), make_commands(args), strict=True):
            print(shlex.join(["env", *(f"{k}={v}" for k, v in extra.items()), *command]))
        return 0
    stop = threading.Event()

    def on_signal(*_: object) -> None:
        if stop.is_set():
            sys.exit(128 + signal.SIGINT)  # asked twice: end without waiting
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    crashes = 0
    while True:
        status = run_once(make_commands(args), environments, stop, args.grace)
        if stop.is_set() or status in NOT_TRIED_AGAIN:
            break
        # Preemptions are not failures, so their number is not limited.
        crashes += status != PREEMPTED
        if crashes == args.tries:
            say(f"given up after {crashes} crashes; what is done is kept")
            break
        say("starts again where it stopped")
    return status if status >= 0 else 128 - status  # as a shell reports signals


def parse_args() -> argparse.Namespace:
    """The launcher's own flags, with everything after -m in ``command``."""
    usage = "python launch/local.py [flags] -m MODULE [the module's flags]"
    parser = argparse.ArgumentParser(usage=usage, allow_abbrev=False)
    add = parser.add_argument
    add("--processes", type=int, default=1, metavar="N", help="how many (default 1)")
    add("--cpu-devices", type=int, metavar="M", help="use M virtual CPU devices in each process")
    add("--tries", type=int, default=3, metavar="K", help="give up after K crashes (default 3)")
    grace_help = "how long a process may take to save before it is killed (default 300)"
    add("--grace", type=float, default=300, metavar="SECONDS", help=grace_help)
    add("--dry-run", action="store_true", help="print the commands, and run none")
    add("-m", dest="command", nargs=argparse.REMAINDER, required=True, help="what to run")
    args = parser.parse_args()
    if not args.command:
        parser.error("-m needs the name of a module")
    if min(args.processes, args.tries, args.cpu_devices or 1) < 1:
        parser.error("--processes, --cpu-devices and --tries start from 1")
    if args.processes > 1 and not args.cpu_devices:
        gpus = len(visible_gpus())
        if not gpus or gpus % args.processes:
            parser.error(
                f"{args.processes} processes cannot share {gpus} GPUs evenly: choose another "
                "--processes, or give each M virtual CPU devices with --cpu-devices=M"
            )
    return args


def visible_gpus() -> list[str]:
    """The GPUs that CUDA_VISIBLE_DEVICES names, or else the numbers of all GPUs."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [gpu for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if gpu]
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return []
    count = sum(line.startswith("GPU ") for line in listing.stdout.splitlines())
    return [str(gpu) for gpu in range(count)]


def extra_environments(args: argparse.Namespace) -> list[dict[str, str]]:
    """The variables that each process's environment has in addition to this one's."""
    extra = {}
    if args.cpu_devices:
        flag = f"--xla_force_host_platform_device_count={args.cpu_devices}"
        extra["JAX_PLATFORMS"] = "cpu"
        extra["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    if args.processes == 1:
        return [extra]
    # Their output goes through a pipe: pass it line by line, with few progress-bar updates.
    extra["PYTHONUNBUFFERED"] = "1"
    extra["TQDM_MININTERVAL"] = os.environ.get("TQDM_MININTERVAL", "10")
    if args.cpu_devices:
        return [extra] * args.processes
    gpus = visible_gpus()
    share = len(gpus) // args.processes
    shares = [gpus[i * share : (i + 1) * share] for i in range(args.processes)]
    return [extra | {"CUDA_VISIBLE_DEVICES": ",".join(mine)} for mine in shares]


def make_commands(args: argparse.Namespace) -> list[list[str]]:
    """One command per process."""
    command = [sys.executable, "-m", *args.command]
    if args.processes == 1:
        return [command]
    with socket.socket() as free:  # a new port each time: the last one may still be in use
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    flags = [f"--coordinator={coordinator}", f"--num_processes={args.processes}"]
    return [[*command, *flags, f"--process_id={i}"] for i in range(args.processes)]


def run_once(
    commands: list[list[str]],
    environments: list[dict[str, str]],
    stop: threading.Event,
    grace: float,
) -> int:
    """Runs the processes until all have ended, and kills those that do not end in time.

    Args:
        commands: one per process.
        environments: one per process.
        stop: when set, the processes are asked to save and end.
        grace: how many seconds they may take to do so, or to follow one that has saved and ended.

    Returns:
        The status of the process that failed, negative if a signal killed it; else 75 or 0.
    """
    several = len(commands) > 1
    processes: list[subprocess.Popen] = []
    deadline = math.inf
    try:
        for command, environment in zip(commands, environments, strict=True):
            processes.append(start(command, environment, piped=several))
        readers = [copy_lines(process, i) for i, process in enumerate(processes) if several]
        while True:
            statuses = [process.poll() for process in processes]
            failed = [i for i, s in enumerate(statuses) if s not in (None, 0, PREEMPTED)]
            if failed or None not in statuses or time.monotonic() > deadline:
                break
            if deadline == math.inf and (stop.is_set() or PREEMPTED in statuses):
                deadline = time.monotonic() + grace
                if stop.is_set():
                    say("asks the processes to save and end")
                    for process in processes:
                        process.terminate()
            time.sleep(0.1)
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    for reader in readers:
        reader.join(timeout=5)
    others = "; the others were stopped" if None in statuses else ""
    if failed:
        # A signal takes precedence over a status, which may only mean that the connection to the
        # killed process was lost.
        first = min(failed, key=lambda i: statuses[i])
        say(f"process {first} of {len(processes)} {describe(statuses[first])}{others}")
        return statuses[first]
    if others:
        late = statuses.index(None)
        say(f"process {late} of {len(processes)} was killed: it did not end within {grace:g} s")
        return -signal.SIGKILL
    return max(statuses)


def start(command: list[str], environment: dict[str, str], piped: bool) -> subprocess.Popen:
    """Starts a process that Ctrl-C does not reach, as it would stop before it could save."""
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if piped else None,
        stderr=subprocess.STDOUT if piped else None,
        text=True,
        errors="replace",
        process_group=0,
    )


def copy_lines(process: subprocess.Popen, number: int) -> threading.Thread:
    """Copies a process's output to this one's, each line marked with the process's number."""

    def copy() -> None:
        for line in process.stdout:  # a carriage return also ends a line
            if line.strip():
                sys.stdout.write(f"[{number}] {line.rstrip()}\n")
                sys.stdout.flush()

    reader = threading.Thread(target=copy, daemon=True)
    reader.start()
    return reader


def describe(status: int) -> str:
    """How a process ended, in words."""
    if status >= 0:
        return f"ended with status {status}"
    return f"was killed by {signal.Signals(-status).name}"


def say(message: str) -> None:
    """Prints a message to standard error."""
    print(f"launch/local.py: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

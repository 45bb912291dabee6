"""Disks that are full or cannot be written, folders that are in use: one line, with the remedy."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from layouts import ROOT
from serkd_jax.distributed.processes import of_the_machine
from serkd_jax.errors import UserError
from serkd_jax.files import locked

TENSORSTORE = (
    'RESOURCE_EXHAUSTED: Failed writing: "/runs/a/checkpoints/4/d/0f.__lock": Failed to write '
    "7338 bytes to file 7: No space left on device [os_error_code='28']"
)


def os_error(number, path="/runs/a/x.npz"):
    return OSError(number, os.strerror(number), path)


def caused_by(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (os_error(errno.ENOSPC), "no space left on the disk that has /runs/a/x.npz: free some"),
        (os_error(errno.EDQUOT), "no space left on the disk that has /runs/a/x.npz: free some"),
        (ValueError(TENSORSTORE), "the disk that has /runs/a/checkpoints/4/d/0f.__lock: free"),
        (
            caused_by(RuntimeError("TFDS"), OSError(errno.ENOSPC, "full")),
            "has the workdir, the cache or temporary files: free",
        ),
        (os_error(errno.EROFS), "/runs/a/x.npz: Read-only file system: it cannot be written to"),
        (os_error(errno.EACCES), "/runs/a/x.npz: Permission denied: give yourself"),
        (os_error(errno.ENOTDIR), "a part of the path is a file"),
        (os_error(errno.ENAMETOOLONG), "use a shorter name"),
        (os_error(errno.EIO), "Input/output error: check the disk"),
        (ValueError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"), None),
        (ValueError("a bug"), None),
        (KeyError("x"), None),
    ],
)
def test_an_error_of_the_disk_names_the_place_and_the_remedy(error, told):
    found = of_the_machine(error)
    assert "\n" not in found
    assert (told in found) if told else not found


def main(workdir, **options):
    command = [sys.executable, "-m", "serkd_jax.main", "--config=tests/tiny_config.py"]
    return subprocess.Popen(
        [*command, f"--workdir={workdir}"], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


@pytest.mark.parametrize("workdir", ["file/run", "x" * 300])
def test_a_workdir_that_cannot_be_made_is_told_in_one_line(tmp_path, workdir):
    (tmp_path / "file").touch()
    _, told = main(tmp_path / workdir).communicate()
    assert told.count("\n") == 1
    assert told.startswith(f"error: {tmp_path / workdir}: ")


def test_a_second_process_in_a_workdir_is_told_of_the_first(tmp_path):
    with locked(tmp_path):
        process = main(tmp_path)
        _, told = process.communicate()
    assert process.returncode == 1
    assert told.splitlines()[-1].startswith(
        f"error: {tmp_path} is in use by process {os.getpid()} "
    )


def test_the_claim_of_a_process_that_was_killed_is_void(tmp_path):
    code = "import sys, time; from pathlib import Path; from serkd_jax.files import locked\n"
    code += "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"in use by process {process.pid} on "):
            locked(tmp_path).__enter__()
        process.kill()
    with locked(tmp_path):
        assert f"process {os.getpid()} on " in (tmp_path / ".lock").read_text()


@pytest.mark.slow
def test_ctrl_c_says_that_a_restart_goes_on(tmp_path):
    process = main(tmp_path)
    while not (tmp_path / "run.json").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 130
    assert told.endswith("interrupted; finished work is kept: start again to resume\n")

"""Several processes on one machine end as one does, also if some are killed or told to end.

They talk through gloo, as on a cluster of CPUs; each has two virtual devices.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import quick_xla
from finished_runs import final_arrays
from layouts import make_split
from serkd_jax.distributed import processes

ROOT = Path(__file__).resolve().parents[1]
# Of two steps each. In one stage they last long enough for a notice to reach both processes.
EPOCHS = {"teacher": 2, "student": 3, "distill": 3, "curriculum": 9}
FLAGS = ["--config=tests/tiny_config.py:manifest", "--config.num_devices=0"]
FLAGS += [f"--config.{stage}.epochs={epochs}" for stage, epochs in EPOCHS.items()]
FLAGS += ["--config.steps_per_dispatch=1"]


def start(workdir, processes, devices, *flags):
    """The tiny experiment by the launcher; its output is in a file beside the workdir."""
    command = [sys.executable, "launch/local.py", f"--processes={processes}"]
    command += [f"--cpu-devices={devices}", "-m", "serkd_jax.main", *FLAGS]
    command += [f"--workdir={workdir}", *flags]
    environment = os.environ | {"XLA_FLAGS": quick_xla.FLAGS}
    with workdir.with_suffix(".log").open("a") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def wait_for(text, path, job, times=1):
    deadline = time.monotonic() + 400
    while not path.exists() or path.read_text().count(text) < times:
        assert job.poll() is None, "the job ended too early"
        assert time.monotonic() < deadline, text
        time.sleep(0.01)


def children(job):
    """The processes of a launcher, in the order of their start."""
    listed = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text()
    return [int(pid) for pid in listed.split()]


def assert_same_training(actual, expected):
    """Up to the order of sums, 1e-6 of an array: also Adam's moments, which see gradients' scale.

    A softmax is blind to the key's bias, whose gradient is rounding alone.
    """
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        if "k_proj']['bias" in name:
            continue
        if array.dtype.kind == "f":
            error = np.linalg.norm(actual[name] - array)
            assert error <= 1e-4 * np.linalg.norm(array), name
        else:
            np.testing.assert_array_equal(actual[name], array, err_msg=name)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The option that names the corpus."""
    return f"--config.manifest={make_split(tmp_path_factory.mktemp('corpus'))}"


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    """The workdir of one process that nobody disturbed."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    assert start(workdir, 1, 4, corpus).wait() == 0, workdir.with_suffix(".log").read_text()[-3000:]
    return workdir


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not Path("/proc").exists(), reason="needs Linux")
def test_one_process_preempted_then_two_killed_and_preempted_end_as_one_left_alone(
    alone, corpus, tmp_path
):
    workdir = tmp_path / "run"
    log = workdir.with_suffix(".log")

    job = start(workdir, 1, 4, corpus)
    wait_for("epoch", workdir / "fold_1/student/metrics.jsonl", job)
    job.send_signal(signal.SIGTERM)
    assert job.wait(120) == 75
    assert not (workdir / "results.json").exists()

    job = start(workdir, 2, 2, corpus, "--config.examples=records")
    wait_for("epoch", workdir / "fold_1/distill/metrics.jsonl", job)
    os.kill(children(job)[1], signal.SIGKILL)  # the launcher starts both again
    wait_for("epoch", workdir / "fold_1/curriculum/metrics.jsonl", job)
    os.kill(children(job)[1], signal.SIGTERM)  # both save and end; the launcher starts them again
    assert job.wait() == 0, log.read_text()[-3000:]
    text = log.read_text()
    assert "SIGKILL" in text
    assert text.count("told to end: fold 1/1 curriculum") == 2
    assert_same_training(final_arrays(workdir), final_arrays(alone))
    results = [json.loads((w / "results.json").read_text()) for w in (alone, workdir)]
    assert results[0]["overall"] == results[1]["overall"]
    for path in workdir.glob("fold_*/*/metrics.jsonl"):
        epochs = [json.loads(line)["epoch"] for line in path.read_text().splitlines()]
        assert epochs == list(range(1, EPOCHS[path.parent.name] + 1)), path
    assert not list(workdir.rglob("*.tmp"))


@pytest.mark.slow
def test_a_process_that_does_not_see_the_workdir_of_the_first_is_told(corpus, tmp_path):
    """As on two machines without a common file system: two launches, two workdirs."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    jobs = [
        start(tmp_path / f"run{i}", 1, 1, corpus, f"--coordinator={address}", "--num_processes=2",
              f"--process_id={i}", f"--config.cache_dir={tmp_path}/cache")
        for i in range(2)
    ]  # fmt: skip
    assert jobs[1].wait(300) == 1
    jobs[0].kill()
    assert "--workdir must be on a file system" in (tmp_path / "run1.log").read_text()


def test_compiled_programs_are_kept_unless_the_environment_says_where(tmp_path, monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        processes._keep_compiled_programs()
        assert jax.config.jax_compilation_cache_dir == before
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
        processes._keep_compiled_programs()
        assert Path(jax.config.jax_compilation_cache_dir).parent == tmp_path / "serkd-jax"
    finally:
        jax.config.update("jax_compilation_cache_dir", before)

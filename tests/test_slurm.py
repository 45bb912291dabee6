"""launch/slurm.sbatch on a real Slurm: its daemons, started here for a cluster of this machine."""

import os
import re
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
SCRIPT = REPOSITORY / "launch" / "slurm.sbatch"

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, ["slurmctld", "slurmd", "munged", "sbatch"])),
    reason="needs root and Debian's packages slurmctld, slurmd, slurm-client and munge",
)

# Two processors and two GPUs, which are empty files. cred_expire is how long a job waits at least
# when it goes into the queue again.
SLURM_CONF = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPort={controller}
SlurmdPort={daemon}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SchedulerParameters=batch_sched_delay=1,sched_interval=1
KillWait=5
GresTypes=gpu
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 CPUs=2 Gres=gpu:2
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_for(condition: Callable[[], bool], seconds: float, told: Callable[[], str]) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, told()
        time.sleep(0.2)


class Cluster:
    """Submits jobs and tells what became of them."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.environment = environment | {"PYTHONPATH": f"{folder}:{REPOSITORY}"}

    def run(self, *command: object) -> str:
        done = subprocess.run(
            [*map(str, command)],
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
        )
        return done.stdout + done.stderr

    def submit(self, module: str, *flags: str) -> int:
        """Submits a module, whose text is given; returns the job's number."""
        (self.folder / "program.py").write_text(textwrap.dedent(module))
        told = self.run("sbatch", "--parsable", *flags, SCRIPT, "-m", "program", "--config=a b")
        return int(told)

    def log(self, job: int) -> str:
        path = self.folder / f"serkd-{job}.log"
        return path.read_text() if path.exists() else ""

    def state(self, job: int) -> str:
        return re.search(r"JobState=(\w+)", self.run("scontrol", "show", "job", job))[1]

    def wait_for_log(self, job: int, text: str, times: int = 1) -> None:
        wait_for(lambda: self.log(job).count(text) >= times, 120, lambda: self.log(job))

    def wait_for_state(self, job: int, state: str) -> None:
        told = lambda: f"{self.state(job)}: {self.log(job)}"  # noqa: E731
        wait_for(lambda: self.state(job) == state, 120, told)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    host = socket.gethostname().split(".")[0]
    settings = {"folder": folder, "host": host, "controller": free_port(), "daemon": free_port()}
    (folder / "slurm.conf").write_text(SLURM_CONF.format(**settings))
    for gpu in ("gpu0", "gpu1"):
        (folder / gpu).touch()
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-1]\n")
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log"}
    munged = ["munged", "--foreground", "--force", f"--seed-file={folder}/munge.seed"]
    munged += [f"--{flag}={folder}/munge.{ending}" for flag, ending in files.items()]
    environment = os.environ | {
        "SLURM_CONF": f"{folder}/slurm.conf",
        "SERKD_VENV": sys.prefix,
        "JAX_PLATFORMS": "cpu",
    }
    daemons = []
    this = Cluster(folder, environment)
    try:
        for command in (munged, ["slurmctld", "-D"], ["slurmd", "-D"]):
            with (folder / f"{command[0]}.out").open("w") as output:
                daemons.append(
                    subprocess.Popen(command, env=environment, stdout=output, stderr=output)
                )
            if command is munged:
                wait_for((folder / "munge.socket").exists, 10, lambda: "munged did not start")
        logs = lambda: "".join(path.read_text() for path in folder.glob("*.out"))  # noqa: E731
        wait_for(lambda: "idle" in this.run("sinfo"), 30, logs)
        yield this
    finally:
        this.run("scancel", "--user=root")
        end = time.monotonic() + 10
        while this.run("squeue", "--noheader").strip() and time.monotonic() < end:
            time.sleep(0.2)
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(timeout=30)


def test_two_tasks_find_each_other(cluster: Cluster) -> None:
    program = """
    import sys, jax
    from serkd_jax.distributed.parallel import join_processes

    join_processes(sys.argv[-1].removeprefix("--coordinator="))
    print("process", jax.process_index(), "of", jax.process_count(), sys.argv[1:-1])
    """
    job = cluster.submit(program, "--ntasks-per-node=2")
    cluster.wait_for_state(job, "COMPLETED")
    assert "0: process 0 of 2 ['--config=a b']" in cluster.log(job)
    assert "1: process 1 of 2 ['--config=a b']" in cluster.log(job)


def test_a_task_with_a_node_to_itself_sees_all_gpus_and_processors(cluster: Cluster) -> None:
    program = """
    import os

    print({name: os.environ[name] for name in ("JAX_LOCAL_DEVICE_IDS", "SLURM_CPUS_PER_TASK")})
    """
    job = cluster.submit(program, "--gpus-per-node=2", "--cpus-per-task=2")
    cluster.wait_for_state(job, "COMPLETED")
    expected = "{'JAX_LOCAL_DEVICE_IDS': '0,1', 'SLURM_CPUS_PER_TASK': '2'}"
    assert expected in cluster.log(job)


# Saves on SIGTERM, as the programs do; started again, it finds what was saved and is done.
SAVES = """
import os, signal, sys, time

saved = f"saved.{os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_PROCID']}"

def save(*_):
    open(saved, "w").close()
    print("saved", flush=True)
    sys.exit(75)

if os.path.exists(saved):
    print("done")
    sys.exit()
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(60)
"""


# The first is what Slurm does before the time limit, the second before a preemption.
@pytest.mark.parametrize("command", [["scancel", "--signal=TERM"], ["scontrol", "requeue"]])
def test_sigterm_makes_the_tasks_save_and_the_job_goes_on_later(
    cluster: Cluster, command: list[str]
) -> None:
    job = cluster.submit(SAVES, "--ntasks-per-node=2")
    cluster.wait_for_log(job, "ready", times=2)
    cluster.run(*command, job)
    cluster.wait_for_log(job, "saved", times=2)
    cluster.wait_for_state(job, "COMPLETED")
    assert cluster.log(job).count(": done") == 2  # and the log has both runs


def test_a_cancelled_job_saves_and_is_not_started_again(cluster: Cluster) -> None:
    job = cluster.submit(SAVES)
    cluster.wait_for_log(job, "ready")
    cluster.run("scancel", job)
    cluster.wait_for_log(job, "saved")
    cluster.wait_for_state(job, "CANCELLED")
    assert "queue again" not in cluster.log(job)


def test_a_killed_task_takes_the_other_along_and_the_job_is_tried_again(cluster: Cluster) -> None:
    program = """
    import os, signal, time

    first = f"first.{os.environ['SLURM_JOB_ID']}"
    if os.path.exists(first):
        raise SystemExit("an error to mend" if os.environ["SLURM_PROCID"] == "0" else 1)
    time.sleep(1)
    if os.environ["SLURM_PROCID"] == "1":
        open(first, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
    """
    job = cluster.submit(program, "--ntasks-per-node=2")
    cluster.wait_for_state(job, "FAILED")
    log = cluster.log(job)
    assert "task 1: Killed" in log
    assert "try 1 of 3 ended with status 1" in log  # 137 or 143, after the one or the other
    assert "0: an error to mend" in log  # which is not tried again
    assert "try 2" not in log

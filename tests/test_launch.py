"""The launchers: local.py with small programs, tpu_vm.sh with a stand-in for gcloud, the JobSet."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

LAUNCH = Path(__file__).parents[1] / "launch"
LOCAL = [sys.executable, str(LAUNCH / "local.py")]
CLEAN = {k: v for k, v in os.environ.items() if k not in ("CUDA_VISIBLE_DEVICES", "XLA_FLAGS")}


def launch_local(folder: Path, program: str, *flags: str, **environment: str) -> subprocess.Popen:
    """Starts local.py on a program whose text is given; ``me`` in it is its process's number."""
    first = "import os, signal, sys, time\nme = int(sys.argv[-1].removeprefix('--process_id='))\n"
    (folder / "program.py").write_text(first + textwrap.dedent(program))
    return subprocess.Popen(
        [*LOCAL, *flags, "-m", "program", "--config=a b"],
        cwd=folder,
        env=CLEAN | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_local(folder: Path, program: str, *flags: str, **environment: str) -> tuple[int, str, str]:
    """The launcher's status, output and messages."""
    flags = ("--processes=2", "--cpu-devices=1", *flags)
    process = launch_local(folder, program, *flags, **environment)
    output, messages = process.communicate(timeout=30)
    return process.returncode, output, messages


def starts(output: str) -> int:
    """How often process 0 of a program was started that prints so first."""
    return output.count("[0] started")


def test_local_passes_the_arguments_and_tells_each_process_where_the_others_are(
    tmp_path: Path,
) -> None:
    program = "print(me, sys.argv[1:], os.environ['JAX_PLATFORMS'], os.environ['XLA_FLAGS'])"
    status, output, _ = run_local(tmp_path, program, XLA_FLAGS="--other")
    ports = set(re.findall(r"--coordinator=127\.0\.0\.1:(\d+)", output))
    assert status == 0
    assert len(ports) == 1
    expected = "cpu --other --xla_force_host_platform_device_count=1"
    for i in (0, 1):
        flags = f"'--coordinator=127.0.0.1:{min(ports)}', '--num_processes=2', '--process_id={i}'"
        assert f"[{i}] {i} ['--config=a b', {flags}] {expected}\n" in output


def test_local_leaves_a_single_process_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("import sys; print(sys.argv[1:]); sys.exit(1)")
    command = [*LOCAL, "-m", "program", "--config=x", "--processes=2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "['--config=x', '--processes=2']\n"
    assert done.returncode == 1


def test_local_marks_every_line_of_several_processes(tmp_path: Path) -> None:
    program = "print('\\r1 of 2\\r2 of 2\\nnext')\nprint('last', end='', file=sys.stderr)"
    _, output, _ = run_local(tmp_path, program)
    expected = ["1 of 2", "2 of 2", "last", "next"]
    assert sorted(output.splitlines()) == [f"[{i}] {line}" for i in (0, 1) for line in expected]


@pytest.mark.parametrize("status", [1, 2])
def test_local_does_not_try_an_error_again(tmp_path: Path, status: int) -> None:
    program = f"print('started')\nif me: sys.exit({status})\ntime.sleep(60)"
    begin = time.monotonic()
    found, output, messages = run_local(tmp_path, program)
    assert (found, starts(output)) == (status, 1)
    assert f"process 1 of 2 ended with status {status}; the others were stopped" in messages
    assert time.monotonic() - begin < 10


def test_local_stops_the_others_when_one_is_killed_and_gives_up_in_the_end(tmp_path: Path) -> None:
    # The other ignores SIGTERM, as a process that waits in a collective does.
    program = """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("started")
    if me:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
    """
    status, output, messages = run_local(tmp_path, program, "--tries=2")
    assert (status, starts(output)) == (128 + signal.SIGKILL, 2)
    killed = "process 1 of 2 was killed by SIGKILL; the others were stopped"
    assert messages.count(killed) == 2
    assert "given up after 2 crashes" in messages


def test_local_names_the_killed_process_rather_than_one_that_missed_it(tmp_path: Path) -> None:
    # As soon as process 1 is dead, process 0 fails: it has lost its connection to it.
    program = """
    if me:
        open("pid.new", "w").write(str(os.getpid()))
        os.rename("pid.new", "pid")
        os.kill(os.getpid(), signal.SIGKILL)
    while not os.path.exists("pid"):
        pass
    stat = f"/proc/{open('pid').read()}/stat"
    while os.path.exists(stat) and " Z " not in open(stat).read():
        pass
    sys.exit(1)
    """
    _, _, messages = run_local(tmp_path, program, "--tries=1")
    assert "process 1 of 2 was killed by SIGKILL" in messages


def test_local_starts_again_after_a_crash_and_after_any_number_of_preemptions(
    tmp_path: Path,
) -> None:
    program = """
    print("started")
    mark = f"starts.{me}"
    open(mark, "a").write("x")
    status = [75, 134, 75, 75, 134, 0][os.path.getsize(mark) - 1]
    sys.exit(status)
    """
    status, output, messages = run_local(tmp_path, program)
    assert (status, starts(output)) == (0, 6)
    assert messages.count("starts again where it stopped") == 5


def test_local_kills_a_process_that_does_not_follow_one_that_has_saved(tmp_path: Path) -> None:
    program = "sys.exit(75) if me else time.sleep(60)"
    status, _, messages = run_local(tmp_path, program, "--tries=1", "--grace=0.5")
    assert status == 128 + signal.SIGKILL
    assert "process 0 of 2 was killed: it did not end within 0.5 s" in messages


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_local_asks_all_processes_to_save_and_starts_none_again(
    tmp_path: Path, number: signal.Signals
) -> None:
    program = """
    def save(*_):
        print("saved")
        sys.exit(75)

    signal.signal(signal.SIGTERM, save)
    signal.signal(signal.SIGINT, lambda *_: sys.exit(1))
    open(f"ready.{me}", "w").close()
    time.sleep(60)
    """
    process = launch_local(tmp_path, program, "--processes=2", "--cpu-devices=1")
    end = time.monotonic() + 20
    while len(list(tmp_path.glob("ready.*"))) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(number)
    output, messages = process.communicate(timeout=20)
    assert process.returncode == 75
    assert sorted(output.splitlines()) == ["[0] saved", "[1] saved"]
    assert "starts again" not in messages


def put_command(folder: Path, name: str, script: str) -> None:
    """A command of that name, in a folder for PATH."""
    path = folder / name
    path.write_text("#!/bin/bash\n" + textwrap.dedent(script))
    path.chmod(0o755)


def dry_run(folder: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess:
    command = [*LOCAL, "--dry-run", *flags, "-m", "program"]
    return subprocess.run(
        command,
        cwd=folder,
        env=CLEAN | environment,
        capture_output=True,
        text=True,
    )


def test_local_shares_out_the_gpus(tmp_path: Path) -> None:
    put_command(tmp_path, "nvidia-smi", "for i in 0 1 2 3; do echo GPU $i: A100; done")
    path = f"{tmp_path}:{os.environ['PATH']}"
    shares = re.compile("CUDA_VISIBLE_DEVICES=(\\S+)")
    assert shares.findall(dry_run(tmp_path, "--processes=2", PATH=path).stdout) == ["0,1", "2,3"]
    some = dry_run(tmp_path, "--processes=2", PATH=path, CUDA_VISIBLE_DEVICES="3,5")
    assert shares.findall(some.stdout) == ["3", "5"]
    uneven = dry_run(tmp_path, "--processes=3", PATH=path)
    assert "3 processes cannot share 4 GPUs evenly" in uneven.stderr
    assert uneven.returncode == 2


def test_local_says_what_to_do_without_gpus(tmp_path: Path) -> None:
    none = dry_run(tmp_path, "--processes=2", CUDA_VISIBLE_DEVICES="")
    assert "--cpu-devices=M" in none.stderr
    assert none.returncode == 2


@pytest.mark.parametrize("script", ["slurm.sbatch", "tpu_vm.sh"])
def test_shell_scripts_pass_shellcheck(script: str) -> None:
    done = subprocess.run(["shellcheck", LAUNCH / script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# A gcloud that notes its calls. The slice's states and the run's statuses are the lines of two
# files, of which each call takes the first.
GCLOUD = """
case "$4" in ssh) what="ssh ${*: -2:1}" ;; create) what="$*" ;; *) what=$4 ;; esac
echo "$what" | tr '\\n' ' ' >>calls
echo >>calls
next() { head -1 "$1"; sed -i 1d "$1"; }
case "$4" in
  describe) state=$(next states); [ "$state" != ABSENT ] && echo "$state" ;;
  ssh) case "$what" in *serkd_jax.main*) exit "$(next statuses)" ;; esac ;;
esac
"""


def run_on_tpu(folder: Path, states: str, statuses: str = "", *flags: str) -> tuple[int, list[str]]:
    """Runs tpu_vm.sh with the stand-in; returns its status and the calls, by their first word."""
    put_command(folder, "gcloud", GCLOUD)
    put_command(folder, "sleep", "")
    put_command(folder, "git", "true")
    for name, words in {"states": states, "statuses": statuses}.items():
        (folder / name).write_text("".join(f"{word}\n" for word in words.split()))
    options = ["--name=n", "--zone=z", "--type=v5litepod-16", "--version=v", "--storage=gs://b"]
    done = subprocess.run(
        [LAUNCH / "tpu_vm.sh", *options, *flags, "-m", "serkd_jax.main", "--config=a b"],
        cwd=folder,
        env=os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=30,
    )
    calls = (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []
    named = []
    for call in calls:
        if call.startswith("ssh"):
            named.append("run" if "serkd_jax.main" in call else "install")
        elif not call.startswith("describe"):
            named.append("create" if " create " in call else call.split()[0])
    return done.returncode, named or done.stdout.splitlines()


def test_tpu_uses_a_slice_that_is_there(tmp_path: Path) -> None:
    assert run_on_tpu(tmp_path, "READY", "0") == (0, ["scp", "install", "run"])
    run = next(line for line in (tmp_path / "calls").read_text().splitlines() if "exec" in line)
    assert "python -m serkd_jax.main --config=a\\ b --coordinator=auto" in run


def test_tpu_creates_a_slice_where_there_is_none(tmp_path: Path) -> None:
    status, calls = run_on_tpu(tmp_path, "ABSENT CREATING READY", "0", "--spot")
    assert (status, calls) == (0, ["create", "scp", "install", "run"])
    assert "--accelerator-type=v5litepod-16 --version=v --spot" in (tmp_path / "calls").read_text()


def test_tpu_makes_the_slice_anew_when_it_was_preempted(tmp_path: Path) -> None:
    # gcloud says 1 of a slice that has gone, which is no error of the user's.
    states = "READY PREEMPTED PREEMPTED ABSENT READY"
    first = ["scp", "install", "run"]
    assert run_on_tpu(tmp_path, states, "1 0") == (0, [*first, "delete", "create", *first])


def test_tpu_runs_again_after_75_and_a_limited_number_of_crashes(tmp_path: Path) -> None:
    status, calls = run_on_tpu(tmp_path, "READY " * 12, "75 75 134 75 255", "--tries=2")
    assert (status, calls) == (255, ["scp", "install", *["run"] * 5])


def test_tpu_does_not_try_an_error_again(tmp_path: Path) -> None:
    assert run_on_tpu(tmp_path, "READY READY", "1") == (1, ["scp", "install", "run"])


def test_tpu_leaves_a_stopped_slice_alone(tmp_path: Path) -> None:
    assert run_on_tpu(tmp_path, "STOPPED")[0] == 1
    assert (tmp_path / "calls").read_text().split() == ["describe"]


def test_tpu_dry_run_prints_the_commands_and_runs_none(tmp_path: Path) -> None:
    status, printed = run_on_tpu(tmp_path, "", "", "--dry-run")
    commands = [line.split()[4] for line in printed if line.startswith("gcloud")]
    assert status == 0
    assert commands == ["describe", "create", "scp", "ssh", "ssh", "ssh", "delete"]
    assert not (tmp_path / "calls").exists()


@pytest.fixture
def manifests() -> list[dict]:
    """The volume and the JobSet, filled in as envsubst does."""
    text = (LAUNCH / "gke_jobset.yaml").read_text()
    for name, value in {"RUN": "demo", "IMAGE": "image:1", "CONFIG": "configs/demo.py"}.items():
        text = text.replace(f"${{{name}}}", value)
    assert "${" not in text
    return list(yaml.safe_load_all(text))


def test_the_volume_and_the_job_in_the_jobset_fit_the_schema_of_kubernetes(
    manifests: list[dict],
) -> None:
    volume, jobset = manifests
    kubernetes_validate.validate(volume, "1.31", strict=True)
    for job in jobset["spec"]["replicatedJobs"]:
        manifest = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}}
        kubernetes_validate.validate(manifest | job["template"], "1.31", strict=True)


def test_the_jobset_has_the_fields_of_its_type(manifests: list[dict]) -> None:
    # No package has the schema of JobSets: these are from its jobset_types.go.
    _, jobset = manifests
    assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert set(jobset["spec"]) == {"failurePolicy", "replicatedJobs"}
    assert set(jobset["spec"]["failurePolicy"]) == {"maxRestarts", "rules"}
    for rule in jobset["spec"]["failurePolicy"]["rules"]:
        known = {"name", "action", "onJobFailureReasons", "onJobFailureMessagePatterns"}
        assert {"name", "action"} <= set(rule) <= known
        assert rule["action"] in ("FailJobSet", "RestartJobSetAndIgnoreMaxRestarts")
    (job,) = jobset["spec"]["replicatedJobs"]
    assert set(job) == {"name", "replicas", "template"}


def jobset_action(jobset: dict, status: int, disrupted: bool = False) -> str:
    """What becomes of the JobSet when a host ends so, by the rules of Job and JobSet."""
    spec = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(spec["podFailurePolicy"]["rules"]):
        codes = rule.get("onExitCodes", {}).get("values", [])
        if status in codes or ("onPodConditions" in rule and disrupted):
            reason = "PodFailurePolicy"
            message = f"Container serkd for pod default/x failed with exit code {status} matching "
            message += f"FailJob rule at index {index}"
            break
    for rule in jobset["spec"]["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(p, message) for p in patterns):
            return rule["action"]
    return "RestartJobSet"


def test_the_jobset_starts_again_by_the_exit_status(manifests: list[dict]) -> None:
    _, jobset = manifests
    assert jobset_action(jobset, 75) == "RestartJobSetAndIgnoreMaxRestarts"
    assert jobset_action(jobset, 143, disrupted=True) == "RestartJobSetAndIgnoreMaxRestarts"
    assert jobset_action(jobset, 137) == "RestartJobSet"  # counts
    assert jobset_action(jobset, 1) == jobset_action(jobset, 2) == "FailJobSet"


def test_the_jobset_tells_each_host_where_the_first_is(manifests: list[dict]) -> None:
    _, jobset = manifests
    (job,) = jobset["spec"]["replicatedJobs"]
    hosts = job["template"]["spec"]["completions"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    name = jobset["metadata"]["name"]
    assert job["template"]["spec"]["parallelism"] == hosts
    assert f"--num_processes={hosts}" in container["command"]
    assert f"--coordinator={name}-{job['name']}-0-0.{name}:55527" in container["command"]

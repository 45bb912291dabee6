"""What a run was started with: `starts.jsonl` in its workdir, a line for each start."""

import datetime
import json
import platform
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from serkd_jax.config import choose_dtype
from serkd_jax.distributed import parallel

NAME = "starts.jsonl"


def describe_start(config: ConfigDict) -> dict[str, Any]:
    """Describes this process's command, versions and devices."""
    devices = jax.devices()
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "revision": revision(),
        "python": platform.python_version(),
        "versions": versions(),
        "machine": platform.platform(),
        "devices": [len(devices), devices[0].device_kind],
        "processes": jax.process_count(),
        "dtype": choose_dtype(config, devices[0]),
    }


def record_start(workdir: Path, start: dict[str, Any]) -> None:
    """Adds a start to those of the workdir."""
    if parallel.is_first_process():
        with (workdir / NAME).open("a") as file:
            file.write(json.dumps(start) + "\n")


def read_starts(workdir: Path) -> list[dict[str, Any]]:
    """Reads the starts of a workdir, of which there may be none; an incomplete line is left out."""
    path, starts = workdir / NAME, []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            starts.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # the machine died while it was written
    return starts


def versions() -> dict[str, str]:
    """Returns the versions of this package and of what it requires."""
    requirements = [line for line in metadata.requires("serkd-jax") or [] if "extra ==" not in line]
    names = ["serkd-jax", "jaxlib", *(re.match(r"[\w.-]+", line)[0] for line in requirements)]
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # not needed on this machine
            continue
    return found


def revision() -> str:
    """Returns the git commit of the source code, with `-dirty` if it was changed; empty without."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""

"""Runs an experiment: `python -m serkd_jax.main --config=configs/demo.py --workdir=runs/demo`."""

from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from serkd_jax.distributed import parallel, processes
from serkd_jax.errors import parse_flags
from serkd_jax.files import locked
from serkd_jax.results.provenance import describe_start, record_start

_CONFIG = config_flags.DEFINE_config_file("config", help_string="Recipe of the experiment.")
_PROFILE = flags.DEFINE_bool("profile", False, "Trace some steps of the first fold's stages.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, metrics and results.")


def main(argv: list[str]) -> None:
    """Runs what remains to be done in the workdir, and prints the table of results."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.WARNING)  # Orbax logs every file that it writes
    processes.run(_run_experiment)


def _run_experiment() -> None:
    # Slow to import, so only after the flags are parsed.
    from serkd_jax.experiment import prepare_experiment
    from serkd_jax.results.html import try_to_write_report

    workdir = Path(_WORKDIR.value)
    workdir.mkdir(parents=True, exist_ok=True)
    with locked(workdir):
        start = describe_start(_CONFIG.value)
        if parallel.is_first_process():
            print(f"{_in_a_line(start)}\n", flush=True)
        experiment = prepare_experiment(_CONFIG.value, workdir, _PROFILE.value)
        record_start(workdir, start)
        if parallel.is_first_process():
            print(f"{experiment.data_report}\n", flush=True)
        report = experiment.run()
        if parallel.is_first_process():
            written = ", ".join(["results.json", "results.md", *try_to_write_report(workdir)])
            print(f"\n{report}\nWritten to {workdir}: {written}")


def _in_a_line(start: dict[str, Any]) -> str:
    """Says where a run computes: devices, dtype, versions, and the cache of programs."""
    (count, kind), names = start["devices"], ("jax", "flax", "optax", "orbax-checkpoint", "numpy")
    versions = ", ".join(f"{name} {start['versions'][name]}" for name in ("serkd-jax", *names))
    return (
        f"{count} x {kind} in {start['processes']} process(es), {start['dtype']}, "
        f"Python {start['python']}, {versions}; "
        f"compiled programs in {jax.config.jax_compilation_cache_dir or 'no folder'}"
    )


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=parse_flags)

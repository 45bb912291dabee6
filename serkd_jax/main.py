"""Runs an experiment: ``python -m serkd_jax.main --config=configs/demo.py --workdir=runs/demo``."""

from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from serkd_jax import parallel, processes

_CONFIG = config_flags.DEFINE_config_file("config", help_string="The experiment's recipe.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and results go.")


def main(argv: list[str]) -> None:
    """Does what is left to do in the workdir and prints the results table."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.WARNING)  # orbax tells of every file that it writes
    processes.run(_run_experiment)


def _run_experiment() -> None:
    from serkd_jax.experiment import Experiment  # slow to import, so after the flags are parsed

    workdir = Path(_WORKDIR.value)
    workdir.mkdir(parents=True, exist_ok=True)
    experiment = Experiment(_CONFIG.value, workdir)
    if parallel.is_first_process():
        print(f"{experiment.data_report}\n", flush=True)
    report = experiment.run()
    if parallel.is_first_process():
        print(f"\n{report}\nWritten to {workdir}/results.json and results.md")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)

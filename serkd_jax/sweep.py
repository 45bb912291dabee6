"""Runs a grid of experiments, which share whatever is equal.

    python -m serkd_jax.sweep --config=configs/demo.py --out=RUNS --seeds=0-2 \
        --set=student.inverted=True,False --set=contrastive.weight=0,0.05

Every combination of the values becomes a run with a workdir of its own in RUNS, which
`python -m serkd_jax.compare RUNS` puts into one table. Instead of, or as well as, a grid,
`--experiments=configs/sweeps.py:table4` takes named experiments from a file of Python. Records and
features are made once for all runs, and so is every stage of training that is the same in several.

A sweep that is stopped and started again goes on where it was. `--shard=2/4` does the second of
four parts; parts may run at the same time, on machines that share RUNS (for a Slurm array:
`--shard=$SLURM_ARRAY_TASK_ID/4` with `--array=1-4`).
"""

from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from serkd_jax.config import check_config
from serkd_jax.distributed import parallel, processes
from serkd_jax.errors import UserError, parse_flags

_CONFIG = config_flags.DEFINE_config_file("config", help_string="Recipe that the runs start from.")
_OUT = flags.DEFINE_string(
    "out", None, "Folder for the runs' workdirs and what they share.", allow_override=True
)
_SEEDS = flags.DEFINE_string("seeds", "", "Seeds of each experiment, such as 0-4 or 0,7,9.")
_SET = flags.DEFINE_multi_string(
    "set", [], "A key and its values, such as meta.order=none,second_order."
)
_EXPERIMENTS = flags.DEFINE_string("experiments", "", "Named experiments, FILE.py:NAME.")
_SHARD = flags.DEFINE_string("shard", "1/1", "Which part of the runs to do, such as 2/4.")


def main(argv: list[str]) -> None:
    """Does what remains of this part of the sweep."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.WARNING)
    processes.run(_sweep)


def _sweep() -> None:
    # Slow to import, so only after the flags are parsed.
    from serkd_jax import grid

    out = Path(_OUT.value)
    experiments = grid.load_experiments(_EXPERIMENTS.value) if _EXPERIMENTS.value else {"": {}}
    runs = grid.plan(experiments, [grid.parse_values(text) for text in _SET.value], _SEEDS.value)
    configs = {name: grid.configure(_CONFIG.value, changes, out) for name, changes in runs.items()}
    for name, config in configs.items():
        try:
            check_config(config)
        except UserError as error:
            raise UserError(f"run {name}: {error}") from error
    mine = grid.shard(list(configs), _SHARD.value)
    failed = grid.run_all({name: configs[name] for name in mine}, out, "sweep")
    if parallel.is_first_process():
        done = f"{len(mine) - len(failed)} of {len(mine)} runs are finished"
        print(f"{done}: python -m serkd_jax.compare {out} --out={out}/comparison")
    grid.refuse_failures(failed)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "out"])
    app.run(main, flags_parser=parse_flags)

"""Tables 8 and 9 under one protocol: each system, and ours, on the same records and folds.

    python -m serkd_jax.systems --config=configs/emodb.py:whisper --config.data_dir=EMODB \
        --workdir=runs/systems --systems=all --seeds=0-2

Call it in the root of the repository. Each system of `configs/systems.py` is trained as by its
authors, on the recipe's records, features and folds; TIM-Net reads MFCC. `ours` is the recipe
itself. What a corpus or an encoder lacks for a system leaves it out of `all`. Each run has a
workdir below `--workdir`; they share records and features. A command that was stopped goes on when
it is started again. Then the table of all finished runs in `--workdir` is printed, and written as
`systems.md`.
"""

from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from serkd_jax.config import check_config
from serkd_jax.distributed import parallel, processes
from serkd_jax.errors import UserError, parse_flags

OURS = "ours"
_CONFIG = config_flags.DEFINE_config_file("config", help_string="Recipe that the systems follow.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder for the runs and what they share.", allow_override=True
)
_SYSTEMS = flags.DEFINE_list("systems", ["all"], f"all, or some of the systems and {OURS}.")
_SET = flags.DEFINE_multi_string(
    "set",
    [],
    "What to change in the systems' recipes, such as student.epochs=2.",
    allow_override=True,
)
_SEEDS = flags.DEFINE_string("seeds", "0", "Seeds of each, such as 0-2.", allow_override=True)


def main(argv: list[str]) -> None:
    """Trains what remains, and writes the table."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.WARNING)
    processes.run(_train_systems)


def _train_systems() -> None:
    # Slow to import, so only after the flags are parsed.
    from configs.systems import TRAININGS, lacking, with_system
    from serkd_jax import grid
    from serkd_jax.files import write_file
    from serkd_jax.results.comparison import read_runs
    from serkd_jax.results.systems_table import systems_table
    from serkd_jax.results.typeset import markdown

    out, known, chosen = Path(_WORKDIR.value), [*TRAININGS, OURS], _SYSTEMS.value
    if unknown := [name for name in chosen if name not in (*known, "all")]:
        raise UserError(f"there is no system {unknown[0]!r}: use all, or {', '.join(known)}")
    if "all" in chosen:
        left_out = lacking(_CONFIG.value)
        chosen = [name for name in known if name not in left_out]
        for name, reason in left_out.items():
            print(f"{name} is left out: {reason}")
    changes = {}
    for key, values in map(grid.parse_values, _SET.value):
        if len(values) > 1:
            raise UserError(f"--set={key}: use one value here; a list has brackets, as in [8,9]")
        changes[key] = values[0]
    configs = {}
    for seed in grid.parse_seeds(_SEEDS.value):
        for name in chosen:
            config = grid.configure(_CONFIG.value, {"seed": seed}, out)
            try:
                if name != OURS:
                    config = grid.configure(with_system(config, name), changes, out)
                check_config(config)
            except UserError as error:
                raise UserError(f"{name}: {error}") from error
            configs[f"{name},seed={seed}"] = config
    failed = grid.run_all(configs, out, "systems")
    if parallel.is_first_process():
        runs, problems = read_runs([out])
        if runs:
            text = markdown(systems_table(runs))
            write_file(out / "systems.md", text)
            print(text)
        for problem in problems:
            print(f"Left out: {problem}")
    grid.refuse_failures(failed)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=parse_flags)

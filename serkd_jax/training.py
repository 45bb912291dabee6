"""The loop around every stage's step: progress, metrics, checkpoints, selection, resume."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN
from tensorboardX import SummaryWriter
from tqdm import tqdm

from serkd_jax.errors import UserError
from serkd_jax.report import write_atomically


@dataclass(frozen=True)
class Stage:
    """One stage of one fold.

    Attributes:
        title: for the progress bar.
        epochs: how often validation, selection and checkpoints happen.
        steps_per_epoch: steps between them.
        init: makes the state before the first step.
        step: (state, batch, rng) -> (state, metrics).
        batch_at: (step number, state) -> batch.
        validate: state -> validation metrics.
        selection_metric: the validation metric whose best epoch is the stage's result, or
            ``last`` for the last epoch.
        rng: the stage's key; the step folds in the step number.
    """

    title: str
    epochs: int
    steps_per_epoch: int
    init: Callable[[], Any]
    step: Callable[[Any, Any, jax.Array], tuple[Any, dict[str, jax.Array]]]
    batch_at: Callable[[int, Any], Any]
    validate: Callable[[Any], dict[str, float]]
    selection_metric: str
    rng: jax.Array


def train(stage: Stage, directory: Path) -> Any:
    """Trains what is left of a stage and returns the state of its selected epoch.

    Writes ``checkpoints/`` (the latest epoch and the best one), ``metrics.jsonl`` (a line an
    epoch) and TensorBoard events to ``directory``. Stopped at any moment and called again, it
    goes on from the last epoch that was saved and ends with the same numbers.

    Raises:
        UserError: a loss is not finite, or a checkpoint cannot be read.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with _checkpoint_manager(directory) as checkpoints:
        done = checkpoints.latest_step() or 0
        if done < stage.epochs:
            # A copy: the step donates its state, and what made this one may be used again.
            state = _restore(checkpoints, stage, done) if done else _copy(stage.init())
            _train_epochs(stage, state, done, checkpoints, directory)
        checkpoints.wait_until_finished()
        return _restore(checkpoints, stage, checkpoints.best_step())


def _train_epochs(
    stage: Stage, state: Any, done: int, checkpoints: ocp.CheckpointManager, directory: Path
) -> None:
    log = directory / "metrics.jsonl"
    _truncate_log(log, done)
    by_last = stage.selection_metric == "last"
    first_step = done * stage.steps_per_epoch
    with (
        SummaryWriter(str(directory), purge_step=first_step + 1) as board,
        log.open("a") as log_file,
        tqdm(
            total=stage.epochs * stage.steps_per_epoch,
            initial=first_step,
            desc=stage.title,
            unit="step",
            dynamic_ncols=True,
        ) as bar,
    ):
        for epoch in range(done + 1, stage.epochs + 1):
            start = time.monotonic()
            state, metrics = _train_epoch(stage, state, epoch, bar)
            row = {f"train/{name}": value for name, value in metrics.items()}
            row |= {f"validation/{k}": v for k, v in stage.validate(state).items()}
            _check_finite(stage, epoch, row)
            row["seconds"] = time.monotonic() - start
            step = epoch * stage.steps_per_epoch
            for name, value in row.items():
                board.add_scalar(name, value, step)
            log_file.write(json.dumps({"epoch": epoch, "step": step, **row}) + "\n")
            log_file.flush()
            score = epoch if by_last else row[f"validation/{stage.selection_metric}"]
            checkpoints.save(
                epoch, args=ocp.args.StandardSave(state), metrics={"score": float(score)}
            )


def _check_finite(stage: Stage, epoch: int, row: dict[str, float]) -> None:
    bad = [name for name, value in row.items() if not math.isfinite(value)]
    if bad:
        raise UserError(
            f"{stage.title}: {', '.join(bad)} is not finite in epoch {epoch}; the checkpoint of "
            f"epoch {epoch - 1} is kept. Lower the stage's learning rate, or set "
            "optimizer.clip_norm, and start in a new workdir"
        )


def _train_epoch(stage: Stage, state: Any, epoch: int, bar: tqdm) -> tuple[Any, dict[str, float]]:
    """Runs one epoch's steps; returns the state and the means of the steps' metrics."""
    history = []
    for step in range((epoch - 1) * stage.steps_per_epoch, epoch * stage.steps_per_epoch):
        state, metrics = stage.step(state, stage.batch_at(step, state), stage.rng)
        history.append(metrics)
        bar.update()
        if step % 10 == 0:
            bar.set_postfix(epoch=epoch, loss=f"{float(metrics['loss']):.3f}")
    names = history[0]
    return state, {n: float(np.mean([float(metrics[n]) for metrics in history])) for n in names}


def _checkpoint_manager(directory: Path) -> ocp.CheckpointManager:
    """Keeps the latest epoch, to go on from, and the one of the best score."""

    def score(metrics: dict[str, float]) -> float:
        return metrics["score"]

    best = BestN(n=1, get_metric_fn=score, keep_checkpoints_without_metrics=False)
    options = ocp.CheckpointManagerOptions(
        best_fn=score, preservation_policy=AnyPreservationPolicy([LatestN(1), best])
    )
    return ocp.CheckpointManager((directory / "checkpoints").absolute(), options=options)


def _restore(checkpoints: ocp.CheckpointManager, stage: Stage, epoch: int) -> Any:
    """The state after ``epoch``, on the first device."""
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    template = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(stage.init),
    )
    try:
        return checkpoints.restore(epoch, args=ocp.args.StandardRestore(template))
    except Exception as error:  # orbax raises many kinds for a damaged file
        raise UserError(
            f"{stage.title}: cannot read the checkpoint {checkpoints.directory / str(epoch)} "
            f"({str(error).splitlines()[0]}). Delete {checkpoints.directory.parents[1]} to train "
            "the fold again"
        ) from error


def _copy(state: Any) -> Any:
    return jax.tree.map(jnp.array, state)


def _truncate_log(log: Path, done: int) -> None:
    """Drops the lines of epochs that were logged but not saved, and a half-written last line."""
    if not log.exists():
        return
    kept = []
    for line in log.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if row["epoch"] <= done:
            kept.append(line + "\n")
    write_atomically(log, "".join(kept))

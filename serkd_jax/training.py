"""The loop around the steps of every stage: progress, metrics, checkpoints, selection, resuming."""

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
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

from serkd_jax.data.examples import read_ahead
from serkd_jax.distributed import parallel, preemption
from serkd_jax.errors import UserError
from serkd_jax.files import write_file

# Orbax also logs, with a stack trace each, the errors that it raises.
logging.getLogger("absl").addFilter(
    lambda record: not (record.exc_info and "orbax" in record.pathname)
)

History = dict[str, list[float]]  # each metric's values in the steps of the epoch so far


@dataclass(frozen=True)
class Training:
    """What the loop needs to know about one stage of one fold.

    Attributes:
        title: title of the progress bar.
        epochs: number of epochs; validation, selection and a checkpoint follow each.
        steps_per_epoch: number of steps in an epoch.
        steps_per_dispatch: the most steps that are taken at once; the loop reacts to a notice of
            preemption only between dispatches.
        devices: the devices on which the steps run.
        init: makes the state before the first step.
        frozen: the part of the state that no step changes and no checkpoint contains.
        steps: (state, data, rows, count, rng) -> (state, metrics of each step), as compiled by
            `serkd_jax.distributed.parallel.compile_steps`.
        take: steps -> (data, rows) of `steps_per_dispatch` steps, beginning with the first of them.
        validate: state -> validation metrics; `confusion`, if there is one, is C x C counts.
        selection_metric: the validation metric whose best epoch is the stage's result, or `last`
            for the last epoch.
        rng: the stage's key, into which the step folds the step number.
        learning_rate: number of steps taken -> learning rate of the next one.
        patience: number of epochs without a better one after which the stage ends; 0 for never.
        profile: whether to trace some steps.
        shown: the validation metric, a share, that the progress bar shows.
    """

    title: str
    epochs: int
    steps_per_epoch: int
    steps_per_dispatch: int
    devices: list[jax.Device]
    init: Callable[[], Any]
    frozen: Any
    steps: Callable[..., tuple[Any, dict[str, jax.Array]]]
    take: Callable[[range], tuple[Any, Any]]
    validate: Callable[[Any], dict[str, Any]]
    selection_metric: str
    rng: jax.Array
    learning_rate: Callable[[int], float]
    patience: int = 0
    profile: bool = False
    shown: str = "ua"


def train(run: Training, directory: Path) -> Any:
    """Trains what remains of a stage, and returns the state of its selected epoch.

    Writes to `directory`: `checkpoints/` (the latest and the best epoch, named by their last step),
    `metrics.jsonl` (one line per epoch) and TensorBoard events; with `profile` also a trace of the
    second dispatch, or of the only one, for TensorBoard's profiler or Perfetto. If it is stopped at
    any moment and called again, it resumes from the last saved step and ends with the same numbers.

    Raises:
        UserError: a loss is not finite, or a checkpoint cannot be read.
        Preempted: the process was told to end; the last step is saved.
    """
    shapes = jax.eval_shape(run.init).replace(frozen=None)
    template = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), shapes)
    with preemption.heeded(), _checkpoint_manager(directory) as checkpoints:
        done = checkpoints.latest_step() or 0
        if done < run.epochs * run.steps_per_epoch and not _lost_patience(run, checkpoints, done):
            if done:
                state, history = _restore(checkpoints, run.title, done, template)
                state = state.replace(frozen=run.frozen)
            else:
                state, history = run.init(), {}
            # A copy: steps donate their state, but the arrays it was made from may be used again.
            state = parallel.replicate(jax.tree.map(jnp.array, state), run.devices)
            _train_epochs(run, state, done, history, checkpoints, directory)
        checkpoints.wait_until_finished()
        best, _ = _restore(checkpoints, run.title, checkpoints.best_step(), template)
        return best.replace(frozen=run.frozen)


def _train_epochs(
    run: Training,
    state: Any,
    done: int,
    history: History,
    checkpoints: ocp.CheckpointManager,
    directory: Path,
) -> None:
    """Takes the steps after `done`; `history` holds the metrics of its epoch so far."""
    start, begun = time.monotonic(), done
    planned = list(_dispatches(run, done))
    traced = planned[:2][-1] if run.profile and parallel.is_first_process() else None
    with _Logs(run, directory, done) as logs:
        dispatches = read_ahead(lambda steps: (steps, *run.take(steps)), iter(planned))
        for steps, data, rows in dispatches:
            count = len(steps)
            # A trace of the first dispatch would show the compiler.
            with jax.profiler.trace(directory) if steps == traced else nullcontext():
                state, metrics = run.steps(state, data, rows, np.int32(count), run.rng)
                metrics = jax.device_get(metrics)
            for name, values in metrics.items():
                history[name] = history.get(name, []) + values[:count].tolist()
            logs.advance(steps, history)
            epoch, into_epoch = divmod(steps.stop, run.steps_per_epoch)
            if not into_epoch:
                speed = (steps.stop - begun) / (time.monotonic() - start)
                row = {f"train/{name}": float(np.mean(values)) for name, values in history.items()}
                if tasks := history.get("task"):  # a mean of their numbers says little
                    row["train/task"] = np.bincount(np.array(tasks, int)).tolist()
                row["train/learning_rate"] = float(run.learning_rate(steps.stop - 1))
                row |= {f"validation/{k}": v for k, v in run.validate(state).items()}
                _check_finite(run, epoch, row)
                row |= {"steps_per_second": speed, "seconds": time.monotonic() - start}
                logs.write(epoch, steps.stop, row)
                by_last = run.selection_metric == "last"
                score = epoch if by_last else row[f"validation/{run.selection_metric}"]
                history, start, begun = {}, time.monotonic(), steps.stop
                _save(checkpoints, steps.stop, state, history, {"score": float(score)})
                if _lost_patience(run, checkpoints, steps.stop):
                    return
            if preemption.noticed():
                if into_epoch:
                    _save(checkpoints, steps.stop, state, history, None)
                checkpoints.wait_until_finished()
                raise preemption.Preempted(f"{run.title}: step {steps.stop} is saved")


def _lost_patience(run: Training, checkpoints: ocp.CheckpointManager, done: int) -> bool:
    """Returns whether the best of the saved epochs, the last of equals, is too long ago."""
    if not run.patience or (best := checkpoints.best_step()) is None:
        return False
    return done - best >= run.patience * run.steps_per_epoch


def _dispatches(run: Training, done: int) -> Iterator[range]:
    """Yields the steps after `done` in dispatches, none of which crosses the end of an epoch."""
    for epoch in range(done // run.steps_per_epoch, run.epochs):
        end = (epoch + 1) * run.steps_per_epoch
        while done < end:
            yield range(done, min(done + run.steps_per_dispatch, end))
            done = min(done + run.steps_per_dispatch, end)


def _check_finite(run: Training, epoch: int, row: dict[str, Any]) -> None:
    bad = [name for name, value in row.items() if not np.isfinite(value).all()]
    if bad:
        raise UserError(
            f"{run.title}: {', '.join(bad)} is not finite in epoch {epoch}; the checkpoint of "
            f"epoch {epoch - 1} is kept. Lower the stage's learning rate, or set "
            "optimizer.clip_norm, and start in a new workdir"
        )


class _Logs:
    """Progress bar, `metrics.jsonl` and TensorBoard events; only the first process has them."""

    def __init__(self, run: Training, directory: Path, done: int):
        self._first = parallel.is_first_process()
        self._shown = run.shown
        self._validated: list[float] = []  # what is shown, of each epoch
        self._bar = tqdm(
            total=run.epochs * run.steps_per_epoch,
            initial=done,
            desc=run.title,
            unit="step",
            dynamic_ncols=True,
            disable=not self._first,
        )
        if self._first:
            path = directory / "metrics.jsonl"
            _truncate_log(path, done)
            if path.exists():
                rows = map(json.loads, path.read_text().splitlines())
                self._validated = [row[f"validation/{self._shown}"] for row in rows]
            self._file = path.open("a")
            self._board = SummaryWriter(str(directory), purge_step=done + 1)

    def __enter__(self) -> "_Logs":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if self._first:
            self._file.close()
            self._board.close()

    def advance(self, steps: range, history: History) -> None:
        """Advances the progress bar."""
        self._show(history["loss"][-1])
        self._bar.update(len(steps))

    def write(self, epoch: int, step: int, row: dict[str, Any]) -> None:
        """Logs the metrics of an epoch."""
        self._validated.append(row[f"validation/{self._shown}"])
        self._show(row["train/loss"])
        if self._first:
            for name, value in row.items():
                if name == "train/task":  # how often each was drawn
                    self._board.add_histogram(name, np.repeat(np.arange(len(value)), value), step)
                elif name == "validation/confusion":
                    self._board.add_image(name, _picture(value), step, dataformats="HW")
                else:
                    self._board.add_scalar(name, value, step)
            self._file.write(json.dumps({"epoch": epoch, "step": step, **row}) + "\n")
            self._file.flush()

    def _show(self, loss: float) -> None:
        shown = {"loss": f"{loss:.3f}"}
        if self._validated:
            now, best = (f"{100 * ua:.1f}" for ua in (self._validated[-1], max(self._validated)))
            shown |= {f"validation {self._shown.upper()}": now, "best": best}
        self._bar.set_postfix(shown, refresh=False)


def _picture(confusion: list[list[int]]) -> np.ndarray:
    """Draws a confusion matrix: rows are true classes, and black is all of a class."""
    counts = np.array(confusion, np.float32)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    return np.kron(1 - shares, np.ones((32, 32), np.float32))


class _Checkpoints(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Leaves this to `preemption`: JAX counts the calls, so Orbax must not add its own."""
        del step
        return False


def _checkpoint_manager(directory: Path) -> ocp.CheckpointManager:
    """Makes a manager that keeps the last saved step, for resuming, and the best-scored epoch.

    Raises:
        UserError: the scores that are there cannot be read.
    """

    def score(metrics: dict[str, float]) -> float:
        return metrics["score"]

    best = BestN(n=1, get_metric_fn=score, keep_checkpoints_without_metrics=False)
    folder = (directory / "checkpoints").absolute()
    folder.mkdir(parents=True, exist_ok=True)  # Orbax would wait for ever if it were a file
    options = ocp.CheckpointManagerOptions(
        best_fn=score, preservation_policy=AnyPreservationPolicy([LatestN(1), best])
    )
    try:
        return _Checkpoints(folder, options=options)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{directory}: the score of a checkpoint cannot be read ({error}). Delete "
            f"{directory.parent} to train the fold again"
        ) from error


def _save(
    checkpoints: ocp.CheckpointManager,
    step: int,
    state: Any,
    history: History,
    metrics: dict[str, float] | None,
) -> None:
    """Saves NumPy arrays, from which any number of devices and processes can resume."""
    history = dict(history)  # a copy: it is written while the next steps extend the original
    arrays = jax.device_get(state.replace(frozen=None))
    items = ocp.args.Composite(
        state=ocp.args.StandardSave(arrays), history=ocp.args.JsonSave(history)
    )
    checkpoints.save(step, args=items, metrics=metrics)


def load_selected(directory: Path) -> dict[str, Any]:
    """Loads the selected epoch of a finished stage, without what is frozen.

    Returns:
        The state as nested dicts of NumPy arrays.

    Raises:
        UserError: there is no checkpoint, or it cannot be read.
    """
    if not (directory / "checkpoints").is_dir():
        raise UserError(f"{directory} has no checkpoints: train the stage, or name another workdir")
    with _checkpoint_manager(directory) as checkpoints:
        if (step := checkpoints.best_step()) is None:
            raise UserError(f"{directory}/checkpoints holds no complete epoch: let the run finish")
        return _restore(checkpoints, directory.name, step)[0]


def _restore(
    checkpoints: ocp.CheckpointManager, title: str, step: int, template: Any = None
) -> tuple[Any, History]:
    """Loads the state after `step` as NumPy arrays, and the metrics of its epoch so far."""
    items = ocp.args.Composite(
        state=ocp.args.StandardRestore(template), history=ocp.args.JsonRestore()
    )
    try:
        restored = checkpoints.restore(step, args=items)
    except (ValueError, KeyError, OSError) as error:  # what orbax raises for a damaged file
        raise UserError(
            f"{title}: cannot read the checkpoint {checkpoints.directory / str(step)} "
            f"({str(error).splitlines()[0][:200]}). Delete {checkpoints.directory.parents[1]} to "
            "train the fold again"
        ) from error
    return restored.state, restored.history


def _truncate_log(log: Path, done: int) -> None:
    """Drops lines of epochs that were logged but not saved, and what follows a damaged one."""
    if not log.exists():
        return
    kept = []
    for line in log.read_text(errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= done:
                kept.append(line + "\n")
        except (ValueError, LookupError, TypeError):
            break
    write_file(log, "".join(kept))

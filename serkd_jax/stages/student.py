"""Stage 2: training the student with its contrastive branch (Section 3.2.1, Eqs. 2-3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from ml_collections import ConfigDict

from serkd_jax import losses
from serkd_jax.distributed import parallel
from serkd_jax.models.students.base import Student, StudentOutput
from serkd_jax.stages.augmentation import example_keys, spec_augment
from serkd_jax.stages.base import Batch, Stage, accuracy
from serkd_jax.stages.contrastive import Queue, empty_queue, enqueue, momentum_update
from serkd_jax.stages.standardization import Statistics, standardize

if TYPE_CHECKING:
    from serkd_jax.programs import Programs


class StudentState(struct.PyTreeNode):
    """Everything that the student's training needs in order to resume.

    Attributes:
        step: () int32, the number of steps taken; also the position in the data.
        params: the student's parameters.
        batch_stats: the student's batch statistics; empty if it has none.
        opt_state: the optimiser's state.
        momentum_params: the momentum encoder's parameters, a moving average of the student's.
        momentum_stats: the momentum encoder's batch statistics, a moving average likewise.
        queue: labelled keys of earlier batches.
        frozen: the statistics by which the features are standardised.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    momentum_params: Any
    momentum_stats: Any
    queue: Queue
    frozen: Statistics


@dataclass(frozen=True)
class StudentStage(Stage):
    """Trains the student on cross-entropy and supervised contrastive loss, Eqs. 2-3.

    Attributes:
        student: S.
        new_student: key -> S's variables before the first step.
        optimizer: S's optimiser.
        config: the whole config, of which `contrastive` and `student` are read.
    """

    name = "student"
    reads = ("student", "contrastive")
    rows = ("student",)
    student_row = "student"

    student: Student
    new_student: Callable[[jax.Array], Any]
    optimizer: optax.GradientTransformation
    config: ConfigDict

    @classmethod
    def make(cls, programs: Programs) -> StudentStage:
        """Makes the stage with the models of a config."""
        return cls(
            programs.student,
            programs.new_student,
            programs.make_optimizer("student"),
            programs.config,
        )

    def init(self, rng: jax.Array, statistics: Statistics) -> StudentState:
        """Makes the state before the first step, for features with these statistics."""
        variables = self.new_student(rng)
        return StudentState(
            params=variables["params"],
            opt_state=self.optimizer.init(variables["params"]),
            **new_training(self.student, variables, statistics, self.config.contrastive),
        )

    def step(
        self, state: StudentState, batch: Batch, rng: jax.Array, axis: str | None = None
    ) -> tuple[StudentState, dict[str, jax.Array]]:
        """Takes a step on Eq. 2."""
        dropout_rng, mask_rng = jax.random.split(jax.random.fold_in(rng, state.step))
        features = standardize(batch["inputs"], batch["length"], state.frozen)
        contrastive = self.config.contrastive
        keys, key_labels = encode_keys(
            self.student, state, features, batch, mask_rng, contrastive, axis
        )
        dropout_keys = example_keys(dropout_rng, batch["index"])

        def objective(params: Any) -> tuple[jax.Array, tuple[dict, Any]]:
            out, batch_stats = run_student(
                self.student, params, state.batch_stats, batch, features, dropout_keys, axis
            )
            loss, metrics = student_objective(
                out, batch["label"], keys, key_labels, state.queue, self.config
            )
            return loss, ({"loss": loss, **metrics}, batch_stats)

        grads, (metrics, batch_stats) = jax.grad(objective, has_aux=True)(state.params)
        grads, metrics = parallel.device_mean((grads, metrics), axis)
        metrics["gradient_norm"] = optax.global_norm(grads)
        state = descend(self, state, grads, batch_stats, keys, key_labels, contrastive.momentum)
        return state, metrics


def new_training(
    student: Student, variables: Any, statistics: Statistics, config: ConfigDict
) -> dict[str, Any]:
    """Makes the fields of `StudentState`, except parameters and optimiser, before the first step.

    Args:
        student: the student.
        variables: its variables.
        statistics: what its features are standardised by.
        config: the config's `contrastive` part.
    """
    batch_stats = variables.get("batch_stats", {})
    return {
        "step": jnp.int32(0),
        "batch_stats": batch_stats,
        "momentum_params": jax.tree.map(jnp.copy, variables["params"]),
        "momentum_stats": jax.tree.map(jnp.copy, batch_stats),
        "queue": empty_queue(config.queue_size, student.projection_dims[-1]),
        "frozen": statistics,
    }


def run_student(
    student: Student,
    params: Any,
    batch_stats: Any,
    batch: Batch,
    features: jax.Array,
    dropout_keys: jax.Array,
    axis: str | None,
) -> tuple[StudentOutput, Any]:
    """Runs the student in training mode.

    Returns:
        The outputs, and the updated batch statistics, averaged over all devices.
    """
    out, changed = student.clone(axis=axis).apply(
        {"params": params, "batch_stats": batch_stats},
        features,
        batch["length"],
        dropout_keys,
        mutable=["batch_stats"],
    )
    return out, changed.get("batch_stats", {})


def encode_keys(
    student: Student,
    state: Any,
    features: jax.Array,
    batch: Batch,
    rng: jax.Array,
    config: ConfigDict,
    axis: str | None,
) -> tuple[jax.Array, jax.Array]:
    """Computes the momentum encoder's keys for the SpecAugmented features of all devices.

    Returns:
        Keys (B, P) and their labels (B,), where B is the size of the global batch. The keys are 0
        if the contrastive loss has no weight, since nothing reads them then.
    """
    if not config.weight:
        keys = jnp.zeros((len(batch["label"]), student.projection_dims[-1]))
        return parallel.device_gather((keys, batch["label"]), axis)
    masked = spec_augment(
        example_keys(rng, batch["index"]),
        features,
        batch["length"],
        config.max_frequency_mask,
        config.max_time_mask,
    )
    variables = {"params": state.momentum_params, "batch_stats": state.momentum_stats}
    keys = student.apply(variables, masked, batch["length"]).projection
    return parallel.device_gather((keys, batch["label"]), axis)


def student_objective(
    out: StudentOutput,
    labels: jax.Array,
    keys: jax.Array,
    key_labels: jax.Array,
    queue: Queue,
    config: ConfigDict,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes Eq. 2 (and Eq. 11) for one batch, against its keys and those in the queue.

    Args:
        out: the student's outputs.
        labels: (B,) int, the batch's classes.
        keys: the batch's keys, from all devices.
        key_labels: the labels of `keys`.
        queue: labelled keys of earlier batches.
        config: the whole config.

    Returns:
        The loss, and its parts and the accuracy by name.
    """
    contrastive = jnp.zeros(())
    if config.contrastive.weight:
        contrastive = losses.supervised_contrastive(
            out.projection,
            labels,
            jnp.concatenate([keys, queue.keys]),
            jnp.concatenate([key_labels, queue.labels]),
            config.contrastive.temperature,
        )
    settings = config.student
    cross_entropy = losses.cross_entropy(
        out.logits, labels, settings.label_smoothing, settings.focus
    )
    loss = losses.student_loss(cross_entropy, contrastive, config.contrastive.weight)
    return loss, {
        "cross_entropy": cross_entropy,
        "contrastive": contrastive,
        "accuracy": accuracy(out.logits, labels),
    }


def descend(
    stage: Any,
    state: Any,
    grads: Any,
    batch_stats: Any,
    keys: jax.Array,
    key_labels: jax.Array,
    momentum: float,
) -> Any:
    """Takes an optimiser step, and updates the momentum encoder and the queue after it.

    Args:
        stage: a stage that trains a student, with its `optimizer`.
        state: a state with the fields of `StudentState`.
        grads: the gradient with respect to `state.params`, averaged over the devices.
        batch_stats: the student's batch statistics after the step.
        keys: the batch's keys, from all devices.
        key_labels: the labels of `keys`.
        momentum: the momentum encoder's momentum.

    Returns:
        The next state.
    """
    updates, opt_state = stage.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    student_params = stage.student_params(params)
    return state.replace(
        step=state.step + 1,
        params=params,
        batch_stats=batch_stats,
        opt_state=opt_state,
        momentum_params=momentum_update(state.momentum_params, student_params, momentum),
        momentum_stats=momentum_update(state.momentum_stats, batch_stats, momentum),
        queue=enqueue(state.queue, keys, key_labels),
    )


def predict(student: Student, trained: tuple[Any, Statistics], batch: Batch) -> StudentOutput:
    """Runs a student's forward pass without dropout; `trained` is (variables, statistics)."""
    variables, statistics = trained
    features = standardize(batch["inputs"], batch["length"], statistics)
    return student.apply(variables, features, batch["length"])

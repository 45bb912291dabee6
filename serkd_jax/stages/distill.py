"""Stage 3: distillation with the meta-teacher (Sections 3.2.2 and 3.3, Eqs. 4-9).

The teacher's encoder is frozen, so its hidden vectors h(., T) come with the batch. What remains
of the meta-teacher T' is its classifier, which reads h(., T) or the student's adapted h(., S).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from serkd_jax import losses
from serkd_jax.distributed import parallel
from serkd_jax.errors import UserError
from serkd_jax.models.students.base import Adapter, Student, StudentOutput, adapt
from serkd_jax.models.teacher import Classifier
from serkd_jax.stages.augmentation import example_keys
from serkd_jax.stages.base import Batch, QuizBatch, Stage
from serkd_jax.stages.contrastive import Queue
from serkd_jax.stages.standardization import Statistics, standardize
from serkd_jax.stages.student import (
    StudentState,
    descend,
    encode_keys,
    new_training,
    run_student,
    student_objective,
)

if TYPE_CHECKING:
    from serkd_jax.programs import Programs

Params = dict[str, Any]  # {"student": ..., "adapter": ...}


class DistillState(StudentState):
    """Everything that distillation needs in order to resume: a `StudentState`, and T'.

    Attributes:
        params: `{"student": ..., "adapter": ...}`, trained together; the `adapter` part is empty
            where there is no adapter.
        meta_params: the parameters of T', which is a `Classifier`.
        meta_opt_state: the state of its optimiser.
    """

    params: Params
    meta_params: Any
    meta_opt_state: Any


def meta_value_and_grad(
    config: ConfigDict,
    params: Any,
    meta_params: Any,
    *,
    gradient: Callable[[Any], Any],
    slope_along: Callable[[Any, Any], jax.Array],
    quiz_loss: Callable[[Any, Any], jax.Array],
    axis: str | None,
) -> tuple[jax.Array, Any]:
    """Computes L^col(θ_T', θ_S+) after the pilot step, and its gradient (Section 3.3).

    The pilot step is θ_S+ = θ_S - η ∇_S L(θ_S, θ_T').

    Args:
        config: the config's `meta` part. `order` is `second_order` (a gradient through a
            gradient), `second_order_forward` (the same value, by the chain rule written out) or
            `first_order` (θ_S+ is taken as a constant).
        params: θ_S.
        meta_params: θ_T'.
        gradient: θ_T' -> ∇_S L(θ_S, θ_T'), averaged over the devices.
        slope_along: (v, θ_T') -> v · ∇_S L(θ_S, θ_T').
        quiz_loss: (θ_T', θ_S) -> L^col, Eq. 9.
        axis: name of the device axis under pmap.

    Returns:
        The loss and its gradient with respect to θ_T', averaged over the devices.

    Raises:
        UserError: `order` is none of these.
    """
    rate = config.pilot_learning_rate

    def pilot_step(meta_params: Any) -> Any:
        return jax.tree.map(lambda p, g: p - rate * g, params, gradient(meta_params))

    if config.order == "second_order":
        result = jax.value_and_grad(lambda m: quiz_loss(m, pilot_step(m)))(meta_params)
    elif config.order == "first_order":
        result = jax.value_and_grad(quiz_loss)(meta_params, pilot_step(meta_params))
    elif config.order == "second_order_forward":
        # ∂L^col/∂θ_T' - η ∂/∂θ_T' (v · ∇_S L(θ_S, θ_T')) with v = ∂L^col/∂θ_S+
        both = jax.value_and_grad(quiz_loss, argnums=(0, 1))
        loss, (direct, v) = both(meta_params, pilot_step(meta_params))
        v = parallel.device_mean(v, axis)
        through = jax.grad(slope_along, argnums=1)(v, meta_params)
        result = loss, jax.tree.map(lambda d, t: d - rate * t, direct, through)
    else:
        raise UserError(f"meta.order has no meta-gradient {config.order!r}")
    return parallel.device_mean(result, axis)


@dataclass(frozen=True)
class DistillStage(Stage):
    """Trains a new student on the teacher, and the meta-teacher on the student's quiz.

    Each step (a) takes a pilot step of the student against the current T', (b) updates T' by the
    gradient of Eq. 9 on the quiz batch through that pilot step, and (c) takes the student's real
    step against the new T'. With `meta.order='none'` there is only (c).

    Attributes:
        student: S.
        new_student: key -> S's variables before the first step.
        adapter: maps h(., S) to the teacher's width; None where h(., S) already has it.
        hidden_width: the width of h(., S).
        classifier: T'.
        optimizer: the optimiser of the student and the adapter.
        meta_optimizer: the optimiser of T'.
        config: the whole config, of which `student`, `contrastive`, `distill` and `meta` are read.
    """

    name = "distill"
    starts_from = ("teacher",)
    reads = ("student", "contrastive", "distill", "meta")
    rows = ("meta_teacher", "distilled_student")
    student_row = "distilled_student"

    student: Student
    new_student: Callable[[jax.Array], Any]
    adapter: Adapter | None
    hidden_width: int
    classifier: Classifier
    optimizer: optax.GradientTransformation
    meta_optimizer: optax.GradientTransformation
    config: ConfigDict

    @classmethod
    def make(cls, programs: Programs) -> DistillStage:
        """Makes the stage with the models of a config; T' is trained as long as the student."""
        return cls(
            programs.student,
            programs.new_student,
            programs.adapter,
            programs.student_hidden,
            programs.classifier,
            programs.make_optimizer("distill"),
            programs.make_optimizer("distill", programs.config.meta.learning_rate),
            programs.config,
        )

    @staticmethod
    def student_params(params: Params) -> Any:
        """Selects the student's parameters, without the adapter's."""
        return params["student"]

    def init(self, rng: jax.Array, statistics: Statistics, teacher_classifier: Any) -> DistillState:
        """Makes the state before the first step: a new student, and T' cloned from the teacher.

        Args:
            rng: the key of the initial parameters.
            statistics: the statistics by which the student's features are standardised.
            teacher_classifier: parameters of the fine-tuned teacher's classifier.
        """
        student_rng, adapter_rng = jax.random.split(rng)
        variables = self.new_student(student_rng)
        params = {"student": variables["params"], "adapter": {}}
        if self.adapter:
            hidden = jnp.zeros((1, self.hidden_width))
            params["adapter"] = self.adapter.init(adapter_rng, hidden)["params"]
        return DistillState(
            params=params,
            opt_state=self.optimizer.init(params),
            meta_params=jax.tree.map(jnp.copy, teacher_classifier),
            meta_opt_state=self.meta_optimizer.init(teacher_classifier),
            **new_training(self.student, variables, statistics, self.config.contrastive),
        )

    def step(
        self, state: DistillState, batch: QuizBatch, rng: jax.Array, axis: str | None = None
    ) -> tuple[DistillState, dict[str, jax.Array]]:
        """Takes a step of T' on Eq. 9, and one of the student on Eq. 4."""
        train, quiz, contrastive = batch["train"], batch["quiz"], self.config.contrastive
        dropout_rng, mask_rng = jax.random.split(jax.random.fold_in(rng, state.step))
        features = standardize(train["inputs"], train["length"], state.frozen)
        dropout_keys = example_keys(dropout_rng, train["index"])
        keys, key_labels = encode_keys(
            self.student, state, features, train, mask_rng, contrastive, axis
        )
        run = partial(self._run, state.batch_stats, train, features, dropout_keys, axis)
        objective = partial(self._objective, train, keys, key_labels, state.queue)
        # The pilot step and the real one share a forward pass: they differ only in θ_T', on which
        # the student's outputs do not depend.
        outputs, pull_back, batch_stats = jax.vjp(run, state.params, has_aux=True)

        def gradient(meta_params: Any) -> tuple[Any, dict[str, jax.Array]]:
            """Returns ∇_S of Eq. 4 at θ_S, and the parts of Eq. 4 by name."""
            of_outputs, metrics = jax.grad(objective, has_aux=True)(outputs, meta_params)
            return parallel.device_mean((pull_back(of_outputs)[0], metrics), axis)

        def slope_along(direction: Params, meta_params: Any) -> jax.Array:
            """Returns the directional derivative of Eq. 4 at θ_S."""

            def loss(params: Params) -> jax.Array:
                return objective(run(params)[0], meta_params)[0]

            return jax.jvp(loss, (state.params,), (direction,))[1]

        meta_params, meta_opt_state, meta_metrics = state.meta_params, state.meta_opt_state, {}
        if self.config.meta.order != "none":
            quiz_features = standardize(quiz["inputs"], quiz["length"], state.frozen)
            meta_loss, meta_grads = meta_value_and_grad(
                self.config.meta,
                state.params,
                state.meta_params,
                gradient=lambda meta_params: gradient(meta_params)[0],
                slope_along=slope_along,
                quiz_loss=partial(self._quiz_loss, quiz, quiz_features, batch_stats),
                axis=axis,
            )
            updates, meta_opt_state = self.meta_optimizer.update(
                meta_grads, meta_opt_state, meta_params
            )
            meta_params = optax.apply_updates(meta_params, updates)
            meta_metrics["meta_loss"] = meta_loss
            meta_metrics["meta_gradient_norm"] = optax.global_norm(meta_grads)

        grads, metrics = gradient(meta_params)
        metrics["gradient_norm"] = optax.global_norm(grads)
        state = descend(self, state, grads, batch_stats, keys, key_labels, contrastive.momentum)
        state = state.replace(meta_params=meta_params, meta_opt_state=meta_opt_state)
        return state, {**metrics, **meta_metrics}

    def _run(
        self,
        batch_stats: Any,
        batch: Batch,
        features: jax.Array,
        dropout_keys: jax.Array,
        axis: str | None,
        params: Params,
    ) -> tuple[tuple[StudentOutput, jax.Array], Any]:
        """Returns the student's outputs in training, its adapted h(., S), and batch statistics."""
        out, batch_stats = run_student(
            self.student, params["student"], batch_stats, batch, features, dropout_keys, axis
        )
        return (out, adapt(self.adapter, params["adapter"], out.hidden)), batch_stats

    def _objective(
        self,
        batch: Batch,
        keys: jax.Array,
        key_labels: jax.Array,
        queue: Queue,
        outputs: tuple[StudentOutput, jax.Array],
        meta_params: Any,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns Eq. 4 for the student's outputs, and its parts by name."""
        (out, hidden), config = outputs, self.config.distill
        student_loss, metrics = student_objective(
            out, batch["label"], keys, key_labels, queue, self.config
        )
        soft = jnp.zeros(())
        if config.soft:  # the only term that reads θ_T'
            teacher_logits = self._classify(meta_params, batch["teacher_hidden"])
            soft = losses.soft_label_divergence(
                out.logits, teacher_logits, config.temperature, config.direction
            )
        patient = losses.patient_distillation(batch["teacher_hidden"], hidden)
        loss = losses.distillation_loss(student_loss, soft, patient, config.alpha, config.beta)
        return loss, {"loss": loss, "soft": soft, "patient": patient, **metrics}

    def _quiz_loss(
        self,
        quiz: Batch,
        features: jax.Array,
        batch_stats: Any,
        meta_params: Any,
        params: Params,
    ) -> jax.Array:
        """Returns Eq. 9 on the quiz batch."""
        variables = {"params": params["student"], "batch_stats": batch_stats}
        out = self.student.apply(variables, features, quiz["length"])
        hidden = adapt(self.adapter, params["adapter"], out.hidden)
        return losses.collaborative_loss(
            self._classify(meta_params, quiz["teacher_hidden"]),
            self._classify(meta_params, hidden),
            quiz["label"],
        )

    def _classify(self, meta_params: Any, hidden: jax.Array) -> jax.Array:
        return self.classifier.apply({"params": meta_params}, hidden)

"""Stage 3: distillation with the meta-teacher (Sections 3.2.2 and 3.3, Eqs. 4-9).

The teacher's encoder is frozen, so its hidden vectors h(., T) come with the batch. What is left
of the meta-teacher T' is its classifier, which reads h(., T) or the student's adapted h(., S).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import optax
from flax import struct
from ml_collections import ConfigDict

from serkd_jax import losses
from serkd_jax.distributed import parallel
from serkd_jax.errors import UserError
from serkd_jax.models.students.inverted import Adapter, Student, StudentOutput, adapt
from serkd_jax.models.teacher import Classifier
from serkd_jax.stages.augmentation import example_keys
from serkd_jax.stages.common import Batch
from serkd_jax.stages.contrastive import Queue, empty_queue, enqueue, momentum_update
from serkd_jax.stages.standardization import Statistics, standardize
from serkd_jax.stages.student import encode_keys, student_objective


class DistillState(struct.PyTreeNode):
    """Everything that distillation needs to go on.

    Attributes:
        step: () int32, steps taken; also the position in the data.
        params: ``{"student": ..., "adapter": ...}``, trained together; without an adapter, that
            part is empty.
        opt_state: of their optimiser.
        meta_params: of T', the :class:`Classifier`.
        meta_opt_state: of its optimiser.
        momentum_params: of the student's momentum encoder.
        queue: labelled keys of earlier batches.
        statistics: what the student's features are standardised by.
    """

    step: jax.Array
    params: dict[str, Any]
    opt_state: Any
    meta_params: Any
    meta_opt_state: Any
    momentum_params: Any
    queue: Queue
    statistics: Statistics


class DistillBatch(TypedDict):
    """A training batch and the quiz batch of the same step."""

    train: Batch
    quiz: Batch


def init_state(
    params: dict[str, Any],
    meta_params: Any,
    optimizer: optax.GradientTransformation,
    meta_optimizer: optax.GradientTransformation,
    config: ConfigDict,
    projection_dim: int,
    statistics: Statistics,
) -> DistillState:
    """State before the first step.

    Args:
        params: ``{"student": ..., "adapter": ...}``.
        meta_params: the fine-tuned teacher's classifier, of which T' is a clone.
        optimizer: of ``params``.
        meta_optimizer: of ``meta_params``.
        config: the config's ``contrastive`` part.
        projection_dim: width of the contrastive embedding.
        statistics: what the student's features are standardised by.
    """
    return DistillState(
        step=jnp.int32(0),
        params=params,
        opt_state=optimizer.init(params),
        meta_params=jax.tree.map(jnp.copy, meta_params),
        meta_opt_state=meta_optimizer.init(meta_params),
        momentum_params=jax.tree.map(jnp.copy, params["student"]),
        queue=empty_queue(config.queue_size, projection_dim),
        statistics=statistics,
    )


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
    """L^col(θ_T', θ_S+) after the pilot step θ_S+ = θ_S - η ∇_S L(θ_S, θ_T'), Section 3.3.

    Args:
        config: the config's ``meta`` part. ``order`` is ``second_order`` (a gradient through a
            gradient), ``second_order_forward`` (the same number, by the chain rule written out)
            or ``first_order`` (θ_S+ is taken as given).
        params: θ_S.
        meta_params: θ_T'.
        gradient: θ_T' -> ∇_S L(θ_S, θ_T'), the mean over the devices.
        slope_along: (v, θ_T') -> v · ∇_S L(θ_S, θ_T').
        quiz_loss: (θ_T', θ_S) -> L^col, Eq. 9.
        axis: name of the device axis under pmap.

    Returns:
        The loss and its gradient in θ_T', means over the devices.

    Raises:
        UserError: there is no such order.
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


def make_step(
    student: Student,
    adapter: Adapter | None,
    classifier: Classifier,
    optimizer: optax.GradientTransformation,
    meta_optimizer: optax.GradientTransformation,
    config: ConfigDict,
    axis: str | None = None,
) -> Callable[[DistillState, DistillBatch, jax.Array], tuple[DistillState, dict[str, jax.Array]]]:
    """Makes the pure training step.

    Each step (a) takes a pilot step of the student against the present T', (b) updates T' by the
    gradient of Eq. 9 on the quiz batch through that pilot step, and (c) takes the student's real
    step against the new T'. With ``meta.order='none'`` the third is the only one.

    Args:
        student: S.
        adapter: maps h(., S) to the teacher's width; None where it has that.
        classifier: T'.
        optimizer: of the student and the adapter.
        meta_optimizer: of T'.
        config: the whole config; ``contrastive``, ``distill`` and ``meta`` are read.
        axis: name of the device axis under pmap.
    """

    def classify(meta_params: Any, hidden: jax.Array) -> jax.Array:
        return classifier.apply({"params": meta_params}, hidden)

    def soft_loss(logits: jax.Array, meta_params: Any, train: Batch) -> jax.Array:
        """L^soft of the student's logits, the only term of Eq. 4 that reads θ_T'."""
        if not config.distill.soft:
            return jnp.zeros(())
        return losses.soft_label_divergence(
            logits,
            classify(meta_params, train["teacher_hidden"]),
            config.distill.temperature,
            config.distill.direction,
        )

    def quiz_loss(
        quiz: Batch, features: jax.Array, meta_params: Any, params: dict[str, Any]
    ) -> jax.Array:
        """Eq. 9."""
        hidden = student.apply({"params": params["student"]}, features, quiz["length"]).hidden
        return losses.collaborative_loss(
            classify(meta_params, quiz["teacher_hidden"]),
            classify(meta_params, adapt(adapter, params["adapter"], hidden)),
            quiz["label"],
        )

    def step(state: DistillState, batch: DistillBatch, rng: jax.Array) -> tuple:
        train, quiz = batch["train"], batch["quiz"]
        dropout_rng, mask_rng = jax.random.split(jax.random.fold_in(rng, state.step))
        features = standardize(train["inputs"], train["length"], state.statistics)
        keys, key_labels = encode_keys(
            student, state.momentum_params, features, train, mask_rng, config.contrastive, axis
        )
        dropout_keys = example_keys(dropout_rng, train["index"])

        def run_student(params: dict[str, Any]) -> tuple[StudentOutput, jax.Array]:
            """The student's outputs on the training batch, and its hidden vectors adapted."""
            inputs = features, train["length"], dropout_keys
            out = student.apply({"params": params["student"]}, *inputs)
            return out, adapt(adapter, params["adapter"], out.hidden)

        def objective(outputs: tuple[StudentOutput, jax.Array], meta_params: Any) -> tuple:
            """Eq. 4 of the student's outputs, and its parts by name."""
            out, hidden = outputs
            student_loss, metrics = student_objective(
                out, train["label"], keys, key_labels, state.queue, config.contrastive
            )
            soft = soft_loss(out.logits, meta_params, train)
            patient = losses.patient_distillation(train["teacher_hidden"], hidden)
            loss = losses.distillation_loss(
                student_loss, soft, patient, config.distill.alpha, config.distill.beta
            )
            return loss, {"loss": loss, "soft": soft, "patient": patient, **metrics}

        # The pilot step and the real one go back through one forward pass: they differ in θ_T',
        # which the student's outputs do not depend on.
        outputs, pull_back = jax.vjp(run_student, state.params)

        def gradient(meta_params: Any) -> tuple[Any, dict[str, jax.Array]]:
            """∇_S of Eq. 4 at θ_S, and its parts by name."""
            of_outputs, metrics = jax.grad(objective, has_aux=True)(outputs, meta_params)
            return parallel.device_mean((pull_back(of_outputs)[0], metrics), axis)

        def slope_along(direction: dict[str, Any], meta_params: Any) -> jax.Array:
            """Of Eq. 4 at θ_S."""

            def loss(params: dict[str, Any]) -> jax.Array:
                return objective(run_student(params), meta_params)[0]

            return jax.jvp(loss, (state.params,), (direction,))[1]

        meta_params, meta_opt_state = state.meta_params, state.meta_opt_state
        meta_metrics = {}
        if config.meta.order != "none":
            quiz_features = standardize(quiz["inputs"], quiz["length"], state.statistics)
            meta_loss, meta_grads = meta_value_and_grad(
                config.meta,
                state.params,
                state.meta_params,
                gradient=lambda meta_params: gradient(meta_params)[0],
                slope_along=slope_along,
                quiz_loss=partial(quiz_loss, quiz, quiz_features),
                axis=axis,
            )
            updates, meta_opt_state = meta_optimizer.update(meta_grads, meta_opt_state, meta_params)
            meta_params = optax.apply_updates(meta_params, updates)
            meta_metrics["meta_loss"] = meta_loss
            meta_metrics["meta_gradient_norm"] = optax.global_norm(meta_grads)

        grads, metrics = gradient(meta_params)
        metrics["gradient_norm"] = optax.global_norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        state = state.replace(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            meta_params=meta_params,
            meta_opt_state=meta_opt_state,
            momentum_params=momentum_update(
                state.momentum_params, params["student"], config.contrastive.momentum
            ),
            queue=enqueue(state.queue, keys, key_labels),
        )
        return state, {**metrics, **meta_metrics}

    return step

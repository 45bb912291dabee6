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

from serkd_jax import losses, parallel
from serkd_jax.augmentation import example_keys
from serkd_jax.contrastive import Queue, empty_queue, enqueue, momentum_update
from serkd_jax.models.student import Adapter, Student, StudentOutput
from serkd_jax.models.teacher import Classifier
from serkd_jax.stages.common import Batch, forward
from serkd_jax.stages.student import encode_keys, student_objective


class DistillState(struct.PyTreeNode):
    """Everything that distillation needs to go on.

    Attributes:
        step: () int32, steps taken; also the position in the data.
        params: ``{"student": ..., "adapter": ...}``, trained together.
        opt_state: of their optimiser.
        meta_params: of T', the :class:`Classifier`.
        meta_opt_state: of its optimiser.
        momentum_params: of the student's momentum encoder.
        queue: labelled keys of earlier batches.
    """

    step: jax.Array
    params: dict[str, Any]
    opt_state: Any
    meta_params: Any
    meta_opt_state: Any
    momentum_params: Any
    queue: Queue


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
) -> DistillState:
    """State before the first step.

    Args:
        params: ``{"student": ..., "adapter": ...}``.
        meta_params: the fine-tuned teacher's classifier, of which T' is a clone.
        optimizer: of ``params``.
        meta_optimizer: of ``meta_params``.
        config: the config's ``contrastive`` part.
        projection_dim: width of the contrastive embedding.
    """
    return DistillState(
        step=jnp.int32(0),
        params=params,
        opt_state=optimizer.init(params),
        meta_params=jax.tree.map(jnp.copy, meta_params),
        meta_opt_state=meta_optimizer.init(meta_params),
        momentum_params=jax.tree.map(jnp.copy, params["student"]),
        queue=empty_queue(config.queue_size, projection_dim),
    )


def make_step(
    student: Student,
    adapter: Adapter,
    classifier: Classifier,
    optimizer: optax.GradientTransformation,
    meta_optimizer: optax.GradientTransformation,
    config: ConfigDict,
    axis: str | None = None,
) -> Callable[[DistillState, DistillBatch, jax.Array], tuple[DistillState, dict[str, jax.Array]]]:
    """Makes the pure training step.

    Each step (a) takes a pilot step of the student against the present T', (b) updates T' by the
    gradient of Eq. 9 on the quiz batch through that pilot step, and (c) takes the student's real
    step against the new T'. ``meta.order`` says how far (b) goes: ``second_order`` is a gradient
    through a gradient, ``second_order_forward`` the same number for less, ``first_order`` takes
    the pilot student as given, and ``none`` leaves T' as it is.

    Args:
        student: S.
        adapter: maps h(., S) to the teacher's width.
        classifier: T'.
        optimizer: of the student and the adapter.
        meta_optimizer: of T'.
        config: the whole config; ``contrastive``, ``distill`` and ``meta`` are read.
        axis: name of the device axis under pmap.
    """
    rate = config.meta.pilot_learning_rate

    def classify(meta_params: Any, hidden: jax.Array) -> jax.Array:
        return classifier.apply({"params": meta_params}, hidden)

    def adapt(params: dict[str, Any], hidden: jax.Array) -> jax.Array:
        return adapter.apply({"params": params["adapter"]}, hidden)

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

    def quiz_loss(meta_params: Any, params: dict[str, Any], quiz: Batch) -> jax.Array:
        """Eq. 9."""
        features = quiz["inputs"].astype(jnp.float32)
        hidden = forward(student, params["student"], features, quiz["length"]).hidden
        return losses.collaborative_loss(
            classify(meta_params, quiz["teacher_hidden"]),
            classify(meta_params, adapt(params, hidden)),
            quiz["label"],
        )

    def step(state: DistillState, batch: DistillBatch, rng: jax.Array) -> tuple:
        train, quiz = batch["train"], batch["quiz"]
        dropout_rng, mask_rng = jax.random.split(jax.random.fold_in(rng, state.step))
        keys, key_labels = encode_keys(
            student, state.momentum_params, train, mask_rng, config.contrastive, axis
        )
        features = train["inputs"].astype(jnp.float32)
        dropout_keys = example_keys(dropout_rng, train["index"])

        def run_student(params: dict[str, Any]) -> StudentOutput:
            return forward(student, params["student"], features, train["length"], dropout_keys)

        def distillation_objective(params: dict[str, Any], meta_params: Any) -> tuple:
            """Eq. 4 on the training batch."""
            out = run_student(params)
            student_loss, metrics = student_objective(
                out, train["label"], keys, key_labels, state.queue, config.contrastive
            )
            soft = soft_loss(out.logits, meta_params, train)
            patient = losses.patient_distillation(
                train["teacher_hidden"], adapt(params, out.hidden)
            )
            loss = losses.distillation_loss(
                student_loss, soft, patient, config.distill.alpha, config.distill.beta
            )
            return loss, {"loss": loss, "soft": soft, "patient": patient, **metrics}

        def distillation_gradient(meta_params: Any) -> tuple:
            gradient = jax.grad(distillation_objective, has_aux=True)
            return parallel.device_mean(gradient(state.params, meta_params), axis)

        def pilot_step(meta_params: Any) -> dict[str, Any]:
            """θ_S+ = θ_S - η ∇_S L(θ_S, θ_T'), a plain gradient step."""
            grads, _ = distillation_gradient(meta_params)
            return jax.tree.map(lambda p, g: p - rate * g, state.params, grads)

        def slope_along(direction: dict[str, Any], meta_params: Any) -> jax.Array:
            """The slope of (1-α) L^soft at θ_S along ``direction``: a forward-mode product."""
            logits, tangent = jax.jvp(
                lambda params: run_student(params).logits, (state.params,), (direction,)
            )
            soft = partial(soft_loss, meta_params=meta_params, train=train)
            return (1.0 - config.distill.alpha) * jax.jvp(soft, (logits,), (tangent,))[1]

        def meta_gradient() -> tuple[jax.Array, Any]:
            """Eq. 9 at θ_S+(θ_T'), and its gradient in θ_T' to the order of the config."""
            if config.meta.order == "second_order":
                return jax.value_and_grad(lambda m: quiz_loss(m, pilot_step(m), quiz))(
                    state.meta_params
                )
            pilot = pilot_step(state.meta_params)
            if config.meta.order == "first_order":
                return jax.value_and_grad(quiz_loss)(state.meta_params, pilot, quiz)
            # The chain rule by hand. Of ∇_S L only L^soft depends on θ_T', so that
            # dL^col/dθ_T' = ∂L^col/∂θ_T' - η ∂/∂θ_T' (∂L^col/∂θ_S+ · ∇_S (1-α) L^soft).
            loss, (direct, direction) = jax.value_and_grad(quiz_loss, argnums=(0, 1))(
                state.meta_params, pilot, quiz
            )
            direction = parallel.device_mean(direction, axis)
            through = jax.grad(partial(slope_along, direction))(state.meta_params)
            return loss, jax.tree.map(lambda d, t: d - rate * t, direct, through)

        meta_params, meta_opt_state = state.meta_params, state.meta_opt_state
        meta_metrics = {}
        if config.meta.order != "none":
            meta_loss, meta_grads = parallel.device_mean(meta_gradient(), axis)
            updates, meta_opt_state = meta_optimizer.update(meta_grads, meta_opt_state, meta_params)
            meta_params = optax.apply_updates(meta_params, updates)
            meta_metrics["meta_loss"] = meta_loss

        grads, metrics = distillation_gradient(meta_params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        state = DistillState(
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

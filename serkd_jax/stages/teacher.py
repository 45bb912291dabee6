"""Stage 1: fine-tuning the teacher (Section 3.1, Eq. 1)."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from ml_collections import ConfigDict

from serkd_jax import losses
from serkd_jax.distributed import parallel
from serkd_jax.encoders.base import normalize_waveform
from serkd_jax.models.teacher import Teacher, TeacherOutput
from serkd_jax.stages.augmentation import example_keys, spec_augment
from serkd_jax.stages.common import Batch, accuracy
from serkd_jax.stages.standardization import Statistics, standardize


class TeacherState(struct.PyTreeNode):
    """Everything that fine-tuning needs to go on.

    Attributes:
        step: () int32, steps taken; also the position in the data.
        params: of :class:`Teacher`.
        opt_state: of the optimiser.
        frozen: parameters of the encoder's front, for waveforms; `Statistics`, for features.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    frozen: Any


def init_state(params: Any, optimizer: optax.GradientTransformation, frozen: Any) -> TeacherState:
    """State before the first step."""
    return TeacherState(jnp.int32(0), params, optimizer.init(params), frozen)


def make_frames(embed: nn.Module | None, normalize: bool) -> Callable:
    """Makes the map from stored inputs to the frames that the trained layers read.

    Args:
        embed: the frozen front of an encoder, for waveforms; None for stored features.
        normalize: whether each waveform is standardised, as the checkpoint's preprocessor says.

    Returns:
        A function of (what is frozen, inputs, length) that gives (B, T, N) float32 frames and
        their (B, T) mask.
    """

    def from_features(statistics: Statistics, inputs: jax.Array, length: jax.Array) -> tuple:
        mask = jnp.arange(inputs.shape[1]) < length[:, None]
        return standardize(inputs, length, statistics), mask

    def from_waveform(frozen: Any, inputs: jax.Array, length: jax.Array) -> tuple:
        waveform = inputs.astype(jnp.float32) / 32768.0
        if normalize:
            waveform = normalize_waveform(waveform, length)
        return embed.apply({"params": frozen}, waveform, length)

    return from_features if embed is None else from_waveform


def make_step(
    teacher: Teacher,
    to_frames: Callable,
    optimizer: optax.GradientTransformation,
    config: ConfigDict,
    axis: str | None = None,
) -> Callable[[TeacherState, Batch, jax.Array], tuple[TeacherState, dict[str, jax.Array]]]:
    """Makes the pure training step; ``config`` is the config's ``teacher`` part."""

    def step(state: TeacherState, batch: Batch, rng: jax.Array) -> tuple:
        dropout_rng, mask_rng = jax.random.split(jax.random.fold_in(rng, state.step))
        frames, mask = to_frames(state.frozen, batch["inputs"], batch["length"])
        frames = spec_augment(
            example_keys(mask_rng, batch["index"]),
            frames,
            mask.sum(1),
            config.max_frequency_mask,
            config.max_time_mask,
        )
        dropout_keys = example_keys(dropout_rng, batch["index"])

        def loss_fn(params: Any) -> tuple[jax.Array, jax.Array]:
            logits = teacher.apply({"params": params}, frames, mask, dropout_keys).logits
            return losses.cross_entropy(logits, batch["label"]), logits

        (loss, logits), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        metrics = {"loss": loss, "accuracy": accuracy(logits, batch["label"])}
        grads, metrics = parallel.device_mean((grads, metrics), axis)
        metrics["gradient_norm"] = optax.global_norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return step


def make_predict(
    teacher: Teacher, to_frames: Callable
) -> Callable[[TeacherState, Batch], TeacherOutput]:
    """Makes the deterministic forward pass of a batch's ``inputs`` and ``length``."""

    def predict(state: TeacherState, batch: Batch) -> TeacherOutput:
        frames, mask = to_frames(state.frozen, batch["inputs"], batch["length"])
        return teacher.apply({"params": state.params}, frames, mask)

    return predict

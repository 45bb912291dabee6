"""Stage 1: fine-tuning the teacher (Section 3.1, Eq. 1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from ml_collections import ConfigDict

from serkd_jax import losses
from serkd_jax.audio.waveform import FULL_SCALE
from serkd_jax.distributed import parallel
from serkd_jax.encoders.base import normalize_waveform
from serkd_jax.models.frames import valid_frames
from serkd_jax.models.teacher import Teacher, TeacherOutput
from serkd_jax.stages.augmentation import example_keys, spec_augment
from serkd_jax.stages.base import Batch, Stage, accuracy
from serkd_jax.stages.standardization import standardize

if TYPE_CHECKING:
    from serkd_jax.programs import Programs


class TeacherState(struct.PyTreeNode):
    """Everything that fine-tuning needs in order to resume.

    Attributes:
        step: () int32, the number of steps taken; also the position in the data.
        params: the parameters of `Teacher`.
        opt_state: the optimiser's state.
        frozen: for waveforms, the parameters of the encoder's front; for features, `Statistics`.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    frozen: Any


@dataclass(frozen=True)
class TeacherStage(Stage):
    """Trains the teacher on cross-entropy, Eq. 1.

    Attributes:
        teacher: T.
        new_params: key -> T's parameters before the first step, pretrained layers included.
        embed: the frozen front of an encoder, for waveforms; None for stored features.
        normalize: whether each waveform is standardised, as the checkpoint's preprocessor says.
        optimizer: T's optimiser.
        config: the config's `teacher` part.
    """

    name = "teacher"
    reads = ("teacher",)
    rows = ("teacher",)

    teacher: Teacher
    new_params: Callable[[jax.Array], Any]
    embed: nn.Module | None
    normalize: bool
    optimizer: optax.GradientTransformation
    config: ConfigDict

    @classmethod
    def make(cls, programs: Programs) -> TeacherStage:
        """Makes the stage with the models of a config."""
        return cls(
            programs.teacher,
            programs.new_teacher_params,
            programs.embed,
            programs.normalizes_waveforms,
            programs.make_optimizer("teacher"),
            programs.config.teacher,
        )

    def init(self, rng: jax.Array, frozen: Any) -> TeacherState:
        """Makes the state before the first step."""
        params = self.new_params(rng)
        return TeacherState(jnp.int32(0), params, self.optimizer.init(params), frozen)

    def step(
        self, state: TeacherState, batch: Batch, rng: jax.Array, axis: str | None = None
    ) -> tuple[TeacherState, dict[str, jax.Array]]:
        """Takes a step on Eq. 1."""
        dropout_rng, mask_rng = jax.random.split(jax.random.fold_in(rng, state.step))
        frames, mask = self._frames(state.frozen, batch)
        frames = spec_augment(
            example_keys(mask_rng, batch["index"]),
            frames,
            mask.sum(1),
            self.config.max_frequency_mask,
            self.config.max_time_mask,
        )
        dropout_keys = example_keys(dropout_rng, batch["index"])

        def objective(params: Any) -> tuple[jax.Array, jax.Array]:
            logits = self.teacher.apply({"params": params}, frames, mask, dropout_keys).logits
            return losses.cross_entropy(logits, batch["label"]), logits

        (loss, logits), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
        metrics = {"loss": loss, "accuracy": accuracy(logits, batch["label"])}
        grads, metrics = parallel.device_mean((grads, metrics), axis)
        metrics["gradient_norm"] = optax.global_norm(grads)
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    def predict(self, state: TeacherState, batch: Batch) -> TeacherOutput:
        """Runs the forward pass on a batch's `inputs` and `length`, without dropout."""
        frames, mask = self._frames(state.frozen, batch)
        return self.teacher.apply({"params": state.params}, frames, mask)

    def _frames(self, frozen: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Returns the (B, T, N) float32 frames that the trained layers read, and their mask."""
        inputs, length = batch["inputs"], batch["length"]
        if self.embed is None:
            return standardize(inputs, length, frozen), valid_frames(inputs, length)
        waveform = inputs.astype(jnp.float32) / FULL_SCALE
        if self.normalize:
            waveform = normalize_waveform(waveform, length)
        return self.embed.apply({"params": frozen}, waveform, length)

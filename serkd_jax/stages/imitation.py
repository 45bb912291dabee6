"""Before the stages: a small encoder learns to predict the hidden states of a large one.

This is distillation without labels, as in DistilHuBERT (Chang et al. 2022), from frame to frame.
Any speech serves; `serkd_jax.pretrain` is the command.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from serkd_jax.audio.logmel import LOG_SCALE
from serkd_jax.distributed import parallel
from serkd_jax.models.frames import valid_frames
from serkd_jax.models.students.convolutional import FrameEncoder
from serkd_jax.stages.augmentation import example_keys
from serkd_jax.stages.base import Batch
from serkd_jax.stages.standardization import Statistics, standardize

LEVEL = 3.0  # dB, the standard deviation by which the level of a recording is changed


class PretrainState(struct.PyTreeNode):
    """Everything that pretraining needs in order to resume.

    Attributes:
        step: () int32, the number of steps taken.
        params: the parameters of the small encoder.
        opt_state: the optimiser's state.
        frozen: statistics of the log-mel bands and of the hidden states.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    frozen: Statistics


@dataclass(frozen=True)
class Pretraining:
    """Trains an encoder of log-mel frames on the hidden states that are stored beside them.

    Attributes:
        encoder: the small encoder.
        num_mels: number of log-mel bands, the first part of a frame; the rest is the hidden state.
        optimizer: its optimiser.
    """

    encoder: FrameEncoder
    num_mels: int
    optimizer: optax.GradientTransformation

    def init(self, rng: jax.Array, statistics: Statistics) -> PretrainState:
        """Makes the state before the first step."""
        frames = jnp.zeros((1, 1, self.num_mels))
        params = self.encoder.init(rng, frames, jnp.ones((1, 1), bool))["params"]
        return PretrainState(jnp.int32(0), params, self.optimizer.init(params), statistics)

    def step(
        self, state: PretrainState, batch: Batch, rng: jax.Array, axis: str | None = None
    ) -> tuple[PretrainState, dict[str, jax.Array]]:
        """Takes a step on the squared error of standardised hidden states."""
        keys = example_keys(jax.random.fold_in(rng, state.step), batch["index"])
        decibels = LEVEL * jax.vmap(jax.random.normal)(keys)
        batch = {**batch, "inputs": change_level(batch["inputs"], self.num_mels, decibels)}

        def objective(params: Any) -> jax.Array:
            return self.errors(state.replace(params=params), batch).mean()

        loss, grads = parallel.device_mean(jax.value_and_grad(objective)(state.params), axis)
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, "gradient_norm": optax.global_norm(grads)}
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    def errors(self, state: PretrainState, batch: Batch) -> jax.Array:
        """Returns (B,), for each utterance the mean squared error over valid frames and widths."""
        frames = standardize(batch["inputs"], batch["length"], state.frozen)
        valid = valid_frames(frames, batch["length"])
        features, hidden = frames[..., : self.num_mels], frames[..., self.num_mels :]
        predicted = self.encoder.apply({"params": state.params}, features, valid)
        squared = jnp.square(predicted - hidden).mean(-1)
        return jnp.where(valid, squared, 0).sum(1) / batch["length"]


def change_level(frames: jax.Array, num_mels: int, decibels: jax.Array) -> jax.Array:
    """Returns (B, T, N) frames whose first `num_mels` are log-mel of a level changed by (B,) dB.

    Silence, which is 0, stays silence; see `serkd_jax.audio.logmel`.
    """
    bands = frames[..., :num_mels].astype(jnp.float32)
    changed = jnp.maximum(bands + (decibels / 10 / LOG_SCALE)[:, None, None], 0)
    changed = jnp.where(bands > 0, changed, 0).astype(frames.dtype)
    return jnp.concatenate([changed, frames[..., num_mels:]], axis=-1)

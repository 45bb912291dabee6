"""The teacher (Section 3.1): an encoder's transformer layers, mean over frames, classifier."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from serkd_jax.errors import UserError
from serkd_jax.models.student import masked_mean, sinusoidal_positions
from serkd_jax.models.transformer import LayerNorm


class TeacherOutput(NamedTuple):
    """What the teacher says of a batch."""

    hidden: jax.Array  # (B, H) pooled encoder output, h(., T)
    logits: jax.Array  # (B, C) ŷ(., T)


class Classifier(nn.Module):
    """H-128-64-C. The meta-teacher (Section 3.3) is a clone of this part, trained further."""

    num_classes: int

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        """(B, H) -> (B, C) logits."""
        hidden = nn.relu(nn.Dense(128, name="dense_0")(hidden))
        hidden = nn.relu(nn.Dense(64, name="dense_1")(hidden))
        return nn.Dense(self.num_classes, name="dense_2")(hidden)


class Teacher(nn.Module):
    """Fine-tuned part of the teacher: everything after the frozen front of an encoder.

    Attributes:
        encoder: the transformer layers, of `serkd_jax.encoders`: a module of (frames, frame_mask,
            dropout_keys) with a configuration as its ``config``.
        num_classes: C.
        patch_frames: 0 for frames that are what the layers read: of the encoder's front, or
            precomputed features. For others, such as log-mel, how many of them are joined to one
            token, to which sinusoidal positions are added.
    """

    encoder: nn.Module
    num_classes: int
    patch_frames: int = 0

    @nn.compact
    def __call__(
        self, frames: jax.Array, frame_mask: jax.Array, dropout_keys: jax.Array | None = None
    ) -> TeacherOutput:
        """Encodes and classifies.

        Args:
            frames: (B, T, H), or (B, T, N) with ``patch_frames``.
            frame_mask: (B, T) bool, True at valid frames.
            dropout_keys: (B,) a key per example; None turns dropout off.
        """
        width = self.encoder.config.hidden_size
        if self.patch_frames:
            # Not as a convolution, whose gradient is slow on a CPU; filled up at the end with 0.
            frames = LayerNorm(name="input_norm")(frames)
            frames = jnp.where(frame_mask[..., None], frames, 0)
            missing = -frames.shape[1] % self.patch_frames
            frames = jnp.pad(frames, ((0, 0), (0, missing), (0, 0)))
            patches = frames.reshape(len(frames), -1, self.patch_frames, frames.shape[-1])
            frames = nn.DenseGeneral(width, axis=(-2, -1), name="patches")(patches)
            frames += sinusoidal_positions(frames.shape[1], width)
            frame_mask = frame_mask[:, :: self.patch_frames]
        elif frames.shape[-1] != width:
            raise UserError(
                f"the teacher's layers are {width} wide but its input frames {frames.shape[-1]}: "
                "set teacher.patch_frames or use another front-end"
            )
        encoded, _ = self.encoder(frames, frame_mask, dropout_keys)
        encoded = encoded.astype(jnp.promote_types(encoded.dtype, jnp.float32))
        hidden = masked_mean(encoded, frame_mask)
        return TeacherOutput(hidden, Classifier(self.num_classes, name="classifier")(hidden))

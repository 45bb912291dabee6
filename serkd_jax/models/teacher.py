"""The teacher (Section 3.1): an encoder's transformer layers, mean over frames, classifier."""

from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from serkd_jax.errors import UserError
from serkd_jax.models.frames import (
    at_least_float32,
    average_frames,
    masked_mean,
    sinusoidal_positions,
)
from serkd_jax.models.transformer import LayerNorm, mlp


class TeacherOutput(NamedTuple):
    """The teacher's outputs for a batch."""

    hidden: jax.Array  # (B, H) pooled (and projected) encoder output, h(., T)
    logits: jax.Array  # (B, C) ŷ(., T)


class Classifier(nn.Module):
    """An MLP. The meta-teacher (Section 3.3) is a clone of this part, trained further.

    Attributes:
        num_classes: C.
        dims: hidden widths; empty for a single linear layer.
    """

    num_classes: int
    dims: Sequence[int] = (128, 64)

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Maps hidden vectors (B, H) to logits (B, C)."""
        return mlp(hidden, (*self.dims, self.num_classes), "dense")


class Teacher(nn.Module):
    """The trained part of the teacher: everything after the frozen front of an encoder.

    Attributes:
        encoder: the transformer layers, from `serkd_jax.encoders`: a module that is called with
            (frames, frame_mask, dropout_keys) and has a configuration as its `config`.
        num_classes: C.
        patch_frames: 0 if the layers can read the frames as they are: outputs of the encoder's
            front, or precomputed features. For other frames, such as log-mel, the number of frames
            that are joined into a token, to which sinusoidal positions are added.
        projector: H, the width of a linear projection, as in the classifiers of the library
            `transformers`; 0 for none, in which case H is the encoder's width.
        classifier_dims: hidden widths of the classifier.
        time_pooling: with `patch_frames`, the number of frames that are averaged before joining.
    """

    encoder: nn.Module
    num_classes: int
    patch_frames: int = 0
    projector: int = 0
    classifier_dims: Sequence[int] = (128, 64)
    time_pooling: int = 1

    @nn.compact
    def __call__(
        self, frames: jax.Array, frame_mask: jax.Array, dropout_keys: jax.Array | None = None
    ) -> TeacherOutput:
        """Encodes and classifies.

        Args:
            frames: (B, T, the encoder's width), or (B, T, N) with `patch_frames`.
            frame_mask: (B, T) bool, True at valid frames.
            dropout_keys: (B,) keys, one per example; None turns dropout off.
        """
        width = self.encoder.config.hidden_size
        if self.patch_frames:
            # Not a convolution, whose gradient is slow on a CPU. The end is padded with zeros.
            frames = LayerNorm(name="input_norm")(frames)
            frames = jnp.where(frame_mask[..., None], frames, 0)
            frames, frame_mask = average_frames(frames, frame_mask, self.time_pooling)
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
        hidden = masked_mean(at_least_float32(encoded), frame_mask)
        if self.projector:  # after the mean over frames, with which it commutes
            hidden = nn.Dense(self.projector, name="projector")(hidden)
        classifier = Classifier(self.num_classes, self.classifier_dims, name="classifier")
        return TeacherOutput(hidden, classifier(hidden))

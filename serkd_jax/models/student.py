"""The student (Section 3.2.1): an inverted transformer over variate tokens."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from serkd_jax.losses import l2_normalize
from serkd_jax.models.transformer import Dropout, EncoderLayer


class StudentOutput(NamedTuple):
    """What the student says of a batch."""

    hidden: jax.Array  # (B, D) pooled encoder output, h(., S)
    logits: jax.Array  # (B, C) ŷ(., S)
    projection: jax.Array | None  # (B, P) L2-normalised contrastive embedding, z


class Student(nn.Module):
    """(B, T, N) features -> (B, N, T) -> Dense -> (B, N, D) -> encoder -> mean over N -> classes.

    Attributes:
        num_classes: C.
        width: D, the encoding dimension.
        mlp_dim: width of each feed-forward network.
        num_heads: attention heads.
        num_layers: encoder layers.
        classifier_dim: hidden width of the classifier.
        projection_dim: P of the contrastive projection, which training alone needs; 0: none.
        dropout: in the encoder layers.
        inverted: tokens are variates (the paper's model); False gives the ordinary encoder of
            Table 4, whose tokens are frames with sinusoidal positions.
        variate_embedding: adds a learned vector per variate to its token. Without it the model
            cannot tell one variate from another but by its course in time.
        use_norm: iTransformer's standardisation of every series over its valid frames.
        time_pooling: frames averaged to one time point before the embedding; 1 is the paper's.
            More leaves the embedding fewer weights to learn from a small corpus.
        dtype: of the encoder's computation; None means that of inputs and parameters.
        remat: whether a layer's activations are computed again for the gradient, not kept.
        attention_form: see :func:`serkd_jax.models.transformer.attend`.
    """

    num_classes: int
    width: int = 512
    mlp_dim: int = 1792
    num_heads: int = 8
    num_layers: int = 4
    classifier_dim: int = 128
    projection_dim: int = 256
    dropout: float = 0.1
    inverted: bool = True
    variate_embedding: bool = False
    use_norm: bool = False
    time_pooling: int = 1
    dtype: DTypeLike | None = None
    remat: bool = False
    attention_form: str = "auto"

    @nn.compact
    def __call__(
        self, features: jax.Array, num_frames: jax.Array, dropout_keys: jax.Array | None = None
    ) -> StudentOutput:
        """Encodes and classifies.

        Args:
            features: (B, T, N) float, zero after each example's ``num_frames`` frames.
            num_frames: (B,) int.
            dropout_keys: (B,) a key per example; None turns dropout off.
        """
        valid = jnp.arange(features.shape[1]) < num_frames[:, None]
        if self.use_norm:
            features = standardize_series(features, valid)
        if self.time_pooling > 1:
            window = (self.time_pooling,)
            features = nn.avg_pool(features, window_shape=window, strides=window)
            valid = valid[:, : features.shape[1] * self.time_pooling : self.time_pooling]
        embed = nn.Dense(self.width, dtype=self.dtype, name="embed")
        if self.inverted:
            tokens, mask = embed(features.swapaxes(1, 2)), None
            if self.variate_embedding:
                shape = (features.shape[2], self.width)
                variates = self.param("variate_embedding", nn.initializers.normal(0.5), shape)
                tokens += variates.astype(tokens.dtype)
        else:
            tokens, mask = embed(features), valid
            tokens += sinusoidal_positions(features.shape[1], self.width).astype(tokens.dtype)
        tokens = Dropout(self.dropout)(tokens, dropout_keys)
        layer = nn.remat(EncoderLayer) if self.remat else EncoderLayer
        for i in range(self.num_layers):
            tokens = layer(
                self.num_heads,
                self.mlp_dim,
                dropout=self.dropout,
                dtype=self.dtype,
                attention_form=self.attention_form,
                name=f"layers_{i}",
            )(tokens, mask, dropout_keys)
        tokens = tokens.astype(jnp.promote_types(tokens.dtype, jnp.float32))
        hidden = tokens.mean(1) if mask is None else masked_mean(tokens, mask)
        logits = nn.relu(nn.Dense(self.classifier_dim, name="classifier_0")(hidden))
        logits = nn.Dense(self.num_classes, name="classifier_1")(logits)
        projection = None
        if self.projection_dim:
            projection = l2_normalize(nn.Dense(self.projection_dim, name="projection")(hidden))
        return StudentOutput(hidden, logits, projection)


class Adapter(nn.Module):
    """Maps the student's hidden vector to the teacher's width, for Eqs. 8, 9 and 12.

    Used in training alone; it is not part of the deployed student.
    """

    width: int

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        """(B, D) -> (B, width)."""
        return nn.Dense(self.width, name="dense")(hidden)


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of (B, L, D) over the positions where ``mask`` (B, L) is True."""
    weights = mask.astype(x.dtype)
    return jnp.einsum("bld,bl->bd", x, weights) / jnp.maximum(weights.sum(1), 1)[:, None]


def standardize_series(features: jax.Array, valid: jax.Array) -> jax.Array:
    """Standardises every series of (B, T, N) over its valid frames; padding stays 0."""
    weights = valid.astype(features.dtype)[:, :, None]
    count = jnp.maximum(weights.sum(1, keepdims=True), 1)
    centred = (features - (features * weights).sum(1, keepdims=True) / count) * weights
    variance = jnp.square(centred).sum(1, keepdims=True) / count
    return centred * jax.lax.rsqrt(variance + 1e-5)


def sinusoidal_positions(length: int, width: int) -> jax.Array:
    """(length, width) positions of Vaswani et al. 2017; ``width`` must be even."""
    frequency = jnp.exp(-jnp.log(10_000.0) * jnp.arange(0, width, 2) / width)
    angle = jnp.arange(length)[:, None] * frequency
    return jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1).reshape(length, width)

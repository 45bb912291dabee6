"""The student (Section 3.2.1): an inverted transformer over variate tokens."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from serkd_jax.losses import l2_normalize
from serkd_jax.models.transformer import Dropout, EncoderLayer, mlp


class StudentOutput(NamedTuple):
    """What the student says of a batch."""

    hidden: jax.Array  # (B, R) encoder output as it is read out, h(., S)
    logits: jax.Array  # (B, C) ŷ(., S)
    projection: jax.Array | None  # (B, P) L2-normalised contrastive embedding, z


class Student(nn.Module):
    """(B, T, N) features -> (B, N, T) -> Dense -> (B, N, D) -> encoder -> mean over D -> classes.

    Attributes:
        num_classes: C.
        width: D, the encoding dimension.
        mlp_dim: width of each feed-forward network.
        num_heads: attention heads.
        num_layers: encoder layers.
        norm: ``pre``, each part of a layer reads normalised tokens and there is no last norm, or
            ``post``, the sum after each part is normalised, as in iTransformer.
        readout: what makes h(., S) of the tokens: ``variates``, the mean over D of every token,
            a number for each variate; ``tokens``, the mean over the tokens; ``flatten``, all.
        classifier_dims: hidden widths of the classifier.
        projection_dims: widths of the contrastive projection, the last being P; training alone
            needs it, and empty is none.
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
    norm: str = "pre"
    readout: str = "variates"
    classifier_dims: Sequence[int] = (384, 128)
    projection_dims: Sequence[int] = (256, 256)
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
        features, valid = average_frames(features, valid, self.time_pooling)
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
                pre_norm=self.norm == "pre",
                dropout=self.dropout,
                dtype=self.dtype,
                attention_form=self.attention_form,
                name=f"layers_{i}",
            )(tokens, mask, dropout_keys)
        tokens = tokens.astype(jnp.promote_types(tokens.dtype, jnp.float32))
        hidden = read_out(tokens, mask, self.readout)
        logits = mlp(hidden, (*self.classifier_dims, self.num_classes), "classifier")
        projection = None
        if self.projection_dims:
            projection = l2_normalize(mlp(hidden, self.projection_dims, "projection"))
        return StudentOutput(hidden, logits, projection)


def read_out(tokens: jax.Array, mask: jax.Array | None, readout: str) -> jax.Array:
    """h(., S): one vector of an example from its (B, L, D) encoded tokens.

    Args:
        tokens: L of them, of width D.
        mask: (B, L) bool, True at valid tokens; None means all.
        readout: ``variates`` gives (B, L), ``tokens`` (B, D) and ``flatten`` (B, L D).
    """
    if readout == "tokens":
        return tokens.mean(1) if mask is None else masked_mean(tokens, mask)
    if mask is not None:
        tokens = jnp.where(mask[..., None], tokens, 0)
    return tokens.mean(2) if readout == "variates" else tokens.reshape(tokens.shape[0], -1)


class Adapter(nn.Module):
    """Maps h(., S) to the teacher's width, for Eqs. 8, 9 and 12, where it has another.

    Used in training alone; it is not part of the deployed student.
    """

    width: int

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        """(B, R) -> (B, width)."""
        return nn.Dense(self.width, name="dense")(hidden)


def adapt(adapter: Adapter | None, params: Any, hidden: jax.Array) -> jax.Array:
    """h(., S) in the teacher's width; without an adapter it has that."""
    return hidden if adapter is None else adapter.apply({"params": params}, hidden)


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of (B, L, D) over the positions where ``mask`` (B, L) is True."""
    weights = mask.astype(x.dtype)
    return jnp.einsum("bld,bl->bd", x, weights) / jnp.maximum(weights.sum(1), 1)[:, None]


def average_frames(frames: jax.Array, valid: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Means over ``count`` neighbouring frames, those of them that are valid.

    Args:
        frames: (B, T, N), zero where they are not valid.
        valid: (B, T) bool.
        count: of frames.

    Returns:
        (B, ceil(T / count), N) means, and (B, ceil(T / count)) bool where there is one.
    """
    if count == 1:
        return frames, valid
    whole = frames.shape[1] // count * count

    def average(x: jax.Array) -> jax.Array:
        """What is missing at the end counts as 0; it is not padded, which ONNX does otherwise."""
        means = nn.avg_pool(x, window_shape=(count,), strides=(count,))
        rest = x[:, whole:].sum(1, keepdims=True) / count
        return means if whole == x.shape[1] else jnp.concatenate([means, rest], axis=1)

    share = average(valid[..., None].astype(frames.dtype))
    return average(frames) / jnp.maximum(share, 1 / count), share[..., 0] > 0


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

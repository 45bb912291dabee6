"""The student (Section 3.2.1): an inverted transformer over variate tokens."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from serkd_jax.models.frames import (
    at_least_float32,
    average_frames,
    deviate_frames,
    masked_mean,
    sinusoidal_positions,
    standardize_series,
    valid_frames,
)
from serkd_jax.models.students.base import Student, StudentOutput, size
from serkd_jax.models.transformer import Dropout, EncoderLayer, exact_gelu, portable_gelu


class InvertedStudent(Student):
    """Features (B, T, N) -> (B, N, T) -> Dense -> (B, N, D) -> encoder -> mean over D -> classes.

    Attributes:
        width: D, the encoding dimension.
        mlp_dim: width of each feed-forward network.
        num_heads: number of attention heads.
        num_layers: number of encoder layers.
        norm: `pre`, where each part of a layer reads normalised tokens and there is no final norm,
            or `post`, where the sum after each part is normalised, as in iTransformer.
        readout: how h(., S) is made from the tokens: `variates`, the mean over D of every token,
            one number per variate; `tokens`, the mean over the tokens; `flatten`, all values.
        dropout: dropout rate in the encoder layers.
        inverted: whether tokens are variates (the paper's model). False gives the ordinary encoder
            of Table 4, whose tokens are frames with sinusoidal positions.
        variate_embedding: whether a learned vector per variate is added to its token. Without it
            the model can tell variates apart only by their course in time.
        use_norm: whether to standardise every series over its valid frames, as in iTransformer.
        variates: number of variates, which are learned sums of the features; 0, as in the paper,
            takes the features themselves. The cost of attention grows with its square.
        time_pooling: number of frames averaged to a time point before the embedding; 1 in the
            paper, 0 for all frames of the recording. With more, the embedding has fewer weights to
            learn from a small corpus.
        deviations: whether a time point also has the standard deviation of its frames.
    """

    width: int = size(512, 2, 8192)
    mlp_dim: int = size(1792, 1, 65_536)
    num_heads: int = size(8, 1, 256)
    num_layers: int = size(4, 1, 100)
    norm: str = size("pre", choices=("pre", "post"))
    readout: str = size("variates", choices=("variates", "tokens", "flatten"))
    dropout: float = size(0.1, 0, 0.99, deployed=False)
    inverted: bool = size(True)
    variate_embedding: bool = size(False)
    use_norm: bool = size(False)
    variates: int = size(0, 0, 8192)
    time_pooling: int = size(1, 0, 1000)
    deviations: bool = size(False)

    @property
    def description(self) -> str:
        """The name of the kind of transformer, with an article."""
        return "an inverted transformer" if self.inverted else "a transformer"

    def check(self, frames: int, variates: int = 1) -> None:
        """See `Student`; attention weights and the classifier's first kernel limit the size."""
        if self.width % self.num_heads:
            raise ValueError(
                f"student.width {self.width} is not divisible by student.num_heads {self.num_heads}"
            )
        if self.time_pooling > frames:
            raise ValueError(
                f"student.time_pooling {self.time_pooling} is more than max_frames {frames}: "
                "nothing would be left"
            )
        if self.readout == "variates" and not self.inverted:
            raise ValueError(
                "student.readout is variates, but its tokens are frames: use readout=tokens (or "
                "flatten) where student.inverted is False"
            )
        time_points = math.ceil(frames / (self.time_pooling or frames))
        tokens = (self.variates or variates) if self.inverted else time_points
        hidden = {"variates": tokens, "tokens": self.width, "flatten": tokens * self.width}
        read_by = [*self.classifier_dims, self.num_classes][0]
        largest = tokens**2 * self.num_heads, hidden[self.readout] * read_by
        if max(*largest, variates * self.variates) > 2**28:
            raise ValueError("the student is too large to be run")

    @nn.compact
    def __call__(
        self, features: jax.Array, num_frames: jax.Array, dropout_keys: jax.Array | None = None
    ) -> StudentOutput:
        """See `Student`."""
        valid = valid_frames(features, num_frames)
        if self.variates:
            features = nn.Dense(self.variates, False, dtype=self.dtype, name="variates")(features)
        if self.use_norm:
            features = standardize_series(features, valid)
        count = self.time_pooling or features.shape[1]
        if self.deviations:
            features = at_least_float32(features)
        points, points_valid = average_frames(features, valid, count)
        if self.deviations:  # further time points of each variate, or further inputs of each frame
            deviations = deviate_frames(features, valid, points, count)
            points = jnp.concatenate([points, deviations], axis=1 if self.inverted else 2)
        embed = nn.Dense(self.width, dtype=self.dtype, name="embed")
        if self.inverted:
            tokens, mask = embed(points.swapaxes(1, 2)), None
            if self.variate_embedding:
                shape = (points.shape[2], self.width)
                variates = self.param("variate_embedding", nn.initializers.normal(0.5), shape)
                tokens += variates.astype(tokens.dtype)
        else:
            tokens, mask = embed(points), points_valid
            tokens += sinusoidal_positions(points.shape[1], self.width).astype(tokens.dtype)
        tokens = Dropout(self.dropout)(tokens, dropout_keys)
        layer = nn.remat(EncoderLayer) if self.remat else EncoderLayer
        for i in range(self.num_layers):
            tokens = layer(
                self.num_heads,
                self.mlp_dim,
                pre_norm=self.norm == "pre",
                dropout=self.dropout,
                dtype=self.dtype,
                activation=portable_gelu if self.portable else exact_gelu,
                attention_form="plain" if self.portable else "auto",
                name=f"layers_{i}",
            )(tokens, mask, dropout_keys)
        hidden = read_out(at_least_float32(tokens), mask, self.readout)
        return self.classify_and_project(hidden)


def read_out(tokens: jax.Array, mask: jax.Array | None, readout: str) -> jax.Array:
    """Makes h(., S), one vector per example, from the encoded tokens.

    Args:
        tokens: (B, L, D) encoded tokens.
        mask: (B, L) bool, True at valid tokens; None means all.
        readout: `variates` gives (B, L), `tokens` (B, D) and `flatten` (B, L D).
    """
    if readout == "tokens":
        return tokens.mean(1) if mask is None else masked_mean(tokens, mask)
    if mask is not None:
        tokens = jnp.where(mask[..., None], tokens, 0)
    return tokens.mean(2) if readout == "variates" else tokens.reshape(tokens.shape[0], -1)

"""DWFormer (Chen et al., ICASSP 2023): attention in windows that the attention itself chooses."""

import functools
from collections.abc import Sequence
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from serkd_jax.models.frames import at_least_float32, masked_mean, valid_frames
from serkd_jax.models.students.base import Student, StudentOutput, size, small_uniform
from serkd_jax.models.transformer import (
    MASKED_LOGIT,
    Dropout,
    TorchLayerNorm,
    attention_logits,
    join_heads,
    project_heads,
)

xavier = nn.initializers.xavier_uniform()


class DWFormer(Student):
    """Features (B, T, N) -> a transformer layer -> blocks of two layers -> mean -> classes.

    The attention that a frame receives is its score. Each block divides the frames into windows of
    high and of low scores, attends within the windows, then from window to window, and scores the
    frames anew. There are no positions: order enters only by the windows.

    Attributes:
        mlp_dim: width of each feed-forward network.
        num_heads: number of attention heads; must divide N.
        num_blocks: number of blocks; the original has 3 for IEMOCAP and 2 for MELD.
        cold_weight: weight of the frames whose score is below the median.
        dropout: dropout rate in the feed-forward networks.
        classifier_dropout: dropout rate between the classifier's layers.
        see_padding: whether padding takes part, as in the public code, which has no mask.
    """

    classifier_dims: Sequence[int] = size((512, 256), 1, 8192)
    mlp_dim: int = size(512, 1, 65_536)
    num_heads: int = size(8, 1, 256)
    num_blocks: int = size(3, 1, 100)
    cold_weight: float = size(0.85, 0, 1)
    dropout: float = size(0.3, 0, 0.99, deployed=False)
    classifier_dropout: float = size(0.5, 0, 0.99, deployed=False)
    see_padding: bool = size(False)

    description: ClassVar[str] = "a DWFormer"

    def check(self, frames: int, variates: int = 1) -> None:
        """See `Student`; attention weights limit the size."""
        if variates > 1 and variates % self.num_heads:
            raise ValueError(
                f"the features have {variates} dimensions, which is not divisible by "
                f"student.num_heads {self.num_heads}"
            )
        if frames**2 * self.num_heads > 2**28:
            raise ValueError("the student is too large to be run")

    @nn.compact
    def __call__(
        self, features: jax.Array, num_frames: jax.Array, dropout_keys: jax.Array | None = None
    ) -> StudentOutput:
        """See `Student`."""
        valid = valid_frames(features, num_frames) | self.see_padding
        sizes = {"num_heads": self.num_heads, "mlp_dim": self.mlp_dim, "dropout": self.dropout}
        sizes |= {"dtype": self.dtype}
        x = TorchLayerNorm(dtype=self.dtype, name="norm_0")(features)
        x, received = GroupLayer(**sizes, name="layer")(x, valid, dropout_keys)
        score = masked_softmax(received, valid)
        block = nn.remat(Block) if self.remat else Block
        for i in range(self.num_blocks):
            if i:
                x = TorchLayerNorm(dtype=self.dtype, name=f"norm_{i}")(x)
            hot = find_hot(score, num_frames, valid)
            weight = jnp.where(hot, 1, self.cold_weight)
            x, score = block(**sizes, name=f"blocks_{i}")(
                x, find_windows(hot, valid), weight, dropout_keys
            )
            score = masked_softmax(score, valid)
        hidden = masked_mean(at_least_float32(x), valid)
        return self.classify_and_project(hidden, self.classifier_dropout, dropout_keys, xavier)


def find_hot(score: jax.Array, num_frames: jax.Array, valid: jax.Array) -> jax.Array:
    """Returns (B, T) bool, True at frames whose score is at least the median.

    Args:
        score: (B, T).
        num_frames: (B,) int, the numbers of frames that are not padding.
        valid: (B, T) bool, True at the frames that take part, which come first. Where padding takes
            part, too, the median is taken as if it had the lowest scores, whatever they are.
    """
    # A score is at least the k-th (from 0) of the sorted ones if more than k are at most as high.
    at_most = (score[:, None, :] <= score[:, :, None]) & valid[:, None, :]
    padding = valid.sum(1) - num_frames
    return 2 * (at_most.sum(2) - padding[:, None]) > num_frames[:, None]


def find_windows(hot: jax.Array, valid: jax.Array) -> jax.Array:
    """Divides frames into windows, and returns the number of each frame's window.

    A window ends where `hot` changes, and with the last frame. A single frame between two changes
    does not end one: it joins what follows it.

    Args:
        hot: (B, T) bool.
        valid: (B, T) bool, True at the frames that take part, which come first.

    Returns:
        (B, T) int, -1 where a frame is not valid.
    """
    next_valid = jnp.pad(valid[:, 1:], ((0, 0), (0, 1)))
    last = valid & ~next_valid
    change = jnp.pad(hot[:, 1:] != hot[:, :-1], ((0, 0), (0, 1))) & next_valid | last
    after_change = jnp.pad(change[:, :-1], ((0, 0), (1, 0)))
    end = (change & ~after_change | last).astype(jnp.int32)
    return jnp.where(valid, jnp.cumsum(end, axis=1) - end, -1)


class Block(nn.Module):
    """A layer within the windows, and one from window to window."""

    num_heads: int
    mlp_dim: int
    dropout: float
    dtype: DTypeLike | None

    @nn.compact
    def __call__(
        self, x: jax.Array, windows: jax.Array, weight: jax.Array, dropout_keys: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Encodes frames (B, T, D).

        Args:
            x: (B, T, D) frames.
            windows: (B, T) int, the window of each frame; that of -1 takes no part.
            weight: (B, T) by which the frames of the first layer are weighted.
            dropout_keys: (B,) keys, one per example; None turns dropout off.

        Returns:
            (B, T, D) frames and (B, T) scores, the products of the score of a frame in its window
            and of that of the window.
        """
        layer = functools.partial(
            GroupLayer, self.num_heads, self.mlp_dim, self.dropout, self.dtype
        )
        norm = functools.partial(TorchLayerNorm, dtype=self.dtype)
        x, received = layer(name="local")(norm(name="local_norm")(x), windows, dropout_keys)
        x *= weight[..., None].astype(x.dtype)
        same = windows[:, None, :] == windows[:, :, None]
        others = jnp.where(same, received[:, None, :], MASKED_LOGIT)
        in_window = jnp.exp(received - jax.nn.logsumexp(others, axis=2))
        # The most windows that there can be: of two frames each, but for the first and the last.
        slots = jnp.arange(x.shape[1] // 2 + 1)
        member = windows[:, None, :] == slots[:, None]
        exists = member.any(2)
        tokens = (member * in_window[:, None, :]).astype(x.dtype) @ x
        tokens, received = layer(name="wide")(norm(name="wide_norm")(tokens), exists, dropout_keys)
        of_window = masked_softmax(received, exists)
        x += jnp.einsum("bwt,bwd->btd", member.astype(x.dtype), tokens)
        return x, in_window * jnp.einsum("bwt,bw->bt", member.astype(received.dtype), of_window)


class GroupLayer(nn.Module):
    """A post-norm transformer layer in which a token attends to those of its own group."""

    num_heads: int
    mlp_dim: int
    dropout: float
    dtype: DTypeLike | None

    @nn.compact
    def __call__(
        self, x: jax.Array, group: jax.Array, dropout_keys: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Encodes tokens (B, L, D) with their groups (B, L).

        Returns:
            (B, L, D) tokens, and the attention that each of them receives, (B, L): the sum over the
            queries of the mean over the heads, at least in float32.
        """
        width = x.shape[-1]
        dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=xavier)
        norm = functools.partial(TorchLayerNorm, dtype=self.dtype)
        of_heads = functools.partial(dense, bias_init=small_uniform(width))
        query, key, value = project_heads(x, self.num_heads, of_heads)
        same = group[:, None, :, None] == group[:, None, None, :]
        logits = jnp.where(same, attention_logits(query, key, None), MASKED_LOGIT)
        weights = nn.softmax(logits)
        attended = join_heads(weights.astype(value.dtype) @ value)
        x = norm(name="layer_norm")(x + dense(width, name="out_proj")(attended))
        h = nn.relu(dense(self.mlp_dim, name="intermediate_dense")(x))
        h = Dropout(self.dropout, name="activation_dropout")(h, dropout_keys)
        h = dense(width, name="output_dense")(h)
        h = Dropout(self.dropout, name="output_dropout")(h, dropout_keys)
        return norm(name="final_layer_norm")(x + h), weights.mean(1).sum(1)


def masked_softmax(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the softmax of (B, L) over the positions where `mask` (B, L) is True."""
    return nn.softmax(jnp.where(mask, x, MASKED_LOGIT))

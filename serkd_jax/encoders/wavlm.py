"""WavLM (Chen et al. 2022): wav2vec 2.0 with a gated bias of relative positions in its attention.

All layers share a learned bias per head and distance, and each layer gates it by its own input.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from serkd_jax.encoders.wav2vec2 import Wav2Vec2, Wav2Vec2Layers
from serkd_jax.models.transformer import GatedBias, SelfAttention


class GatedAttention(SelfAttention):
    """Self-attention with a bias for distances in its logits, gated by the input of the query."""

    def bias(self, x: jax.Array, distances: jax.Array) -> GatedBias:
        """Returns the gates of x (B, L, D), and `distances`, the (heads, L, L) distance bias."""
        heads = x.reshape(*x.shape[:2], self.num_heads, -1).swapaxes(1, 2)
        gates = nn.Dense(8, dtype=self.dtype, name="gru_rel_pos_linear")(heads)
        gates = gates.reshape(*heads.shape[:3], 2, 4).sum(-1)
        update, reset = jnp.moveaxis(nn.sigmoid(gates), -1, 0)  # (B, heads, L)
        ones = nn.initializers.ones
        constant = self.param("gru_rel_pos_const", ones, (1, self.num_heads, 1, 1))[..., 0]
        return GatedBias(update * (reset * constant.astype(reset.dtype) - 1) + 2, distances)


class WavLMLayers(Wav2Vec2Layers):
    """wav2vec 2.0's layers, with the bias that they share."""

    attention = GatedAttention

    def setup(self):
        """Makes the submodules."""
        super().setup()
        config = self.config
        self.rel_attn_embed = nn.Embed(config.num_buckets, config.num_attention_heads)

    def attention_inputs(self, length: int) -> tuple[jax.Array, ...]:
        """Returns the (heads, length, length) bias for distances from query to key."""
        distances = np.arange(1 - length, length)
        config = self.config
        buckets = distance_buckets(distances, config.num_buckets, config.max_bucket_distance)
        of_distance = self.rel_attn_embed(buckets).T
        return (of_distance[:, np.arange(length) - np.arange(length)[:, None] + length - 1],)


def distance_buckets(distances: np.ndarray, num_buckets: int, max_distance: int) -> np.ndarray:
    """Puts distances into buckets as T5 does: near ones exactly, far ones by their logarithm.

    Args:
        distances: int, distances from query to key, positive to the right.
        num_buckets: number of buckets, half of them for each direction.
        max_distance: the distance from which on all distances share a bucket.
    """
    half = num_buckets // 2
    exact = half // 2
    size = np.abs(distances)
    share = np.log(np.maximum(size, exact).astype(np.float32) / exact) / math.log(
        max_distance / exact
    )
    far = np.minimum(exact + (share * (half - exact)).astype(int), half - 1)
    return (distances > 0) * half + np.where(size < exact, size, far)


class WavLM(Wav2Vec2):
    """WavLM: base, base-plus and large."""

    model_type = "wavlm"
    config_name, model_name = "WavLMConfig", "WavLMModel"
    prefixes = ("wavlm.",)
    layers = WavLMLayers

    def torch_name(self, path: tuple[str, ...]) -> str:
        """See `Encoder`; torch keeps the shared bias in the first layer."""
        if path == ("encoder", "rel_attn_embed", "embedding"):
            return "encoder.layers.0.attention.rel_attn_embed.weight"
        return super().torch_name(path)


ENCODER = WavLM()

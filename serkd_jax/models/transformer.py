"""The transformer encoder layer that HuBERT, the teacher and the student share."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from serkd_jax.errors import UserError

# The variance as mean((x - mean)²), like torch; Flax's faster E[x²] - mean² cancels in float32.
LayerNorm = functools.partial(nn.LayerNorm, use_fast_variance=False)

MASKED_LOGIT = -1e30  # so low that its softmax is 0, and finite where every token is masked


def exact_gelu(x: jax.Array) -> jax.Array:
    """GELU with the error function, as in HuBERT; not the tanh approximation."""
    return jax.nn.gelu(x, approximate=False)


class SelfAttention(nn.Module):
    """Multi-head self-attention over (B, L, D) tokens.

    Attributes:
        num_heads: heads; must divide D.
        dropout: dropout of the attention weights, active only when not ``deterministic``.
        dtype: of the computation, softmax apart; None means that of inputs and parameters.
    """

    num_heads: int
    dropout: float = 0.0
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array | None = None, deterministic: bool = True
    ) -> jax.Array:
        """Attends from every token to every valid one.

        Args:
            x: (B, L, D) tokens.
            mask: (B, L) bool, True where a token may be attended to; None means all.
            deterministic: whether dropout is off.

        Returns:
            (B, L, D).
        """
        batch, length, width = x.shape
        if width % self.num_heads:
            raise UserError(f"width {width} is not divisible by num_heads {self.num_heads}")
        heads = (batch, length, self.num_heads, width // self.num_heads)
        query, key, value = (
            nn.Dense(width, dtype=self.dtype, name=name)(x).reshape(heads).swapaxes(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        # Written out: on CPU, with the mask as a sum, this is twice as fast as
        # jax.nn.dot_product_attention; and its softmax is float64 where the inputs are.
        precise = jnp.promote_types(query.dtype, jnp.float32)
        logits = jnp.einsum(
            "bhqd,bhkd->bhqk", query * heads[-1] ** -0.5, key, preferred_element_type=precise
        )
        if mask is not None:
            logits += jnp.where(mask, 0.0, MASKED_LOGIT)[:, None, None, :].astype(precise)
        weights = nn.softmax(logits).astype(query.dtype)
        weights = nn.Dropout(self.dropout)(weights, deterministic=deterministic)
        out = jnp.einsum("bhqk,bhkd->bhqd", weights, value).swapaxes(1, 2)
        return nn.Dense(width, dtype=self.dtype, name="out_proj")(out.reshape(x.shape))


class EncoderLayer(nn.Module):
    """One transformer encoder layer, with the norm after (BERT, HuBERT-base) or before each part.

    Parameter names follow the Hugging Face HuBERT layer.

    Attributes:
        num_heads: attention heads.
        mlp_dim: width of the feed-forward network.
        pre_norm: normalise the input of each part (HuBERT-large's "stable" layer) instead of
            the sum after it.
        dropout: after the attention and after the feed-forward network.
        attention_dropout: of the attention weights.
        activation_dropout: after the feed-forward activation.
        activation: the feed-forward activation.
        epsilon: of the layer norms.
        dtype: of the computation; None means that of inputs and parameters.
    """

    num_heads: int
    mlp_dim: int
    pre_norm: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    activation: Callable[[jax.Array], jax.Array] = exact_gelu
    epsilon: float = 1e-5
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array | None = None, deterministic: bool = True
    ) -> jax.Array:
        """Maps (B, L, D) tokens to (B, L, D); ``mask`` (B, L) is True at valid tokens."""
        norm1 = LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name="layer_norm")
        norm2 = LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name="final_layer_norm")
        dense = functools.partial(nn.Dense, dtype=self.dtype)
        drop = nn.Dropout(self.dropout)

        def attend(h: jax.Array) -> jax.Array:
            attention = SelfAttention(
                self.num_heads, self.attention_dropout, self.dtype, name="attention"
            )
            return drop(attention(h, mask, deterministic), deterministic=deterministic)

        def feed_forward(h: jax.Array) -> jax.Array:
            h = self.activation(dense(self.mlp_dim, name="intermediate_dense")(h))
            h = nn.Dropout(self.activation_dropout)(h, deterministic=deterministic)
            h = dense(x.shape[-1], name="output_dense")(h)
            return drop(h, deterministic=deterministic)

        if self.pre_norm:
            x = x + attend(norm1(x))
            return x + feed_forward(norm2(x))
        x = norm1(x + attend(x))
        return norm2(x + feed_forward(x))

"""The transformer encoder layer that HuBERT, the teacher and the student share."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from serkd_jax.errors import UserError

# The variance as mean((x - mean)²), like torch; Flax's faster E[x²] - mean² cancels in float32.
LayerNorm = functools.partial(nn.LayerNorm, use_fast_variance=False)


def exact_gelu(x: jax.Array) -> jax.Array:
    """GELU with the error function, as in HuBERT; not the tanh approximation."""
    return jax.nn.gelu(x, approximate=False)


class SelfAttention(nn.Module):
    """Multi-head self-attention over (B, L, D) tokens.

    Attributes:
        num_heads: heads; must divide D.
        dropout: dropout of the attention weights, active only when not ``deterministic``.
    """

    num_heads: int
    dropout: float = 0.0

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
            nn.Dense(width, name=name)(x).reshape(heads) for name in ("q_proj", "k_proj", "v_proj")
        )
        mask = None if mask is None else mask[:, None, None, :]
        if deterministic or self.dropout == 0.0:
            out = jax.nn.dot_product_attention(query, key, value, mask=mask)
        else:
            logits = jnp.einsum("bqhd,bkhd->bhqk", query, key) / jnp.sqrt(heads[-1])
            if mask is not None:
                logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
            weights = nn.Dropout(self.dropout)(nn.softmax(logits), deterministic=False)
            out = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        return nn.Dense(width, name="out_proj")(out.reshape(x.shape))


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
    """

    num_heads: int
    mlp_dim: int
    pre_norm: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    activation: Callable[[jax.Array], jax.Array] = exact_gelu
    epsilon: float = 1e-5

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array | None = None, deterministic: bool = True
    ) -> jax.Array:
        """Maps (B, L, D) tokens to (B, L, D); ``mask`` (B, L) is True at valid tokens."""
        norm1 = LayerNorm(epsilon=self.epsilon, name="layer_norm")
        norm2 = LayerNorm(epsilon=self.epsilon, name="final_layer_norm")
        drop = nn.Dropout(self.dropout)

        def attend(h: jax.Array) -> jax.Array:
            h = SelfAttention(self.num_heads, self.attention_dropout, name="attention")(
                h, mask, deterministic
            )
            return drop(h, deterministic=deterministic)

        def feed_forward(h: jax.Array) -> jax.Array:
            h = self.activation(nn.Dense(self.mlp_dim, name="intermediate_dense")(h))
            h = nn.Dropout(self.activation_dropout)(h, deterministic=deterministic)
            h = nn.Dense(x.shape[-1], name="output_dense")(h)
            return drop(h, deterministic=deterministic)

        if self.pre_norm:
            x = x + attend(norm1(x))
            return x + feed_forward(norm2(x))
        x = norm1(x + attend(x))
        return norm2(x + feed_forward(x))

"""The transformer encoder layer that the encoders, the teacher and the student share."""

import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.custom_derivatives import linear_call
from jax.typing import DTypeLike

from serkd_jax.errors import UserError
from serkd_jax.models.frames import at_least_float32

# The variance is mean((x - mean)²), as in torch; Flax's faster E[x²] - mean² cancels in float32.
LayerNorm = functools.partial(nn.LayerNorm, use_fast_variance=False)
TorchLayerNorm = functools.partial(LayerNorm, epsilon=1e-5)  # torch's default

WEIGHTS_AT_ONCE = 2**20  # number of attention weights that fit a CPU's cache
MASKED_LOGIT = -1e30  # softmax gives 0, but stays finite where every token is masked


@jax.custom_jvp
def exact_gelu(x: jax.Array) -> jax.Array:
    """Computes GELU by the error function, x Φ(x), as in HuBERT and Whisper; not by tanh.

    The computation is at least in float32. JAX's own GELU (see `portable_gelu`) uses erfc, which
    takes twice as long on a GPU.
    """
    precise = at_least_float32(x)
    return (precise * _normal_cdf(precise)).astype(x.dtype)


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 * (1 + jax.lax.erf(x * 0.5**0.5))


@exact_gelu.defjvp
def _slope_of_gelu(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple:
    """Computes Φ(x) + x φ(x), so that the gradient keeps one array, where JAX would keep three."""
    (x,), (tangent,) = primals, tangents
    precise = at_least_float32(x)
    density = jnp.exp(-0.5 * precise * precise) / (2 * jnp.pi) ** 0.5
    slope = _normal_cdf(precise) + precise * density
    return exact_gelu(x), tangent * slope.astype(x.dtype)


portable_gelu = functools.partial(jax.nn.gelu, approximate=False)  # LiteRT has no erf


class Dropout(nn.Module):
    """Dropout whose draws depend on the example, not on its place in a batch or on a device.

    Attributes:
        rate: the share of values that become 0; the others are scaled up.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, keys: jax.Array | None) -> jax.Array:
        """Drops values of x (B, n, ...) by the examples' `keys` (B,); None turns dropout off."""
        if keys is None or self.rate == 0:
            return x
        place = zlib.crc32("/".join(self.path).encode())
        half = (x.shape[1] + 1) // 2

        def draw(key: jax.Array) -> jax.Array:
            """Makes two draws of 16 bits from each word; random bits take much of a step's time."""
            key = jax.random.fold_in(key, place)
            words = jax.random.bits(key, (half, *x.shape[2:]), jnp.uint32)
            draws = jnp.concatenate([words & 0xFFFF, words >> 16])[: x.shape[1]]
            return draws < round(0x10000 * (1 - self.rate))

        # The barrier keeps XLA from drawing again in each operation that reads the result.
        kept = jax.lax.optimization_barrier(jax.vmap(draw)(keys))
        return jnp.where(kept, x / (1 - self.rate), 0)


class GatedBias(NamedTuple):
    """What WavLM adds to the attention logits: a gate times a bias that depends on positions."""

    gate: jax.Array  # (B, heads, L), for each query
    bias: jax.Array  # (heads, L, L), for each pair of query and key


def attention_logits(
    query: jax.Array, key: jax.Array, mask: jax.Array | None, bias: GatedBias | None = None
) -> jax.Array:
    """Returns scaled products (..., L, L), at least float32; `mask` (..., L) is of valid keys."""
    precise = jnp.promote_types(query.dtype, jnp.float32)
    logits = jnp.einsum(
        "...qd,...kd->...qk",
        query * query.shape[-1] ** -0.5,
        key,
        preferred_element_type=precise,
    )
    if bias is not None:
        logits += bias.gate[..., None].astype(precise) * bias.bias.astype(precise)
    if mask is not None:
        # A sum, which is faster than a selection on a CPU.
        logits += jnp.where(mask, 0.0, MASKED_LOGIT)[..., None, :].astype(precise)
    return logits


def attention_weights(
    query: jax.Array,
    key: jax.Array,
    mask: jax.Array | None,
    bias: GatedBias | None = None,
) -> jax.Array:
    """Returns the softmax of the logits, in the dtype of the queries."""
    return nn.softmax(attention_logits(query, key, mask, bias)).astype(query.dtype)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    form: str = "auto",
    bias: GatedBias | None = None,
) -> jax.Array:
    """Computes attention in the form that suits the backend.

    On a GPU, in half precision, it is cuDNN's fused kernel. On a CPU it is computed head by head,
    so that a head's weights stay in the cache; the gradient computes them again. The gradient of
    cuDNN's kernel can be differentiated only with respect to the incoming gradient, in which it is
    linear; its derivatives with respect to query, key and value exist only in the form `plain`. The
    kernel must not be vmapped.

    Args:
        query: (B, heads, L, D / heads).
        key: (B, heads, L, D / heads).
        value: (B, heads, L, D / heads).
        mask: (B, L) bool, True at valid tokens, which come first; None means all.
        form: `auto` is as above; `plain` is the formula, for any backend and exported models.
        bias: added to the logits; None adds nothing. With a bias, the fused kernel is not used.
    """
    if form != "plain" and jax.default_backend() == "cpu":
        return _attend_by_heads(query, key, value, mask, bias)
    if form != "plain" and bias is None and _cudnn_attends(query):
        return _attend_by_cudnn(query, key, value, mask)
    return attention_weights(query, key, None if mask is None else mask[:, None], bias) @ value


def attention_tangent(
    weights: jax.Array, heads: Sequence[jax.Array], tangents: Sequence[jax.Array]
) -> jax.Array:
    """Returns the tangent of weights @ value, given the tangents of query, key and value.

    Args:
        weights: (..., L, L) attention weights, at least float32.
        heads: query, key and value, (..., L, d).
        tangents: the tangents of `heads`.
    """
    (query, key, value), (query_moves, key_moves, value_moves) = heads, tangents
    precise, dtype = weights.dtype, value.dtype
    # On a CPU, XLA is slow at products with a large transposed matrix. The order of the factors
    # spares the gradient such products; the barriers keep XLA from changing that order.
    fixed, turn = jax.lax.optimization_barrier, functools.partial(jnp.swapaxes, axis1=-1, axis2=-2)
    logits_move = jnp.einsum("...qd,...kd->...qk", query_moves, key, preferred_element_type=precise)
    logits_move += jnp.einsum(
        "...dq,...dk->...qk",
        fixed(turn(query)),
        fixed(turn(key_moves)),
        preferred_element_type=precise,
    )
    moves = weights * logits_move * query.shape[-1] ** -0.5
    moves -= weights * moves.sum(-1, keepdims=True)
    with_values = fixed(turn(value_moves)) @ turn(weights.astype(dtype))
    return moves.astype(dtype) @ value + turn(fixed(with_values))


def _cudnn(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Computes attention by cuDNN's kernel, which has a gradient but no tangent."""
    lengths = None if mask is None else mask.sum(1, dtype=jnp.int32)
    tokens_first = (x.swapaxes(1, 2) for x in (query, key, value))
    return jax.nn.dot_product_attention(
        *tokens_first, key_value_seq_lengths=lengths, implementation="cudnn"
    ).swapaxes(1, 2)


_attend_by_cudnn = jax.custom_jvp(_cudnn)


@_attend_by_cudnn.defjvp
def _tangent_by_cudnn(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    """Takes the gradient from the kernel and the tangent from the formula."""
    *heads, mask = primals
    out, pull_back = jax.vjp(functools.partial(_cudnn, mask=mask), *heads)

    def push_forward(residuals: tuple, tangents: tuple) -> jax.Array:
        heads, mask, _ = residuals
        logits = attention_logits(*heads[:2], None if mask is None else mask[:, None])
        return attention_tangent(nn.softmax(logits), heads, tangents)

    residuals = (heads, mask, pull_back)
    return out, linear_call(
        push_forward, lambda residuals, g: residuals[-1](g), residuals, tangents[:3]
    )


def _cudnn_attends(query: jax.Array) -> bool:
    """Returns whether cuDNN's kernel takes these queries: on NVIDIA GPUs from Ampere on."""
    device, width = jax.devices()[0], query.shape[-1]
    nvidia = device.platform == "gpu" and "cuda" in device.client.platform_version
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    if not (nvidia and half and width <= 128 and width % 8 == 0):
        return False
    return float(device.compute_capability) >= 8


def _attend_by_heads(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    bias: GatedBias | None,
) -> jax.Array:
    """Attends head by head; with a bias, which examples share, a head of all examples at once."""
    if mask is not None:
        mask = jnp.broadcast_to(mask[:, None], query.shape[:3])
    if bias is None:
        heads = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (query, key, value, mask))
        return _by_heads(_attend_in_head, heads, query.shape[2] ** 2).reshape(query.shape)

    def one(*head: jax.Array) -> jax.Array:
        query, key, value, mask, gate, table = head
        return attention_weights(query, key, mask, GatedBias(gate, table)) @ value

    parts = (query, key, value, mask, bias.gate)
    split = (*jax.tree.map(lambda x: x.swapaxes(0, 1), parts), bias.bias)
    return _by_heads(one, split, len(query) * query.shape[2] ** 2).swapaxes(0, 1)


def _by_heads(function: Callable[..., jax.Array], heads: tuple, weights: int) -> jax.Array:
    """Maps over heads with `weights` attention weights each, as many at once as fit the cache."""

    @jax.checkpoint
    def one(head: tuple) -> jax.Array:
        return function(*head)

    at_once = max(1, WEIGHTS_AT_ONCE // weights)
    if at_once >= len(heads[0]):
        return jax.vmap(one)(heads)
    return jax.lax.map(one, heads, batch_size=at_once if at_once > 1 else None)


@jax.custom_jvp
def _attend_in_head(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None
) -> jax.Array:
    """Computes the attention of one (L, d) head."""
    return attention_weights(query, key, mask) @ value


@_attend_in_head.defjvp
def _tangent_in_head(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    query, key, value, mask = primals
    weights = nn.softmax(attention_logits(query, key, mask))
    out = weights.astype(query.dtype) @ value
    return out, attention_tangent(weights, (query, key, value), tangents[:3])


class SelfAttention(nn.Module):
    """Multi-head self-attention over (B, L, D) tokens.

    Attributes:
        num_heads: number of heads; must divide D.
        dropout: dropout rate of the attention weights.
        dtype: dtype of the computation except the softmax; None means that of inputs and
            parameters.
        form: see `attend`.
        key_bias: whether the keys have a bias, which cancels in the softmax; Whisper has none.
    """

    num_heads: int
    dropout: float = 0.0
    dtype: DTypeLike | None = None
    form: str = "auto"
    key_bias: bool = True

    def bias(self, x: jax.Array, *inputs: Any) -> GatedBias | None:
        """Returns what is added to the logits: nothing, unless a subclass overrides it."""
        del x, inputs

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        dropout_keys: jax.Array | None = None,
        *inputs: Any,
    ) -> jax.Array:
        """Attends from every token to every valid one.

        Args:
            x: (B, L, D) tokens.
            mask: (B, L) bool, True where a token may be attended to; None means all.
            dropout_keys: (B,) keys, one per example; None turns dropout off.
            *inputs: further arguments of `bias`.

        Returns:
            (B, L, D) tokens.
        """
        width = x.shape[-1]
        if width % self.num_heads:
            raise UserError(f"width {width} is not divisible by num_heads {self.num_heads}")
        dense = functools.partial(nn.Dense, dtype=self.dtype)
        query, key, value = project_heads(x, self.num_heads, dense, self.key_bias)
        bias = self.bias(x, *inputs)
        if self.dropout and dropout_keys is not None:
            weights = attention_weights(query, key, None if mask is None else mask[:, None], bias)
            weights = Dropout(self.dropout)(weights, dropout_keys)
            out = jnp.einsum("bhqk,bhkd->bhqd", weights, value)
        else:
            out = attend(query, key, value, mask, self.form, bias)
        return dense(width, name="out_proj")(join_heads(out))


def project_heads(
    x: jax.Array, num_heads: int, dense: Callable[..., nn.Module], key_bias: bool = True
) -> list[jax.Array]:
    """Makes query, key and value (B, heads, L, D / heads) of (B, L, D); for compact methods.

    Args:
        x: (B, L, D) tokens.
        num_heads: number of heads; must divide D.
        dense: makes a linear layer.
        key_bias: whether the keys have a bias.
    """
    heads = (*x.shape[:2], num_heads, x.shape[2] // num_heads)
    return [
        dense(x.shape[2], use_bias=use_bias, name=name)(x).reshape(heads).swapaxes(1, 2)
        for name, use_bias in (("q_proj", True), ("k_proj", key_bias), ("v_proj", True))
    ]


def join_heads(x: jax.Array) -> jax.Array:
    """Joins (B, heads, L, D / heads) to (B, L, D)."""
    batch, heads, length, width = x.shape
    return x.swapaxes(1, 2).reshape(batch, length, heads * width)


def mlp(
    x: jax.Array,
    widths: Sequence[int],
    name: str,
    dropout: float = 0.0,
    dropout_keys: jax.Array | None = None,
    kernel_init: nn.initializers.Initializer = nn.linear.default_kernel_init,
) -> jax.Array:
    """Applies linear layers `name_0`, `name_1`, ... for compact methods.

    Args:
        x: (B, R) input of the first layer.
        widths: the widths of the layers.
        name: how their names begin.
        dropout: dropout rate after the ReLU that is between the layers.
        dropout_keys: (B,) keys, one per example; None turns dropout off.
        kernel_init: the initializer of the kernels.
    """
    for i, width in enumerate(widths):
        if i:
            x = Dropout(dropout, name=f"{name}_dropout_{i}")(nn.relu(x), dropout_keys)
        x = nn.Dense(width, kernel_init=kernel_init, name=f"{name}_{i}")(x)
    return x


class EncoderLayer(nn.Module):
    """A transformer encoder layer, with the norm after (BERT, HuBERT-base) or before each part.

    Parameter names follow the HuBERT layer of the library `transformers`.

    Attributes:
        num_heads: number of attention heads.
        mlp_dim: width of the feed-forward network.
        pre_norm: whether to normalise the input of each part (HuBERT-large's "stable" layer)
            instead of the sum after it.
        dropout: dropout rate after the attention and after the feed-forward network.
        attention_dropout: dropout rate of the attention weights.
        activation_dropout: dropout rate after the feed-forward activation.
        activation: the feed-forward activation.
        epsilon: the epsilon of the layer norms.
        dtype: dtype of the computation; None means that of inputs and parameters.
        attention_form: see `attend`.
        attention: makes the attention module, with the arguments of `SelfAttention`.
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
    attention_form: str = "auto"
    attention: Callable[..., nn.Module] = SelfAttention

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        dropout_keys: jax.Array | None = None,
        *inputs: Any,
    ) -> jax.Array:
        """Maps (B, L, D) tokens to (B, L, D); `mask` (B, L) is True at valid tokens.

        `inputs` are the further inputs that another kind of attention reads.
        """
        norm1 = LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name="layer_norm")
        norm2 = LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name="final_layer_norm")
        dense = functools.partial(nn.Dense, dtype=self.dtype)

        def attend(h: jax.Array) -> jax.Array:
            attention = self.attention(
                self.num_heads,
                self.attention_dropout,
                self.dtype,
                self.attention_form,
                name="attention",
            )
            return Dropout(self.dropout)(attention(h, mask, dropout_keys, *inputs), dropout_keys)

        def feed_forward(h: jax.Array) -> jax.Array:
            h = self.activation(dense(self.mlp_dim, name="intermediate_dense")(h))
            h = Dropout(self.activation_dropout)(h, dropout_keys)
            h = dense(x.shape[-1], name="output_dense")(h)
            return Dropout(self.dropout)(h, dropout_keys)

        if self.pre_norm:
            x = x + attend(norm1(x))
            return x + feed_forward(norm2(x))
        x = norm1(x + attend(x))
        return norm2(x + feed_forward(x))

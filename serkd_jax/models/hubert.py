"""HuBERT (Hsu et al. 2021) in Flax, from waveform to the hidden states of every layer.

Structure, parameter names and results follow `transformers.HubertModel`; the configuration is
`transformers.HubertConfig`. Two differences:

* A padded batch gives each clip what the clip gives alone, in HuBERT-base too: torch's group norm
  takes its statistics over the padding as well, ours over the valid frames; and what torch's
  `conv_pos_batch_norm` adds to padded frames does not reach valid ones.
* Training keeps the statistics of that batch norm. It has dropout but neither layerdrop nor
  SpecAugment (`layerdrop`, `mask_time_prob` and `mask_feature_prob` are ignored), so that every
  step runs the same program.

`HubertEmbed` and `HubertLayers` are the frozen and the fine-tuned part of the paper's teacher.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from serkd_jax.models.transformer import Dropout, EncoderLayer, LayerNorm, exact_gelu

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import HubertConfig

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": exact_gelu,
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "selu": jax.nn.selu,
    "silu": jax.nn.silu,
}
CONV_NORM_EPSILON = 1e-5  # torch's default: config.layer_norm_eps is not meant for these

GroupNorm = functools.partial(nn.GroupNorm, use_fast_variance=False)  # as LayerNorm


class HubertOutput(NamedTuple):
    """What `HubertModel` returns."""

    last_hidden_state: jax.Array  # (B, T, H)
    hidden_states: tuple[jax.Array, ...]  # the layers' input and each layer's output, (B, T, H)
    frame_mask: jax.Array  # (B, T) bool, True at valid frames


def num_frames(config: HubertConfig, num_samples: int | jax.Array) -> int | jax.Array:
    """Frames that the convolutions make of `num_samples` samples; 0 for too short a clip."""
    return _conv_length(num_samples, config.conv_kernel, config.conv_stride)


def check_config(config: HubertConfig) -> None:
    """Raises a ValueError that names each field whose value is not supported."""
    groups = config.num_conv_pos_embedding_groups
    supported = {
        "feat_extract_norm": config.feat_extract_norm in ("group", "layer"),
        "feat_extract_activation": config.feat_extract_activation in ACTIVATIONS,
        "hidden_act": config.hidden_act in ACTIVATIONS,
        "num_attention_heads": config.hidden_size % config.num_attention_heads == 0,
        "num_conv_pos_embedding_groups": config.hidden_size % groups == 0,
        "adapter_attn_dim": getattr(config, "adapter_attn_dim", None) is None,
        "add_adapter": not getattr(config, "add_adapter", False),
    }
    bad = [f"{name}={getattr(config, name)!r}" for name, ok in supported.items() if not ok]
    if bad:
        raise ValueError(
            f"HubertConfig has fields with unsupported values: {', '.join(bad)} "
            f"(hidden_size={config.hidden_size}; activations: {', '.join(ACTIVATIONS)})"
        )


def normalize_waveform(waveform: jax.Array, num_samples: jax.Array) -> jax.Array:
    """Zero mean and unit variance over each clip's valid samples, as HuBERT's preprocessor.

    Args:
        waveform: (B, samples) float32.
        num_samples: (B,) int; what follows is set to zero.
    """
    valid = jnp.arange(waveform.shape[1]) < num_samples[:, None]
    count = jnp.maximum(num_samples, 1)[:, None]
    mean = jnp.where(valid, waveform, 0.0).sum(1, keepdims=True) / count
    centred = jnp.where(valid, waveform - mean, 0.0)
    variance = jnp.square(centred).sum(1, keepdims=True) / count
    return centred / jnp.sqrt(variance + 1e-7)


class PositionalConv(nn.Module):
    """Relative positions from a wide grouped convolution over time.

    The kernel is stored whole: the weight normalisation of the torch model is folded into it. So
    is the batch norm of `conv_pos_batch_norm`, with the statistics of pre-training, into a scale
    and a bias for each channel.

    Attributes:
        config: the architecture.
        dtype: of the computation; None means that of inputs and parameters.
    """

    config: HubertConfig
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array, frame_mask: jax.Array) -> jax.Array:
        """Makes the (B, T, H) positional term to be added to the (B, T, H) frames.

        Frames where the (B, T) `frame_mask` is False count as 0, as beyond the end of a clip alone.
        """
        kernel_size, width = self.config.num_conv_pos_embeddings, x.shape[-1]
        if self.config.conv_pos_batch_norm:
            x = x * self.param("batch_norm_scale", nn.initializers.ones, (width,)).astype(x.dtype)
            x = x + self.param("batch_norm_bias", nn.initializers.zeros, (width,)).astype(x.dtype)
        x = nn.Conv(
            width,
            (kernel_size,),
            # torch pads kernel_size // 2 on both sides, then drops a last frame too many.
            padding=[(kernel_size // 2, (kernel_size - 1) // 2)],
            feature_group_count=self.config.num_conv_pos_embedding_groups,
            dtype=self.dtype,
            name="conv",
        )(jnp.where(frame_mask[..., None], x, 0))
        return ACTIVATIONS[self.config.feat_extract_activation](x)


class HubertEmbed(nn.Module):
    """Waveform to the input of the transformer layers: convolutions, projection, positions."""

    config: HubertConfig
    dtype: DTypeLike | None = None

    def setup(self):
        """Makes the submodules."""
        check_config(self.config)
        self.feature_extractor = _FeatureExtractor(self.config, self.dtype)
        self.feature_projection = _FeatureProjection(self.config, self.dtype)
        self.pos_conv_embed = PositionalConv(self.config, self.dtype)

    def __call__(
        self,
        waveform: jax.Array,
        num_samples: jax.Array | None = None,
        dropout_keys: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Embeds a batch of clips.

        Args:
            waveform: (B, samples) float32, 16 kHz, normalised as the checkpoint wants it.
            num_samples: (B,) int, the valid samples of each clip; None means all.
            dropout_keys: (B,) a key per clip; None turns dropout off.

        Returns:
            (B, T, H) hidden, whose padded frames are meaningless, and (B, T) bool, True at
            valid frames.
        """
        batch, length = waveform.shape
        frames = num_frames(self.config, length)
        if not frames:
            raise ValueError(f"a waveform of {length} samples is shorter than one HuBERT frame")
        num_samples = jnp.full(batch, length) if num_samples is None else jnp.asarray(num_samples)
        hidden = self.feature_extractor(waveform, num_samples)
        hidden = self.feature_projection(hidden, dropout_keys)
        frame_mask = jnp.arange(frames) < num_frames(self.config, num_samples)[:, None]
        return hidden + self.pos_conv_embed(hidden, frame_mask), frame_mask


class HubertLayers(nn.Module):
    """The transformer layers and their norm, which base applies first and large last."""

    config: HubertConfig
    dtype: DTypeLike | None = None
    remat: bool = False  # whether activations are computed again for the gradient, not kept

    def setup(self):
        """Makes the submodules."""
        check_config(self.config)
        config = self.config
        layer = nn.remat(EncoderLayer) if self.remat else EncoderLayer
        self.layer_norm = LayerNorm(epsilon=config.layer_norm_eps, dtype=self.dtype)
        self.dropout = Dropout(config.hidden_dropout)
        self.layers = [
            layer(
                num_heads=config.num_attention_heads,
                mlp_dim=config.intermediate_size,
                pre_norm=config.do_stable_layer_norm,
                dropout=config.hidden_dropout,
                attention_dropout=config.attention_dropout,
                activation_dropout=config.activation_dropout,
                activation=ACTIVATIONS[config.hidden_act],
                epsilon=config.layer_norm_eps,
                dtype=self.dtype,
            )
            for _ in range(config.num_hidden_layers)
        ]

    def __call__(
        self,
        hidden: jax.Array,
        frame_mask: jax.Array | None = None,
        dropout_keys: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Encodes embedded frames.

        Args:
            hidden: (B, T, H) frames, positions included.
            frame_mask: (B, T) bool, True at valid frames; None means all.
            dropout_keys: (B,) a key per clip; None turns dropout off.

        Returns:
            The last hidden state, (B, T, H), and `config.num_hidden_layers` + 1 hidden states:
            the input of the first layer, then the output of each. As in transformers, the last
            of these is not normalised in the large variant; the last hidden state is.
        """
        if not self.config.do_stable_layer_norm:
            hidden = self.layer_norm(hidden)
        hidden = self.dropout(hidden, dropout_keys)
        states = [hidden]
        for layer in self.layers:
            hidden = layer(hidden, frame_mask, dropout_keys)
            states.append(hidden)
        if self.config.do_stable_layer_norm:
            hidden = self.layer_norm(hidden)
        return hidden, tuple(states)


class HubertModel(nn.Module):
    """`HubertEmbed` followed by `HubertLayers`, as `embed` and `encoder`."""

    config: HubertConfig
    dtype: DTypeLike | None = None

    def setup(self):
        """Makes the submodules."""
        self.embed = HubertEmbed(self.config, self.dtype)
        self.encoder = HubertLayers(self.config, self.dtype)

    def __call__(
        self,
        waveform: jax.Array,
        num_samples: jax.Array | None = None,
        dropout_keys: jax.Array | None = None,
    ) -> HubertOutput:
        """Encodes a batch of clips; see `HubertEmbed` and `HubertLayers`.

        Args:
            waveform: (B, samples) float32.
            num_samples: (B,) int, the valid samples of each clip; None means all.
            dropout_keys: (B,) a key per clip; None turns dropout off.
        """
        hidden, frame_mask = self.embed(waveform, num_samples, dropout_keys)
        last, states = self.encoder(hidden, frame_mask, dropout_keys)
        return HubertOutput(last, states, frame_mask)


class _FeatureExtractor(nn.Module):
    """The strided convolutions: (B, samples) to (B, T, conv_dim[-1])."""

    config: HubertConfig
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, waveform: jax.Array, num_samples: jax.Array) -> jax.Array:
        config = self.config
        x, num_valid = waveform[..., None], num_samples
        for i, (width, kernel, stride) in enumerate(
            zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True)
        ):
            num_valid = _conv_length(num_valid, [kernel], [stride])
            group = config.feat_extract_norm == "group"
            x = _ConvLayer(
                width,
                kernel,
                stride,
                use_bias=config.conv_bias,
                norm="layer" if not group else "group" if i == 0 else None,
                activation=ACTIVATIONS[config.feat_extract_activation],
                dtype=self.dtype,
                name=f"conv_layers_{i}",
            )(x, num_valid)
        return x


class _ConvLayer(nn.Module):
    """Convolution, norm over the channels ("layer") or over the valid frames ("group"), activation.

    Called with (B, L, C) and (B,), the number of valid frames of the *output*.
    """

    width: int
    kernel_size: int
    stride: int
    use_bias: bool
    norm: str | None
    activation: Callable[[jax.Array], jax.Array]
    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, x: jax.Array, num_valid: jax.Array) -> jax.Array:
        x = nn.Conv(
            self.width,
            (self.kernel_size,),
            self.stride,
            padding="VALID",
            use_bias=self.use_bias,
            dtype=self.dtype,
            name="conv",
        )(x)
        if self.norm == "layer":
            x = LayerNorm(epsilon=CONV_NORM_EPSILON, dtype=self.dtype, name="layer_norm")(x)
        elif self.norm == "group":
            # One frame at least, so that an empty clip in a batch does not become NaN.
            valid = jnp.arange(x.shape[1]) < jnp.maximum(num_valid, 1)[:, None]
            norm = GroupNorm(
                self.width, epsilon=CONV_NORM_EPSILON, dtype=self.dtype, name="layer_norm"
            )
            x = norm(x, mask=jnp.broadcast_to(valid[..., None], x.shape))
        return self.activation(x)


class _FeatureProjection(nn.Module):
    """(B, T, conv_dim[-1]) to (B, T, H)."""

    config: HubertConfig
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array, dropout_keys: jax.Array | None) -> jax.Array:
        if self.config.feat_proj_layer_norm:
            epsilon = self.config.layer_norm_eps
            x = LayerNorm(epsilon=epsilon, dtype=self.dtype, name="layer_norm")(x)
        x = nn.Dense(self.config.hidden_size, dtype=self.dtype, name="projection")(x)
        return Dropout(self.config.feat_proj_dropout)(x, dropout_keys)


def _conv_length(
    length: int | jax.Array, kernels: Sequence[int], strides: Sequence[int]
) -> int | jax.Array:
    """Output length of unpadded convolutions, never negative."""
    for kernel, stride in zip(kernels, strides, strict=True):
        length = (length - kernel) // stride + 1
    return length * (length > 0)

"""wav2vec 2.0 (Baevski et al. 2020) in Flax, from waveform to the hidden states of every layer.

HuBERT has the same architecture, and WavLM extends it; `hubert.py` and `wavlm.py` have what
differs. Structure, parameter names and results follow the library `transformers`, whose
configurations are read. There are two differences:

* A clip has the same outputs in a padded batch as alone, in the base variants too: torch's group
  norm includes the padding in its statistics, ours only the valid frames; and what torch's
  `conv_pos_batch_norm` adds to padded frames does not reach valid ones.
* Training does not change the statistics of that batch norm. It has dropout but neither layerdrop
  nor SpecAugment (`layerdrop`, `mask_time_prob` and `mask_feature_prob` are ignored), so that every
  step runs the same program.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from serkd_jax.audio.waveform import SAMPLE_RATE
from serkd_jax.encoders.base import Encoder, Tensors, check_fields
from serkd_jax.models.transformer import (
    Dropout,
    EncoderLayer,
    LayerNorm,
    SelfAttention,
    exact_gelu,
)

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import HubertConfig, Wav2Vec2Config, WavLMConfig

    Config = HubertConfig | Wav2Vec2Config | WavLMConfig

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": exact_gelu,
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "selu": jax.nn.selu,
    "silu": jax.nn.silu,
}
CONV_NORM_EPSILON = 1e-5  # torch's default; config.layer_norm_eps does not apply to these norms
POSITIONS = "encoder.pos_conv_embed."
# Two ways in which torch names the parts of a normalised weight: its magnitude and direction.
WEIGHT_NORM = (
    ("weight_g", "weight_v"),
    ("parametrizations.weight.original0", "parametrizations.weight.original1"),
)

GroupNorm = functools.partial(nn.GroupNorm, use_fast_variance=False)  # as LayerNorm


def conv_frames(config: Config, num_samples: int | jax.Array) -> int | jax.Array:
    """Returns how many frames the convolutions make of a clip; 0 if it is too short."""
    return _conv_length(num_samples, config.conv_kernel, config.conv_stride)


class PositionalConv(nn.Module):
    """Relative positions from a wide grouped convolution over time.

    The weight normalisation of torch's model is folded into the kernel. Likewise, the batch norm of
    `conv_pos_batch_norm` is folded, with the statistics of pre-training, into a scale and a bias
    per channel.

    Attributes:
        config: the architecture.
        dtype: dtype of the computation; None means that of inputs and parameters.
    """

    config: Config
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array, frame_mask: jax.Array) -> jax.Array:
        """Makes the positional term (B, T, H) that is to be added to the frames (B, T, H).

        Frames where `frame_mask` (B, T) is False count as 0, like the padding after a single clip.
        """
        kernel_size, width = self.config.num_conv_pos_embeddings, x.shape[-1]
        if getattr(self.config, "conv_pos_batch_norm", False):  # only HuBERT has it
            x = x * self.param("batch_norm_scale", nn.initializers.ones, (width,)).astype(x.dtype)
            x = x + self.param("batch_norm_bias", nn.initializers.zeros, (width,)).astype(x.dtype)
        x = nn.Conv(
            width,
            (kernel_size,),
            # torch pads by kernel_size // 2 on both sides, then drops an excess last frame.
            padding=[(kernel_size // 2, (kernel_size - 1) // 2)],
            feature_group_count=self.config.num_conv_pos_embedding_groups,
            dtype=self.dtype,
            name="conv",
        )(jnp.where(frame_mask[..., None], x, 0))
        return ACTIVATIONS[self.config.feat_extract_activation](x)


class Wav2Vec2Embed(nn.Module):
    """Maps waveforms to inputs of the transformer layers: convolutions, projection, positions."""

    config: Config
    dtype: DTypeLike | None = None

    def setup(self):
        """Makes the submodules."""
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
            waveform: (B, samples) float32, 16 kHz, normalised if the checkpoint requires it.
            num_samples: (B,) int, the number of valid samples of each clip; None means all.
            dropout_keys: (B,) keys, one per clip; None turns dropout off.

        Returns:
            Frames (B, T, H), meaningless where padded, and (B, T) bool, True at valid frames.
        """
        batch, length = waveform.shape
        frames = conv_frames(self.config, length)
        if not frames:
            raise ValueError(f"a waveform of {length} samples is shorter than one frame")
        num_samples = jnp.full(batch, length) if num_samples is None else jnp.asarray(num_samples)
        hidden = self.feature_extractor(waveform, num_samples)
        hidden = self.feature_projection(hidden, dropout_keys)
        frame_mask = jnp.arange(frames) < conv_frames(self.config, num_samples)[:, None]
        return hidden + self.pos_conv_embed(hidden, frame_mask), frame_mask


class Wav2Vec2Layers(nn.Module):
    """The transformer layers and their norm, which is first in base and last in large models."""

    config: Config
    dtype: DTypeLike | None = None
    remat: bool = False  # whether to compute activations again for the gradient
    attention: ClassVar[type[nn.Module]] = SelfAttention

    def setup(self):
        """Makes the submodules."""
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
                attention=self.attention,
            )
            for _ in range(config.num_hidden_layers)
        ]

    def attention_inputs(self, length: int) -> tuple[jax.Array, ...]:
        """Returns further inputs of every layer's attention; here there are none."""
        del length
        return ()

    def __call__(
        self,
        hidden: jax.Array,
        frame_mask: jax.Array | None = None,
        dropout_keys: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Encodes embedded frames.

        Args:
            hidden: (B, T, H) frames, including positions.
            frame_mask: (B, T) bool, True at valid frames; None means all.
            dropout_keys: (B,) keys, one per clip; None turns dropout off.

        Returns:
            The last hidden state, (B, T, H), and `config.num_hidden_layers` + 1 hidden states:
            the input of the first layer, then the output of each layer. As in `transformers`, the
            last of these is not normalised in the large variant, but the last hidden state is.
        """
        if not self.config.do_stable_layer_norm:
            hidden = self.layer_norm(hidden)
        hidden = self.dropout(hidden, dropout_keys)
        states, shared = [hidden], self.attention_inputs(hidden.shape[1])
        for layer in self.layers:
            hidden = layer(hidden, frame_mask, dropout_keys, *shared)
            states.append(hidden)
        if self.config.do_stable_layer_norm:
            hidden = self.layer_norm(hidden)
        return hidden, tuple(states)


class Wav2Vec2(Encoder):
    """wav2vec 2.0: base, large, robust and XLS-R, also when fine-tuned with any head."""

    model_type = "wav2vec2"
    config_name, model_name = "Wav2Vec2Config", "Wav2Vec2Model"
    prefixes = ("wav2vec2.",)
    embed, layers = Wav2Vec2Embed, Wav2Vec2Layers
    dropouts = ("hidden_dropout", "attention_dropout", "activation_dropout")
    assumption = (
        "each waveform is brought to zero mean and unit variance, as transformers does by default"
    )

    def check_config(self, config: Config) -> None:
        """See `Encoder`."""
        groups = config.num_conv_pos_embedding_groups
        supported = {
            "feat_extract_norm": config.feat_extract_norm in ("group", "layer"),
            "feat_extract_activation": config.feat_extract_activation in ACTIVATIONS,
            "hidden_act": config.hidden_act in ACTIVATIONS,
            "num_attention_heads": config.hidden_size % config.num_attention_heads == 0,
            "num_conv_pos_embedding_groups": config.hidden_size % groups == 0,
        }
        for name in ("adapter_attn_dim", "add_adapter"):  # not all configurations have these
            if hasattr(config, name):
                supported[name] = not getattr(config, name)
        check_fields(config, supported)

    def check_preprocessor(self, config: Config, settings: Mapping[str, Any]) -> bool:
        """See `Encoder`."""
        del config
        rate = settings.get("sampling_rate", SAMPLE_RATE)
        if rate != SAMPLE_RATE:
            raise ValueError(f"sampling_rate is {rate}: only {SAMPLE_RATE} is supported")
        return bool(settings.get("do_normalize", True))

    def num_frames(self, config: Config, num_samples: Any) -> Any:
        """See `Encoder`."""
        return conv_frames(config, num_samples)

    def torch_name(self, path: tuple[str, ...]) -> str:
        """See `Encoder`.

        For example `("encoder", "layers_3", "output_dense", "kernel")` is
        `encoder.layers.3.feed_forward.output_dense.weight`.
        """
        name = re.sub(r"^embed\.", "", ".".join(path))
        name = re.sub(r"^pos_conv_embed\.", "encoder.pos_conv_embed.", name)
        name = re.sub(r"\b(conv_layers|layers)_(\d+)\.", r"\1.\2.", name)
        name = re.sub(r"\b(intermediate|output)_dense\.", r"feed_forward.\g<0>", name)
        return re.sub(r"\b(kernel|scale)$", "weight", name)

    def from_torch(self, tensors: Tensors) -> Tensors:
        """Replaces each pair of a normalised weight's parts by the weight, g * v / |v|."""
        tensors = dict(tensors)
        for magnitude, direction in WEIGHT_NORM:
            for name in [name for name in tensors if name.endswith(f".{direction}")]:
                prefix = name.removesuffix(direction)
                if prefix + magnitude not in tensors:
                    continue  # both parts will be reported, as missing and as unexpected
                g = tensors.pop(prefix + magnitude).astype(np.float32)
                v = tensors.pop(name).astype(np.float32)
                axes = tuple(axis for axis, size in enumerate(g.shape) if size == 1)
                norm = np.sqrt(np.square(v).sum(axes, keepdims=True))
                tensors[f"{prefix}weight"] = v * (g / norm)
        return tensors

    def to_torch(self, config: Config, tensors: Tensors) -> Tensors:
        """Splits the weight of the positional convolution in two, with current torch's names."""
        del config
        tensors = dict(tensors)
        magnitude, direction = WEIGHT_NORM[-1]
        weight = tensors.pop(f"{POSITIONS}conv.weight")
        norm = np.sqrt(np.square(weight).sum((0, 1), keepdims=True))
        tensors[f"{POSITIONS}conv.{magnitude}"] = norm
        # Where the magnitude is 0, any direction is right, but torch must not compute 0 / 0.
        tensors[f"{POSITIONS}conv.{direction}"] = np.where(norm > 0, weight, np.float32(1))
        return tensors

    def write_preprocessor(self, config: Config, do_normalize: bool, folder: Path) -> None:
        """See `Encoder`."""
        from transformers import Wav2Vec2FeatureExtractor

        # With group norm, `transformers` expects padding with zeros and no mask.
        masked = config.feat_extract_norm == "layer"
        extractor = Wav2Vec2FeatureExtractor(
            do_normalize=do_normalize, return_attention_mask=masked
        )
        extractor.save_pretrained(folder)


class _FeatureExtractor(nn.Module):
    """The strided convolutions, from (B, samples) to (B, T, conv_dim[-1])."""

    config: Config
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
    """Convolution, norm over channels ("layer") or valid frames ("group"), and activation.

    It is called with (B, L, C) inputs and (B,), the number of valid frames of the *output*.
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
            # At least one frame, so that an empty clip in a batch does not become NaN.
            valid = jnp.arange(x.shape[1]) < jnp.maximum(num_valid, 1)[:, None]
            norm = GroupNorm(
                self.width, epsilon=CONV_NORM_EPSILON, dtype=self.dtype, name="layer_norm"
            )
            x = norm(x, mask=jnp.broadcast_to(valid[..., None], x.shape))
        return self.activation(x)


class _FeatureProjection(nn.Module):
    """The norm and projection from (B, T, conv_dim[-1]) to (B, T, H)."""

    config: Config
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array, dropout_keys: jax.Array | None) -> jax.Array:
        if getattr(self.config, "feat_proj_layer_norm", True):  # only HuBERT may lack it
            epsilon = self.config.layer_norm_eps
            x = LayerNorm(epsilon=epsilon, dtype=self.dtype, name="layer_norm")(x)
        x = nn.Dense(self.config.hidden_size, dtype=self.dtype, name="projection")(x)
        return Dropout(self.config.feat_proj_dropout)(x, dropout_keys)


def _conv_length(
    length: int | jax.Array, kernels: Sequence[int], strides: Sequence[int]
) -> int | jax.Array:
    """Returns the output length of unpadded convolutions, which is never negative."""
    for kernel, stride in zip(kernels, strides, strict=True):
        length = (length - kernel) // stride + 1
    return length * (length > 0)


ENCODER = Wav2Vec2()

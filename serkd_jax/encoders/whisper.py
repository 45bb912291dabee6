"""Whisper's encoder (Radford et al. 2023) in Flax: log-mel, two convolutions, transformer layers.

Whisper itself pads every recording to 30 s. Here a clip keeps its own length: its frames take the
first positions and attend only to each other. With `pad_to_30s`, results are those of the library
`transformers`. Either way there are 50 frames a second, centred 12.5 ms before wav2vec 2.0's.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from serkd_jax.audio import logmel
from serkd_jax.audio.waveform import SAMPLE_RATE
from serkd_jax.encoders.base import Encoder, check_fields
from serkd_jax.models.transformer import (
    Dropout,
    EncoderLayer,
    LayerNorm,
    SelfAttention,
    exact_gelu,
)

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import WhisperConfig

WINDOW, MEL_HOP = 400, 160  # samples, for the log-mel frames
HOP = 2 * MEL_HOP  # samples, for the encoder's frames
DECADES = 8.0  # range of power that the log-mel keeps below a clip's maximum
ACTIVATIONS = {"gelu": exact_gelu, "relu": jax.nn.relu}

Attention = functools.partial(SelfAttention, key_bias=False)


def log_mel(waveform: jax.Array, num_samples: jax.Array, num_mels: int) -> jax.Array:
    """Computes log-mel frames, 100 a second, as `WhisperFeatureExtractor` does for each clip.

    Args:
        waveform: (B, samples) float32, 16 kHz.
        num_samples: (B,) int, the numbers of valid samples; what follows them is ignored.
        num_mels: M.

    Returns:
        (B, samples // 160, M) float32. The first num_samples // 160 frames of a clip are valid; the
        others are 0.
    """
    length, count = waveform.shape[1], waveform.shape[1] // MEL_HOP
    # Windows are centred on the hops; beyond both ends of a clip, the waveform is mirrored.
    place = jnp.abs(jnp.arange(-WINDOW // 2, length + WINDOW // 2))
    last = num_samples[:, None] - 1
    place = jnp.where(place <= last, place, 2 * last - place)
    padded = jnp.take_along_axis(waveform, jnp.clip(place, 0, length - 1), axis=1)
    step = MEL_HOP // 2  # a window has five of these steps, a hop two
    pieces = padded[:, : padded.shape[1] // step * step].reshape(len(waveform), -1, step)
    frames = [pieces[:, k : k + 2 * count - 1 : 2] for k in range(WINDOW // step)]
    hann = np.hanning(WINDOW + 1)[:-1].astype(np.float32)
    spectrum = jnp.fft.rfft(jnp.concatenate(frames, axis=-1) * hann)
    power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
    filters = logmel.mel_filters(num_mels, WINDOW, 0.0).astype(np.float32)
    mel = jnp.matmul(power, filters, precision=jax.lax.Precision.HIGHEST)
    mel = jnp.log10(jnp.maximum(mel, 1e-10))
    valid = (jnp.arange(count) < num_samples[:, None] // MEL_HOP)[..., None]
    floor = jnp.where(valid, mel, -jnp.inf).max((1, 2), keepdims=True) - DECADES
    return jnp.where(valid, (jnp.maximum(mel, floor) + 4) / 4, 0)


class WhisperEmbed(nn.Module):
    """Maps waveforms to the input of the transformer layers: log-mel, convolutions, positions."""

    config: WhisperConfig
    dtype: DTypeLike | None = None
    pad_to_30s: bool = False

    @nn.compact
    def __call__(
        self,
        waveform: jax.Array,
        num_samples: jax.Array | None = None,
        dropout_keys: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Embeds a batch of clips.

        Args:
            waveform: (B, samples) float32, 16 kHz, of at most `config.max_source_positions` frames.
            num_samples: (B,) int, the number of valid samples of each clip; None means all.
            dropout_keys: (B,) keys, one per clip; None turns dropout off.

        Returns:
            Frames (B, T, H), meaningless where padded, and (B, T) bool, True at frames that may be
            attended to, which are all with `pad_to_30s`.
        """
        config, (batch, length) = self.config, waveform.shape
        num_samples = jnp.full(batch, length) if num_samples is None else jnp.asarray(num_samples)
        if length < WINDOW:
            raise ValueError(f"a waveform of {length} samples is shorter than one frame")
        most = config.max_source_positions * HOP  # 30 s
        if logmel.num_frames(length) > config.max_source_positions:
            raise ValueError(f"a waveform of {length} samples is longer than {most}")
        waveform, num_samples = waveform[:, :most], jnp.minimum(num_samples, most)
        if self.pad_to_30s:
            waveform = jnp.where(jnp.arange(waveform.shape[1]) < num_samples[:, None], waveform, 0)
            waveform = jnp.pad(waveform, ((0, 0), (0, most - waveform.shape[1])))
            num_samples = jnp.full_like(num_samples, most)
        mel = log_mel(waveform, num_samples, config.num_mel_bins)
        conv = functools.partial(nn.Conv, config.d_model, (3,), padding=[(1, 1)], dtype=self.dtype)
        activation = ACTIVATIONS[config.activation_function]
        valid = jnp.arange(mel.shape[1]) < num_samples[:, None] // MEL_HOP
        hidden = activation(conv(name="conv1")(mel))
        # Frames after a clip count as 0, like the padding after a single clip.
        hidden = activation(conv(strides=2, name="conv2")(jnp.where(valid[..., None], hidden, 0)))
        shape = (config.max_source_positions, config.d_model)
        positions = self.param("embed_positions", nn.initializers.normal(0.02), shape)
        hidden += positions[: hidden.shape[1]].astype(hidden.dtype)
        return Dropout(config.dropout)(hidden, dropout_keys), valid[:, ::2]


class WhisperLayers(nn.Module):
    """The transformer layers and the final norm."""

    config: WhisperConfig
    dtype: DTypeLike | None = None
    remat: bool = False  # whether to compute activations again for the gradient

    @nn.compact
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
            The last hidden state, (B, T, H), after the final norm, and `config.encoder_layers` + 1
            hidden states: the input of the first layer, then each layer's output, not normalised.
        """
        config, states = self.config, [hidden]
        layer = nn.remat(EncoderLayer) if self.remat else EncoderLayer
        for i in range(config.encoder_layers):
            hidden = layer(
                num_heads=config.encoder_attention_heads,
                mlp_dim=config.encoder_ffn_dim,
                pre_norm=True,
                dropout=config.dropout,
                attention_dropout=config.attention_dropout,
                activation_dropout=config.activation_dropout,
                activation=ACTIVATIONS[config.activation_function],
                dtype=self.dtype,
                attention=Attention,
                name=f"layers_{i}",
            )(hidden, frame_mask, dropout_keys)
            states.append(hidden)
        return LayerNorm(dtype=self.dtype, name="layer_norm")(hidden), tuple(states)


class Whisper(Encoder):
    """Whisper: tiny to large-v3, with 80 or 128 mel bands, from whole models or encoders only."""

    model_type = "whisper"
    config_name, model_name = "WhisperConfig", "WhisperModel"
    prefixes = ("model.encoder.", "encoder.")
    saved_prefix = "model.encoder."
    embed, layers = WhisperEmbed, WhisperLayers
    dropouts = ("dropout", "attention_dropout", "activation_dropout")
    options = ("pad_to_30s",)
    assumption = "Whisper's log-mel, with the number of bands that config.json says"

    def check_config(self, config: WhisperConfig) -> None:
        """See `Encoder`."""
        heads = config.d_model % config.encoder_attention_heads == 0
        supported = {
            "activation_function": config.activation_function in ACTIVATIONS,
            "encoder_attention_heads": heads,
        }
        check_fields(config, supported)

    def check_preprocessor(self, config: WhisperConfig, settings: Mapping[str, Any]) -> bool:
        """See `Encoder`."""
        wanted = {
            "feature_size": config.num_mel_bins,
            "sampling_rate": SAMPLE_RATE,
            "n_fft": WINDOW,
            "hop_length": MEL_HOP,
            "dither": 0.0,
            "do_normalize": False,
        }
        for name, value in wanted.items():
            if (given := settings.get(name, value)) not in (value, None):
                raise ValueError(f"{name} is {given}, but the model wants {value}")
        return False

    def num_frames(self, config: WhisperConfig, num_samples: Any) -> Any:
        """See `Encoder`."""
        del config
        return (num_samples // MEL_HOP + 1) // 2 * (num_samples >= WINDOW)

    def max_frames(self, config: WhisperConfig) -> int:
        """See `Encoder`."""
        return config.max_source_positions

    def torch_name(self, path: tuple[str, ...]) -> str:
        """See `Encoder`.

        For example `("encoder", "layers_3", "output_dense", "kernel")` is `layers.3.fc2.weight`.
        """
        if path == ("embed", "embed_positions"):
            return "embed_positions.weight"
        name = ".".join(path[1:])
        name = re.sub(r"^layers_(\d+)\.layer_norm", r"layers_\1.self_attn_layer_norm", name)
        name = re.sub(r"^layers_(\d+)\.", r"layers.\1.", name)
        for ours, theirs in (("attention.", "self_attn."), ("intermediate_dense", "fc1")):
            name = name.replace(ours, theirs)
        name = name.replace("output_dense", "fc2")
        return re.sub(r"\b(kernel|scale)$", "weight", name)

    def write_preprocessor(self, config: WhisperConfig, do_normalize: bool, folder: Path) -> None:
        """See `Encoder`."""
        del do_normalize
        from transformers import WhisperFeatureExtractor

        WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(folder)


ENCODER = Whisper()

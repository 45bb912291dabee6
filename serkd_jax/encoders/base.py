"""What all encoders share: how one is described, and how it is run.

An encoder has two parts: `embed` turns waveforms into the input of the transformer layers, and
`encoder` is these layers. The first stays frozen when a teacher is fine-tuned.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import PreTrainedConfig

Tensors = dict[str, np.ndarray]  # by name


class EncoderOutput(NamedTuple):
    """What `EncoderModel` returns."""

    last_hidden_state: jax.Array  # (B, T, H), after the final norm where the encoder has one
    hidden_states: tuple[jax.Array, ...]  # the layers' input and each layer's output, (B, T, H)
    frame_mask: jax.Array  # (B, T) bool, True at valid frames


class Encoder(abc.ABC):
    """A kind of encoder: its modules, and how its checkpoints are read and written.

    Attributes:
        model_type: of its `config.json`.
        config_name: its configuration's class in transformers.
        model_name: its model's class in transformers.
        prefixes: what its tensors' names begin with in models that hold it.
        saved_prefix: what they begin with in a folder that we write.
        embed: a module made with (config, dtype), called with (waveform, num_samples,
            dropout_keys), which gives (B, T, H) frames and their (B, T) mask.
        layers: a module made with (config, dtype, remat), called with (frames, frame_mask,
            dropout_keys), which gives the last hidden state, and those of all layers.
        dropouts: the fields of the configuration that hold the dropouts of the layers.
        options: what `embed` may be made with beyond those.
        assumption: what is taken for granted where there is no preprocessor's file.
    """

    model_type: ClassVar[str]
    config_name: ClassVar[str]
    model_name: ClassVar[str]
    prefixes: ClassVar[tuple[str, ...]]
    saved_prefix: ClassVar[str] = ""
    embed: ClassVar[type[nn.Module]]
    layers: ClassVar[type[nn.Module]]
    dropouts: ClassVar[tuple[str, ...]]
    options: ClassVar[tuple[str, ...]] = ()
    assumption: ClassVar[str]

    @abc.abstractmethod
    def check_config(self, config: PreTrainedConfig) -> None:
        """Raises a ValueError that names each field whose value is not supported."""

    @abc.abstractmethod
    def check_preprocessor(self, config: PreTrainedConfig, settings: Mapping[str, Any]) -> bool:
        """Whether waveforms are normalised, from the preprocessor's settings, empty without a file.

        Raises:
            ValueError: they ask for what is not supported.
        """

    @abc.abstractmethod
    def num_frames(self, config: PreTrainedConfig, num_samples: Any) -> Any:
        """Frames that `embed` makes of so many samples; 0 for too short a clip."""

    def max_frames(self, config: PreTrainedConfig) -> int | None:
        """Of the longest clip that it takes; None if there is no limit."""
        del config

    @abc.abstractmethod
    def torch_name(self, path: tuple[str, ...]) -> str:
        """Name in torch's model of a parameter of `EncoderModel`.

        The values differ by the order of axes alone, and of kernels only: torch's is the reverse of
        Flax's, for dense layers and convolutions alike.
        """

    def from_torch(self, tensors: Tensors) -> Tensors:
        """Tensors as torch stores them, to those named by `torch_name`."""
        return tensors

    def to_torch(self, config: PreTrainedConfig, tensors: Tensors) -> Tensors:
        """The inverse of `from_torch`."""
        del config
        return tensors

    @abc.abstractmethod
    def write_preprocessor(
        self, config: PreTrainedConfig, do_normalize: bool, folder: Path
    ) -> None:
        """Writes the `preprocessor_config.json` that transformers reads."""


class EncoderModel(nn.Module):
    """An encoder whole, from waveform to hidden states.

    Attributes:
        kind: of encoder.
        config: the architecture.
        dtype: of the computation; None means that of inputs and parameters.
        options: of `embed`, as (name, value).
    """

    kind: Encoder
    config: PreTrainedConfig
    dtype: DTypeLike | None = None
    options: tuple[tuple[str, Any], ...] = ()

    def setup(self):
        """Makes the submodules."""
        self.embed = self.kind.embed(self.config, self.dtype, **dict(self.options))
        self.encoder = self.kind.layers(self.config, self.dtype)

    def __call__(
        self,
        waveform: jax.Array,
        num_samples: jax.Array | None = None,
        dropout_keys: jax.Array | None = None,
    ) -> EncoderOutput:
        """Encodes a batch of clips.

        Args:
            waveform: (B, samples) float32, 16 kHz, normalised if the checkpoint wants it so.
            num_samples: (B,) int, the valid samples of each clip; None means all.
            dropout_keys: (B,) a key per clip; None turns dropout off.
        """
        hidden, frame_mask = self.embed(waveform, num_samples, dropout_keys)
        last, states = self.encoder(hidden, frame_mask, dropout_keys)
        return EncoderOutput(last, states, frame_mask)


def normalize_waveform(waveform: jax.Array, num_samples: jax.Array) -> jax.Array:
    """Zero mean and unit variance over each clip's valid samples, as `Wav2Vec2FeatureExtractor`.

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


def check_fields(config: PreTrainedConfig, supported: Mapping[str, bool]) -> None:
    """Raises a ValueError that names the fields of a configuration that are not supported."""
    bad = [f"{name}={getattr(config, name)!r}" for name, ok in supported.items() if not ok]
    if bad:
        raise ValueError(
            f"{type(config).__name__} has fields with unsupported values: {', '.join(bad)} "
            f"(hidden_size={config.hidden_size}, {config.num_attention_heads} heads)"
        )

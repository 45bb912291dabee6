"""What all encoders share: how an encoder is described, and how it is run.

An encoder has two parts: `embed` turns waveforms into the input of the transformer layers, and
`encoder` is these layers. `embed` stays frozen when a teacher is fine-tuned.
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

    last_hidden_state: jax.Array  # (B, T, H), after the final norm if the encoder has one
    hidden_states: tuple[jax.Array, ...]  # the layers' input and each layer's output, (B, T, H)
    frame_mask: jax.Array  # (B, T) bool, True at valid frames


class Encoder(abc.ABC):
    """A kind of encoder: its modules, and how its checkpoints are read and written.

    Attributes:
        model_type: the `model_type` in its `config.json`.
        config_name: the class of its configuration in the library `transformers`.
        model_name: the class of its model in `transformers`.
        prefixes: prefixes of the names of its tensors in models that contain it.
        saved_prefix: the prefix of these names in folders that we write.
        embed: a module that is made with (config, dtype), is called with (waveform, num_samples,
            dropout_keys), and returns (B, T, H) frames and their (B, T) mask.
        layers: a module that is made with (config, dtype, remat), is called with (frames,
            frame_mask, dropout_keys), and returns the last hidden state and those of all layers.
        dropouts: the fields of the configuration that hold the dropout rates of the layers.
        options: names of further arguments with which `embed` may be made.
        assumption: what is assumed if there is no file of the preprocessor.
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
        """Checks that a configuration is supported.

        Raises:
            ValueError: names each field whose value is not supported.
        """

    @abc.abstractmethod
    def check_preprocessor(self, config: PreTrainedConfig, settings: Mapping[str, Any]) -> bool:
        """Returns whether waveforms are normalised, from the preprocessor's settings.

        Args:
            config: the architecture.
            settings: the preprocessor's settings; empty if it has no file.

        Raises:
            ValueError: the settings ask for something that is not supported.
        """

    @abc.abstractmethod
    def num_frames(self, config: PreTrainedConfig, num_samples: Any) -> Any:
        """Returns the number of frames that `embed` makes of a clip; 0 if it is too short."""

    def max_frames(self, config: PreTrainedConfig) -> int | None:
        """Returns the number of frames of the longest clip allowed; None if there is no limit."""
        del config

    @abc.abstractmethod
    def torch_name(self, path: tuple[str, ...]) -> str:
        """Returns the name that a parameter of `EncoderModel` has in torch's model.

        The values differ only in the order of the axes of kernels: torch's is the reverse of
        Flax's, for dense layers and convolutions alike.
        """

    def from_torch(self, tensors: Tensors) -> Tensors:
        """Converts tensors as torch stores them to the tensors that `torch_name` names."""
        return tensors

    def to_torch(self, config: PreTrainedConfig, tensors: Tensors) -> Tensors:
        """Does the inverse of `from_torch`."""
        del config
        return tensors

    @abc.abstractmethod
    def write_preprocessor(
        self, config: PreTrainedConfig, do_normalize: bool, folder: Path
    ) -> None:
        """Writes the `preprocessor_config.json` that transformers reads."""


class EncoderModel(nn.Module):
    """A whole encoder, from waveform to hidden states.

    Attributes:
        kind: the kind of encoder.
        config: the architecture.
        dtype: dtype of the computation; None means that of inputs and parameters.
        options: further arguments of `embed`, as (name, value).
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
            waveform: (B, samples) float32, 16 kHz, normalised if the checkpoint requires it.
            num_samples: (B,) int, the number of valid samples of each clip; None means all.
            dropout_keys: (B,) keys, one per clip; None turns dropout off.
        """
        hidden, frame_mask = self.embed(waveform, num_samples, dropout_keys)
        last, states = self.encoder(hidden, frame_mask, dropout_keys)
        return EncoderOutput(last, states, frame_mask)


def normalize_waveform(waveform: jax.Array, num_samples: jax.Array) -> jax.Array:
    """Normalises each clip to mean 0 and variance 1, like `Wav2Vec2FeatureExtractor`.

    Args:
        waveform: (B, samples) float32.
        num_samples: (B,) int, the numbers of valid samples; what follows them is set to zero.
    """
    valid = jnp.arange(waveform.shape[1]) < num_samples[:, None]
    count = jnp.maximum(num_samples, 1)[:, None]
    mean = jnp.where(valid, waveform, 0.0).sum(1, keepdims=True) / count
    centred = jnp.where(valid, waveform - mean, 0.0)
    variance = jnp.square(centred).sum(1, keepdims=True) / count
    return centred / jnp.sqrt(variance + 1e-7)


def check_fields(config: PreTrainedConfig, supported: Mapping[str, bool]) -> None:
    """Checks that the fields of a configuration are supported.

    Raises:
        ValueError: names the fields whose values are not.
    """
    bad = [f"{name}={getattr(config, name)!r}" for name, ok in supported.items() if not ok]
    if bad:
        raise ValueError(
            f"{type(config).__name__} has fields with unsupported values: {', '.join(bad)} "
            f"(hidden_size={config.hidden_size}, {config.num_attention_heads} heads)"
        )

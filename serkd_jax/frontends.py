"""Front-ends: 16 kHz waveforms to feature sequences at 50 frames a second.

A front-end has `name`, `width` (N, the number of feature variates), `fingerprint` (everything
that its output depends on) and is called with waveforms. All share HuBERT's frame grid: n samples
give (n - 400) // 320 + 1 frames.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, ClassVar, Protocol

import jax
import numpy as np
from ml_collections import ConfigDict
from transformers import audio_utils

from serkd_jax.audio import SAMPLE_RATE
from serkd_jax.errors import UserError
from serkd_jax.models.hubert import HubertModel, normalize_waveform
from serkd_jax.models.hubert import num_frames as hubert_frames
from serkd_jax.models.hubert_weights import HubertCheckpoint, load_hubert

WINDOW = 400  # samples, 25 ms
HOP = 320  # samples, 20 ms


class Frontend(Protocol):
    """What feature extraction needs of a front-end."""

    name: str
    width: int
    fingerprint: str

    def __call__(self, waveforms: Sequence[np.ndarray], max_frames: int) -> list[np.ndarray]:
        """Features of float32 (num_samples,) waveforms, each float16 (<= max_frames, width)."""


def num_frames(num_samples: int | np.ndarray) -> int | np.ndarray:
    """Whole 25 ms frames, 20 ms apart, in `num_samples` samples at 16 kHz."""
    return (num_samples - WINDOW) // HOP + 1


def num_samples(num_frames: int) -> int:
    """Samples at 16 kHz that `num_frames` frames span."""
    return (num_frames - 1) * HOP + WINDOW


@dataclasses.dataclass(frozen=True)
class LogMel:
    """Log-mel spectrogram, computed on the CPU without any download.

    A value is (log10(max(mel power, 1e-8)) + 8) / 5: exactly 0 for digital silence, so that zero
    padding means silence, and about 0.5 to 2 for speech. The map is fixed; no corpus statistics
    enter, so nothing leaks from test data.
    """

    num_mels: int = 80
    name: ClassVar[str] = "logmel"

    LOG_FLOOR: ClassVar[float] = -8.0
    LOG_SCALE: ClassVar[float] = 5.0
    FFT_LENGTH: ClassVar[int] = 512
    MIN_HZ: ClassVar[float] = 20.0
    VERSION: ClassVar[int] = 1

    @property
    def width(self) -> int:
        """Number of mel bands."""
        return self.num_mels

    @property
    def fingerprint(self) -> str:
        """All settings that the features depend on."""
        return (
            f"logmel-v{self.VERSION}-{self.num_mels}-{WINDOW}-{HOP}-{self.FFT_LENGTH}"
            f"-{self.MIN_HZ:g}-{self.LOG_FLOOR:g}-{self.LOG_SCALE:g}"
        )

    @cached_property
    def _mel_filters(self) -> np.ndarray:
        return audio_utils.mel_filter_bank(
            num_frequency_bins=self.FFT_LENGTH // 2 + 1,
            num_mel_filters=self.num_mels,
            min_frequency=self.MIN_HZ,
            max_frequency=SAMPLE_RATE / 2,
            sampling_rate=SAMPLE_RATE,
            norm="slaney",
            mel_scale="slaney",
        )

    def __call__(self, waveforms: Sequence[np.ndarray], max_frames: int) -> list[np.ndarray]:
        """Features of float32 (num_samples,) waveforms, each float16 (<= max_frames, num_mels)."""
        return [self._features(waveform[: num_samples(max_frames)]) for waveform in waveforms]

    def _features(self, waveform: np.ndarray) -> np.ndarray:
        log_mel = audio_utils.spectrogram(
            waveform,
            window=audio_utils.window_function(WINDOW, "hann"),
            frame_length=WINDOW,
            hop_length=HOP,
            fft_length=self.FFT_LENGTH,
            power=2.0,
            center=False,
            mel_filters=self._mel_filters,
            mel_floor=10**self.LOG_FLOOR,
            log_mel="log10",
            dtype=np.float64,  # float32 puts log10 of the floor beside the floor
        )
        return ((log_mel.T - self.LOG_FLOOR) / self.LOG_SCALE).astype(np.float16)


@dataclasses.dataclass(frozen=True)
class Hubert:
    """The last hidden state of a HuBERT checkpoint (Section 4.3), run on each clip's true length.

    Attributes:
        model: a local folder in the Hugging Face format, or a name on the hub.
        revision: of the name on the hub.
    """

    model: str
    revision: str | None = None
    name: ClassVar[str] = "hubert"

    VERSION: ClassVar[int] = 1

    @cached_property
    def checkpoint(self) -> HubertCheckpoint:
        """Architecture and weights."""
        checkpoint = load_hubert(self.model, self.revision)
        if hubert_frames(checkpoint.config, num_samples(326)) != 326:
            raise UserError(f"{self.model} does not give one frame every {HOP} samples, as HuBERT")
        return checkpoint

    @property
    def width(self) -> int:
        """Width of the hidden states."""
        return self.checkpoint.config.hidden_size

    @property
    def fingerprint(self) -> str:
        """The weights' hash: a folder and a hub name with the same files give the same features."""
        return f"hubert-v{self.VERSION}-{self.checkpoint.sha256}"

    @cached_property
    def _encode(self) -> Callable[[np.ndarray, np.ndarray], jax.Array]:
        model = HubertModel(self.checkpoint.config)
        params = jax.device_put(self.checkpoint.params)

        @jax.jit
        def encode(params: Any, waveform: jax.Array, num_samples: jax.Array) -> jax.Array:
            if self.checkpoint.do_normalize:
                waveform = normalize_waveform(waveform, num_samples)
            return model.apply({"params": params}, waveform, num_samples).last_hidden_state

        return partial(encode, params)

    def __call__(self, waveforms: Sequence[np.ndarray], max_frames: int) -> list[np.ndarray]:
        """Features of float32 (num_samples,) waveforms, each float16 (<= max_frames, width).

        Every clip is encoded whole, then cut. The batch is padded to whole seconds, so that few
        shapes are compiled.
        """
        lengths = np.array([len(waveform) for waveform in waveforms])
        padded = np.zeros((len(waveforms), -(-lengths.max() // SAMPLE_RATE) * SAMPLE_RATE), "f4")
        for row, (waveform, length) in enumerate(zip(waveforms, lengths, strict=True)):
            padded[row, :length] = waveform
        hidden = np.asarray(self._encode(padded, lengths))
        return [
            x[: min(num_frames(length), max_frames)].astype(np.float16)
            for x, length in zip(hidden, lengths, strict=True)
        ]


def make_frontend(config: ConfigDict) -> Frontend:
    """Makes the front-end of a config's ``frontend`` part: its ``name`` and that one's settings."""
    frontends = {"logmel": LogMel, "hubert": Hubert}
    settings = config.to_dict()
    name = settings.pop("name")
    if name not in frontends:
        raise UserError(f"frontend.name is {name!r}: use one of {', '.join(frontends)}")
    try:
        return frontends[name](**settings)
    except TypeError as error:
        raise UserError(f"frontend {name}: {error}; use the {name} part of a recipe") from error

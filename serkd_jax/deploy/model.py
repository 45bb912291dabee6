"""An exported model as a function of recordings; needs only NumPy and the format's runtime."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from serkd_jax.audio.logmel import num_samples
from serkd_jax.audio.waveform import (
    SAMPLE_RATE,
    AudioError,
    check_audio,
    check_rate,
    downmix,
    is_silent,
    to_float,
    to_full_scale,
    to_int16,
)
from serkd_jax.deploy.backends import load_classifier, load_frontend
from serkd_jax.deploy.folder import find_folder, read_config
from serkd_jax.errors import UserError, readable

MOST_CHANNELS = 64


class Window(NamedTuple):
    """A part of a recording."""

    start: float  # seconds
    end: float
    label: str
    probabilities: dict[str, float]


class Prediction(NamedTuple):
    """What a recording sounds like; its probabilities are the means over its windows."""

    source: str
    label: str
    probabilities: dict[str, float]
    windows: list[Window]  # without silent ones
    notices: list[str]  # what its owner should know of how it was read


class Failure(NamedTuple):
    """A recording that could not be used."""

    source: str
    error: str


@dataclass
class _Clip:
    """A recording on its way through the model."""

    source: str
    waveform: np.ndarray
    starts: list[int]  # starts of the windows that are not silent, in samples
    notices: list[str]
    probabilities: list[np.ndarray] = field(default_factory=list)


class Model:
    """An exported model, from `load_model`.

    Attributes:
        labels: the names of the classes.
        window_seconds: the longest part of a recording that the model sees at once.
    """

    def __init__(self, folder: Path, form: str, threads: int = 0, max_seconds: float = 3600):
        config = read_config(folder)
        self.labels = list(config.labels)
        self._window = num_samples(config.max_frames)
        self.window_seconds = self._window / SAMPLE_RATE
        self._featurize = load_frontend(folder, config)
        self._classify = load_classifier(folder, config, form, threads)
        self._max_samples = round(max_seconds * SAMPLE_RATE)

    def __call__(
        self,
        audio: str | Path | Any,
        rate: int = SAMPLE_RATE,
        hop_seconds: float | None = None,
    ) -> Prediction:
        """Classifies one recording.

        Args:
            audio: a file, or samples: see `to_waveform`.
            rate: rate of the samples in Hz; a file has its own.
            hop_seconds: time from one window to the next; None means that they do not overlap. The
                last window ends with the recording.

        Raises:
            AudioError: the recording cannot be used; the message says why.
        """
        (result,) = self.predict([(audio, rate)], hop_seconds)
        if isinstance(result, Failure):
            raise AudioError(result.error)
        return result

    def predict(
        self,
        recordings: Iterable[str | Path | tuple[str | Path | Any, int]],
        hop_seconds: float | None = None,
        batch_size: int = 16,
    ) -> Iterator[Prediction | Failure]:
        """Classifies many recordings in their order; a batch may have windows of several.

        Args:
            recordings: files, or tuples (file or samples, rate).
            hop_seconds: see `__call__`.
            batch_size: number of windows that go through the model at once.
        """
        hop = self._window if hop_seconds is None else round(hop_seconds * SAMPLE_RATE)
        if not 0 < hop <= self._window:
            raise UserError(f"hop_seconds is {hop_seconds}: use up to {self.window_seconds:g}")
        open_clips: deque[_Clip | Failure] = deque()
        batch: list[tuple[_Clip, int]] = []
        for recording in recordings:
            clip = self._open(recording, hop)
            open_clips.append(clip)
            for start in clip.starts if isinstance(clip, _Clip) else ():
                batch.append((clip, start))
                if len(batch) == batch_size:
                    self._run(batch)
                    batch = []
            yield from self._finished(open_clips)
        if batch:
            self._run(batch)
        yield from self._finished(open_clips)

    def _open(self, recording: object, hop: int) -> _Clip | Failure:
        is_pair = isinstance(recording, tuple) and len(recording) == 2
        audio, rate = recording if is_pair else (recording, SAMPLE_RATE)
        is_file, notices = isinstance(audio, str | Path), []
        source = readable(str(audio)) if is_file else "samples"
        try:
            if is_file:
                from serkd_jax.audio.decoding import read_audio

                waveform = read_audio(audio, self._max_samples + 1, notices=notices)
            else:
                waveform = to_waveform(audio, rate, notices)
            if len(waveform) > self._max_samples:
                limit = self._max_samples / SAMPLE_RATE
                raise AudioError(
                    f"{source}: longer than {limit:g} s: raise max_seconds or split it"
                )
        except (AudioError, OSError) as error:
            return Failure(source, readable(str(error)))
        except MemoryError:
            return Failure(source, f"{source}: does not fit into memory; split it")
        waveform = to_float(to_int16(waveform))  # as in the records it was trained on
        last = max(0, len(waveform) - self._window)
        starts = [
            start
            for start in (*range(0, last, hop), last)
            if not is_silent(waveform[start : start + self._window])
        ]
        if not starts:  # such as a constant that changes between the windows
            return Failure(source, f"{source}: silent; remove it or record it again")
        return _Clip(source, waveform, starts, notices)

    def _run(self, batch: Sequence[tuple[_Clip, int]]) -> None:
        windows = [clip.waveform[start : start + self._window] for clip, start in batch]
        logits = self._classify(*self._featurize(windows))
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
        for (clip, _), row in zip(batch, probabilities, strict=True):
            clip.probabilities.append(row)

    def _finished(self, clips: deque[_Clip | Failure]) -> Iterator[Prediction | Failure]:
        """Removes the clips whose windows are all done, up to the first that is not."""
        while clips:
            clip = clips[0]
            if isinstance(clip, Failure):
                yield clip
            elif len(clip.probabilities) == len(clip.starts):
                yield self._prediction(clip)
            else:
                return
            clips.popleft()

    def _prediction(self, clip: _Clip) -> Prediction:
        windows = []
        for start, row in zip(clip.starts, clip.probabilities, strict=True):
            end = min(start + self._window, len(clip.waveform))
            times = (round(sample / SAMPLE_RATE, 3) for sample in (start, end))
            windows.append(Window(*times, *self._label(row)))
        mean = np.mean(clip.probabilities, axis=0)
        return Prediction(clip.source, *self._label(mean), windows, clip.notices)

    def _label(self, probabilities: np.ndarray) -> tuple[str, dict[str, float]]:
        named = dict(zip(self.labels, map(float, probabilities), strict=True))
        return max(named, key=named.__getitem__), named


def load_model(
    model: str | Path,
    format: str = "safetensors",
    *,
    revision: str | None = None,
    threads: int = 0,
    max_seconds: float = 3600,
) -> Model:
    """Loads an exported model.

    Args:
        model: a folder from `serkd_jax.export`, or a name on the Hugging Face hub.
        format: which of its files to run: safetensors (in Flax), stablehlo, stablehlo-bf16, onnx,
            onnx-int8, tflite or tflite-int8.
        revision: branch, tag or commit on the hub.
        threads: number of threads for ONNX and LiteRT; 0 lets them choose.
        max_seconds: longer recordings are refused.

    Raises:
        UserError: the model is missing or damaged, or the format's runtime is not installed.
    """
    return Model(find_folder(model, revision, format), format, threads, max_seconds)


def to_waveform(audio: Any, rate: int, notices: list[str] | None = None) -> np.ndarray:
    """Converts samples, floats of full scale 1 or integers, to 16 kHz mono.

    Args:
        audio: (n,), (n, channels) or (channels, n) samples: a NumPy, JAX or torch array, or a list.
            Integers of 32 or 64 bits that fit into 16, 24 or 32 are taken as samples of so many.
        rate: their rate, in Hz.
        notices: a list that gets a sentence for each thing that the owner should know.

    Raises:
        AudioError: the samples have another shape or type, or cannot be used, see
            `serkd_jax.audio.waveform.check_audio`.
    """
    try:
        if hasattr(audio, "detach"):  # a tensor of torch, which may have a gradient or be on a GPU
            audio = audio.detach().cpu()
            audio = audio.float() if "bfloat16" in str(audio.dtype) else audio
        audio = np.asarray(audio)
        if audio.dtype.name == "bfloat16":
            audio = audio.astype(np.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise AudioError(f"{type(audio).__name__} is neither a file nor samples") from error
    if audio.ndim not in (1, 2) or audio.dtype.kind not in "fiu" or audio.size == 0:
        raise AudioError(f"samples of shape {audio.shape} and type {audio.dtype} are not audio")
    check_rate(rate, "samples")
    if audio.ndim == 2 and len(audio) < audio.shape[1]:
        audio = audio.T
    if audio.ndim == 2 and audio.shape[1] > MOST_CHANNELS:
        raise AudioError(f"samples of shape {audio.shape} are not audio: too many channels")
    if audio.dtype.kind in "iu":
        audio = _to_unit(audio, notices)
    mono = downmix(audio[:, None] if audio.ndim == 1 else audio, notices).astype(np.float32)
    if rate != SAMPLE_RATE:
        import soxr

        mono = soxr.resample(mono, rate, SAMPLE_RATE, "HQ")
    return check_audio(to_full_scale(mono, notices), "samples")


def _to_unit(audio: np.ndarray, notices: list[str] | None) -> np.ndarray:
    """Scales integer samples to full scale 1; unsigned ones swing around the middle, as in WAV."""
    signed, bits = audio.dtype.kind == "i", 8 * audio.dtype.itemsize
    if bits > 16:  # programs put samples into larger integers as they are
        peak = max(int(audio.max()), -int(audio.min()) - 1)
        fits = next(few for few in (16, 24, 32, 64) if peak < 2 ** (few - signed))
        if fits < bits and notices is not None:
            notices.append(
                f"its {bits}-bit integers are taken as samples of {fits} bits, which fit"
            )
        bits = min(fits, bits)
    return audio / 2.0 ** (bits - 1) - (not signed)

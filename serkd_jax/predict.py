"""Emotions of recordings: ``python -m serkd_jax.predict --model=DIR FILES AND FOLDERS``.

    from serkd_jax.predict import load_model
    model = load_model("DIR")  # an exported folder, or its name on the Hugging Face hub
    print(model("speech.wav").label)

This needs NumPy and what runs the chosen format, no more: a log-mel student in ONNX runs without
JAX. To read files it also needs soundfile, soxr and av; arrays at 16 kHz it takes as they are.
"""

import argparse
import csv
import io
import json
import math
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np

from serkd_jax.audio.logmel import num_samples
from serkd_jax.audio.waveform import (
    SAMPLE_RATE,
    SILENCE_PEAK,
    AudioError,
    check_audio,
    to_float,
    to_int16,
)
from serkd_jax.deploy.backends import load_classifier, load_frontend
from serkd_jax.deploy.folder import FILES, find_folder, read_config
from serkd_jax.errors import UserError


class Window(NamedTuple):
    """A part of a recording."""

    start: float  # seconds
    end: float
    label: str
    probabilities: dict[str, float]


class Prediction(NamedTuple):
    """What a recording sounds like; its probabilities are the mean of its windows'."""

    source: str
    label: str
    probabilities: dict[str, float]
    windows: list[Window]  # silent ones left out


class Failure(NamedTuple):
    """A recording that could not be used."""

    source: str
    error: str


@dataclass
class _Clip:
    """A recording on its way through the model."""

    source: str
    waveform: np.ndarray
    starts: list[int]  # samples, of the windows that are not silent
    probabilities: list[np.ndarray] = field(default_factory=list)


class Model:
    """An exported model, from `load_model`.

    Attributes:
        labels: the classes.
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
        audio: str | Path | np.ndarray,
        rate: int = SAMPLE_RATE,
        hop_seconds: float | None = None,
    ) -> Prediction:
        """Classifies one recording.

        Args:
            audio: a file, or samples (n,) or (n, channels): floats of full scale 1, or integers.
            rate: of the samples, Hz; files say theirs.
            hop_seconds: from one window to the next; None means that they do not overlap. The
                last one ends with the recording.

        Raises:
            AudioError: it cannot be used; the message says why.
        """
        (result,) = self.predict([(audio, rate)], hop_seconds)
        if isinstance(result, Failure):
            raise AudioError(result.error)
        return result

    def predict(
        self,
        recordings: Iterable[str | Path | tuple[str | Path | np.ndarray, int]],
        hop_seconds: float | None = None,
        batch_size: int = 16,
    ) -> Iterator[Prediction | Failure]:
        """Classifies many, in their order; windows of several go through the model together.

        Args:
            recordings: files, or (file or samples, rate).
            hop_seconds: see `__call__`.
            batch_size: windows at once.
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
        audio, rate = recording if isinstance(recording, tuple) else (recording, SAMPLE_RATE)
        source = "samples" if isinstance(audio, np.ndarray) else str(audio)
        try:
            if isinstance(audio, np.ndarray):
                waveform = to_waveform(audio, rate)
            else:
                from serkd_jax.audio.decoding import read_audio

                waveform = read_audio(audio, self._max_samples + 1)
            if len(waveform) > self._max_samples:
                limit = self._max_samples / SAMPLE_RATE
                raise AudioError(
                    f"{source}: longer than {limit:g} s: raise max_seconds or split it"
                )
        except (AudioError, OSError) as error:
            return Failure(source, str(error))
        except MemoryError:
            return Failure(source, f"{source}: does not fit into memory; split it")
        waveform = to_float(to_int16(waveform))  # as in the records that it learned from
        last = max(0, len(waveform) - self._window)
        starts = [
            start
            for start in (*range(0, last, hop), last)
            if np.abs(waveform[start : start + self._window]).max() >= SILENCE_PEAK
        ]
        return _Clip(source, waveform, starts)

    def _run(self, batch: Sequence[tuple[_Clip, int]]) -> None:
        windows = [clip.waveform[start : start + self._window] for clip, start in batch]
        logits = self._classify(*self._featurize(windows))
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
        for (clip, _), row in zip(batch, probabilities, strict=True):
            clip.probabilities.append(row)

    def _finished(self, clips: deque[_Clip | Failure]) -> Iterator[Prediction | Failure]:
        """Takes those off whose windows are all done, up to the first that waits."""
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
        return Prediction(clip.source, *self._label(np.mean(clip.probabilities, axis=0)), windows)

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
        model: a folder from ``serkd_jax.export``, or a name on the Hugging Face hub.
        format: which of its files: safetensors (in Flax), stablehlo, stablehlo-bf16, onnx,
            onnx-int8, tflite or tflite-int8.
        revision: branch, tag or commit on the hub.
        threads: for ONNX and LiteRT; 0 lets them choose.
        max_seconds: longer recordings are refused.

    Raises:
        UserError: the model is not there, is damaged, or what runs it is not installed.
    """
    return Model(find_folder(model, revision, format), format, threads, max_seconds)


def to_waveform(audio: np.ndarray, rate: int) -> np.ndarray:
    """Samples (n,) or (n, channels), floats of full scale 1 or integers, as 16 kHz mono.

    Raises:
        AudioError: of another shape or type, or see `serkd_jax.audio.waveform.check_audio`.
    """
    if audio.ndim not in (1, 2) or audio.dtype.kind not in "fiu" or audio.size == 0:
        raise AudioError(f"samples of shape {audio.shape} and type {audio.dtype} are no recording")
    if not 1000 <= rate <= 1_000_000:
        raise AudioError(f"samples: a rate of {rate} Hz is none of audio")
    if audio.dtype.kind in "iu":  # unsigned samples swing around the middle, as in 8-bit WAV
        full_scale = 2.0 ** (8 * audio.dtype.itemsize - 1)
        audio = audio / full_scale - (audio.dtype.kind == "u")
    mono = (audio if audio.ndim == 1 else audio.mean(axis=1)).astype(np.float32)
    if rate != SAMPLE_RATE:
        import soxr

        mono = soxr.resample(mono, rate, SAMPLE_RATE, "HQ")
    return check_audio(mono, "samples")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints what each recording sounds like; 1 if any could not be used, or the model not."""
    flags = _parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):  # a file's name need not be UTF-8
        stream.reconfigure(errors="backslashreplace")
    try:
        from tqdm import tqdm

        model = load_model(
            flags.model,
            flags.format,
            revision=flags.revision,
            threads=flags.threads,
            max_seconds=flags.max_seconds,
        )
        recordings = [path for place in flags.recordings for path in _list_audio(Path(place))]
        results = model.predict(recordings, flags.hop, flags.batch_size)
        show = _SHOW[flags.output](model.labels)
        failed = 0
        quiet = len(recordings) < 2 or not sys.stderr.isatty()
        for result in tqdm(results, total=len(recordings), unit="file", disable=quiet):
            failed += isinstance(result, Failure)
            for line, stream in show(result):
                tqdm.write(line, file=stream)
    except ImportError as error:
        print(f"error: reading files needs {error.name}: pip install it", file=sys.stderr)
        return 1
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if failed:
        print(f"{failed} of {len(recordings)} recordings could not be used", file=sys.stderr)
    return int(failed > 0)


def _parser() -> argparse.ArgumentParser:
    # Not absl's flags: a machine that has no JAX need not have absl.
    parser = argparse.ArgumentParser(
        prog="python -m serkd_jax.predict",
        description="Speech emotions of recordings, in any audio or video format.",
        epilog="The exit status is 1 if a recording, or the model, could not be used.",
    )
    parser.add_argument("recordings", nargs="+", metavar="FILE_OR_FOLDER")
    add_model_options(parser, max_seconds=3600)
    parser.add_argument("--hop", type=_positive, help="seconds from window to window")
    parser.add_argument("--batch_size", type=_count, default=16, help="windows at once")
    parser.add_argument("--threads", type=int, default=0, help="of ONNX and LiteRT; 0: theirs")
    parser.set_defaults(output="text")
    output = parser.add_mutually_exclusive_group()
    for name in ("json", "csv"):
        told = {"json": "a JSON object per recording", "csv": "a row per window"}[name]
        output.add_argument(f"--{name}", dest="output", action="store_const", const=name, help=told)
    return parser


def add_model_options(parser: argparse.ArgumentParser, max_seconds: float) -> None:
    """Which model a command loads, and its longest recording."""
    parser.add_argument("--model", required=True, help="exported folder, or name on the hub")
    parser.add_argument("--format", default="safetensors", choices=FILES, help="which of its files")
    parser.add_argument("--revision", help="of the name on the hub")
    told = "longer recordings are refused"
    parser.add_argument("--max_seconds", type=_positive, default=max_seconds, help=told)


def _positive(text: str) -> float:
    """For argparse, which tells of a ValueError by itself."""
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def _list_audio(place: Path) -> list[Path]:
    try:
        if not place.is_dir():
            return [place]
    except OSError:  # a name too long, a folder that is not ours: told with the others
        return [place]
    from serkd_jax.audio.decoding import find_audio

    if not (found := sorted(find_audio(place))):
        raise UserError(f"{place} holds no audio file")
    return found


Lines = Iterator[tuple[str, TextIO]]


def _show_text(labels: Sequence[str]) -> Callable[[Prediction | Failure], Lines]:
    """A line per recording, and below it one per window if there are several."""

    def described(label: str, probabilities: dict[str, float]) -> str:
        ranked = sorted(probabilities.items(), key=lambda item: -item[1])[:3]
        return f"{label:<{width}}  " + ", ".join(f"{name} {p:.2f}" for name, p in ranked)

    def show(result: Prediction | Failure) -> Lines:
        if isinstance(result, Failure):
            yield f"error: {result.error}", sys.stderr
            return
        yield f"{result.source}: {described(result.label, result.probabilities)}", sys.stdout
        if len(result.windows) > 1:
            for start, end, *rest in result.windows:
                yield f"  {start:8.2f} to {end:8.2f} s: {described(*rest)}", sys.stdout

    width = max(map(len, labels))
    return show


def _show_json(labels: Sequence[str]) -> Callable[[Prediction | Failure], Lines]:
    """An object per recording, in one line."""
    del labels

    def show(result: Prediction | Failure) -> Lines:
        values = result._asdict()
        if isinstance(result, Prediction):
            values["windows"] = [window._asdict() for window in result.windows]
        yield json.dumps(values, ensure_ascii=False), sys.stdout

    return show


def _show_csv(labels: Sequence[str]) -> Callable[[Prediction | Failure], Lines]:
    """A header, then a row per window; a recording that could not be used has only an error."""
    rows = [["source", "start", "end", "label", *labels, "error"]]

    def show(result: Prediction | Failure) -> Lines:
        if isinstance(result, Failure):
            rows.append([result.source, "", "", "", *[""] * len(labels), result.error])
        else:
            for start, end, label, probabilities in result.windows:
                values = [f"{p:.6f}" for p in probabilities.values()]
                rows.append([result.source, start, end, label, *values, ""])
        while rows:
            text = io.StringIO()
            csv.writer(text, lineterminator="").writerow(rows.pop(0))
            yield text.getvalue(), sys.stdout

    return show


_SHOW = {"text": _show_text, "json": _show_json, "csv": _show_csv}


if __name__ == "__main__":
    sys.exit(main())

"""Classifies recordings: `python -m serkd_jax.predict --model=DIR FILES AND FOLDERS`.

    from serkd_jax.predict import load_model
    model = load_model("DIR")  # an exported folder, or its name on the Hugging Face hub
    print(model("speech.wav").label)

This needs only NumPy and the runtime of the chosen format: a log-mel student in ONNX runs without
JAX. Reading files also needs soundfile, soxr and av; arrays at 16 kHz do not.
"""

import argparse
import csv
import io
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from serkd_jax.deploy.folder import FILES
from serkd_jax.deploy.model import Failure, Prediction, load_model
from serkd_jax.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints what each recording sounds like; returns 1 if one or the model cannot be used."""
    flags = _parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):  # the name of a file may not be UTF-8
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
    # Not absl's flags, since a machine without JAX may have no absl.
    parser = argparse.ArgumentParser(
        prog="python -m serkd_jax.predict",
        description="Speech emotions of recordings, in any audio or video format.",
        epilog="The exit status is 1 if a recording, or the model, could not be used.",
    )
    parser.add_argument("recordings", nargs="+", metavar="FILE_OR_FOLDER")
    add_model_options(parser, max_seconds=3600)
    parser.add_argument("--hop", type=_positive, help="seconds from one window to the next")
    parser.add_argument("--batch_size", type=_count, default=16, help="windows at once")
    parser.add_argument("--threads", type=int, default=0, help="for ONNX and LiteRT; 0: default")
    parser.set_defaults(output="text")
    output = parser.add_mutually_exclusive_group()
    for name in ("json", "csv"):
        told = {"json": "a JSON object per recording", "csv": "a row per window"}[name]
        output.add_argument(f"--{name}", dest="output", action="store_const", const=name, help=told)
    return parser


def add_model_options(parser: argparse.ArgumentParser, max_seconds: float) -> None:
    """Adds options for the model and for the longest recording."""
    parser.add_argument("--model", required=True, help="exported folder, or name on the hub")
    parser.add_argument(
        "--format", default="safetensors", choices=FILES, help="which of its files to run"
    )
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    told = "longer recordings are refused"
    parser.add_argument("--max_seconds", type=_positive, default=max_seconds, help=told)


def _positive(text: str) -> float:
    """Parses a positive number for argparse, which reports a ValueError."""
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
    except OSError:  # a name that is too long, no permission: reported with the other failures
        return [place]
    from serkd_jax.audio.decoding import find_audio

    if not (found := sorted(find_audio(place))):
        raise UserError(f"{place} holds no audio file")
    return found


Lines = Iterator[tuple[str, TextIO]]


def _show_text(labels: Sequence[str]) -> Callable[[Prediction | Failure], Lines]:
    """Shows a line per recording, and below it one per window if there are several."""

    def described(label: str, probabilities: dict[str, float]) -> str:
        ranked = sorted(probabilities.items(), key=lambda item: -item[1])[:3]
        return f"{label:<{width}}  " + ", ".join(f"{name} {p:.2f}" for name, p in ranked)

    def show(result: Prediction | Failure) -> Lines:
        if isinstance(result, Failure):
            yield f"error: {result.error}", sys.stderr
            return
        for notice in result.notices:
            yield f"note: {result.source}: {notice}", sys.stderr
        yield f"{result.source}: {described(result.label, result.probabilities)}", sys.stdout
        if len(result.windows) > 1:
            for start, end, *rest in result.windows:
                yield f"  {start:8.2f} to {end:8.2f} s: {described(*rest)}", sys.stdout

    width = max(map(len, labels))
    return show


def _show_json(labels: Sequence[str]) -> Callable[[Prediction | Failure], Lines]:
    """Shows an object per recording, on one line."""
    del labels

    def show(result: Prediction | Failure) -> Lines:
        values = result._asdict()
        if isinstance(result, Prediction):
            values["windows"] = [window._asdict() for window in result.windows]
        yield json.dumps(values, ensure_ascii=False), sys.stdout

    return show


def _show_csv(labels: Sequence[str]) -> Callable[[Prediction | Failure], Lines]:
    """Shows a header, then a row per window; recordings that cannot be used have only an error."""
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

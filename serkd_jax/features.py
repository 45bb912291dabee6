"""Extracts features of any audio: `python -m serkd_jax.features --model=M --input=IN --out=DIR`.

M is a HuBERT, wav2vec 2.0, WavLM or Whisper, as its config.json says. IN is a folder or a manifest.
DIR becomes a dataset that `tfds.builder_from_directory` opens; each record has `id` (the path
relative to the input), `features` (frames x width, float16) and `num_frames`. A command that was
killed resumes when it is started again. Several processes can share the work: start the same
command in each, with `--coordinator`.
"""

import json
from pathlib import Path

import jax
from absl import app, flags, logging

from serkd_jax.audio.logmel import FRAME_RATE
from serkd_jax.distributed import parallel, processes
from serkd_jax.errors import UserError, parse_flags

_MODEL = flags.DEFINE_string("model", None, "An encoder: a folder or a name on the hub.")
_REVISION = flags.DEFINE_string("revision", None, "Branch, tag or commit on the hub.")
_INPUT = flags.DEFINE_string(
    "input", None, "A folder of audio files, or a .csv or .jsonl manifest."
)
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Folder to which the manifest's paths are relative."
)
# `serkd_jax.export` has this flag, too, and a process may import both.
_OUT = flags.DEFINE_string("out", None, "The folder to make.", allow_override=True)
_LAYER = flags.DEFINE_string(
    "layer", "-1", "-1: last hidden state, after any final norm; k: layer k; 8,9: their mean."
)
_PAD = flags.DEFINE_bool("pad_to_30s", False, "Whisper: pad every file, as transformers does.")
_MAX_SECONDS = flags.DEFINE_float("max_seconds", 30.0, "Length at which files are cut.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Dtype to compute in.")
_BATCH_FRAMES = flags.DEFINE_integer(
    "batch_frames", 0, "Frames in a device's batch; lower it if memory runs out. 0: default."
)


def main(argv: list[str]) -> None:
    """Extracts the features that are missing, and prints what was skipped."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.WARNING)
    processes.run(_extract)


def _extract() -> None:
    # Slow to import, so only after the flags are parsed.
    from serkd_jax.data.prepare import extract_features, frames_of
    from serkd_jax.data.sources import AudioFiles
    from serkd_jax.encoders.frontends import Pretrained, default_batching

    output = Path(_OUT.value)
    max_frames = frames_of(_MAX_SECONDS.value)
    source = AudioFiles(_INPUT.value, _DATA_DIR.value)
    try:
        layers = [int(layer) for layer in str(_LAYER.value).split(",")]
    except ValueError as error:
        raise UserError(f"layer is {_LAYER.value}: use a number, or several like 8,9") from error
    frontend = Pretrained(
        model=_MODEL.value,
        revision=_REVISION.value,
        layer=layers[0] if len(layers) == 1 else layers,
        dtype=_DTYPE.value,
        pad_to_30s=_PAD.value,
        batching=default_batching()._replace(frames=_BATCH_FRAMES.value)
        if _BATCH_FRAMES.value
        else None,
    )
    try:
        extract_features(source, frontend, max_frames, output, skip_bad=True)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(f"out of memory; lower --batch_frames or --max_seconds: {error}") from error
    if parallel.is_first_process():
        print(_summary(output))


def _summary(folder: Path) -> str:
    """Describes what was extracted and skipped, for people."""
    metadata = json.loads((folder / "metadata.json").read_text())
    lines = [f"{metadata['hours']:.2f} h of audio are in {folder}"]
    if assumption := metadata["frontend_settings"]["assumption"]:
        lines.append(f"assumed: {assumption}")
    if cut := metadata["num_cut"]:
        lines.append(f"{cut} longer files were cut at {metadata['max_frames'] / FRAME_RATE:.0f} s")
    if skipped := metadata["skipped"]:
        lines.append(f"{len(skipped)} files were skipped; all are named in {folder}/metadata.json:")
        lines += [f"  {skip['reason']}" for skip in skipped[:5]]
    return "\n".join(lines)


if __name__ == "__main__":
    flags.mark_flags_as_required(["model", "input", "out"])
    app.run(main, flags_parser=parse_flags)

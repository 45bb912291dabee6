"""Pretrains a log-mel student: `python -m serkd_jax.pretrain --model=M --input=IN --out=DIR`.

A small convolutional encoder learns to predict, from log-mel frames, the hidden states of layer
`--layer` of M, a HuBERT, wav2vec 2.0, WavLM or Whisper. IN is a folder or a manifest of any speech;
labels are not read. `--config.student.kind=convolutional --config.student.pretrained=DIR` starts
students from it. A command that was killed resumes when it is started again.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict

from serkd_jax.distributed import parallel, processes
from serkd_jax.errors import UserError, parse_flags

_MODEL = flags.DEFINE_string(
    "model", None, "An encoder: a folder or a name on the hub.", allow_override=True
)
_REVISION = flags.DEFINE_string(
    "revision", None, "Branch, tag or commit on the hub.", allow_override=True
)
_LAYER = flags.DEFINE_integer("layer", None, "The layer to predict.", allow_override=True)
_INPUT = flags.DEFINE_string(
    "input", None, "A folder of audio files, or a manifest.", allow_override=True
)
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Folder to which the manifest's paths are relative.", allow_override=True
)
_OUT = flags.DEFINE_string("out", None, "The folder to make.", allow_override=True)
_MAX_SECONDS = flags.DEFINE_float(
    "max_seconds", 3.0, "Length at which files are cut.", allow_override=True
)
_NUM_MELS = flags.DEFINE_integer("num_mels", 64, "Number of log-mel bands.")
_WIDTH = flags.DEFINE_integer("width", 192, "Channels of the small encoder.")
_NUM_LAYERS = flags.DEFINE_integer("num_layers", 4, "Its convolutions.")
_KERNEL = flags.DEFINE_integer("kernel", 5, "Frames that a convolution sees.")
_EPOCHS = flags.DEFINE_integer("epochs", 40, "Number of epochs.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Utterances in a step.")
_LEARNING_RATE = flags.DEFINE_float("learning_rate", 2e-3, "Peak of the learning rate.")
_SEED = flags.DEFINE_integer("seed", 0, "Of weights, batches and levels.")

HELD_OUT = 20  # one of so many utterances is for validation
OPTIMIZER = {
    "name": "adamw",
    "beta1": 0.9,
    "beta2": 0.999,
    "weight_decay": 0.01,
    "decayed": "kernels",
    "clip_norm": 1.0,
    "schedule": "cosine",
    "warmup": 0.1,
    "first_cycle": 0.0,
    "final": 0.0,
}


def main(argv: list[str]) -> None:
    """Pretrains what remains to be done, and writes the encoder."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.WARNING)
    processes.run(_pretrain)


def _pretrain() -> None:
    # Slow to import, so only after the flags are parsed.
    from serkd_jax.audio.logmel import num_frames
    from serkd_jax.audio.waveform import SAMPLE_RATE
    from serkd_jax.data.examples import predict_rows, stream_rows
    from serkd_jax.data.prepare import extract_features, open_unlabelled
    from serkd_jax.data.reader import describe
    from serkd_jax.data.sources import AudioFiles
    from serkd_jax.encoders.distilled import Distilled, Sizes, save_distilled
    from serkd_jax.encoders.frontends import LogMel, Pretrained, SideBySide
    from serkd_jax.models.students.convolutional import FrameEncoder
    from serkd_jax.stages.base import make_optimizer, make_schedule
    from serkd_jax.stages.imitation import Pretraining, PretrainState
    from serkd_jax.stages.standardization import measure_statistics
    from serkd_jax.training import Training, train

    out, seed = Path(_OUT.value), _SEED.value
    if not 0.025 <= _MAX_SECONDS.value <= 3600:
        raise UserError(f"max_seconds is {_MAX_SECONDS.value:g}: use 0.025, one frame, to 3600")
    large = Pretrained(_MODEL.value, _REVISION.value, layer=_LAYER.value)
    frontend = SideBySide(LogMel(_NUM_MELS.value), large)
    sizes = Sizes(_NUM_MELS.value, _WIDTH.value, _NUM_LAYERS.value, _KERNEL.value, large.width)
    frames = num_frames(round(_MAX_SECONDS.value * SAMPLE_RATE))
    source = AudioFiles(_INPUT.value, _DATA_DIR.value)
    extract_features(source, frontend, frames, out / "features", skip_bad=True)
    devices = parallel.choose_devices(0, {"batch_size": _BATCH_SIZE.value})
    examples = open_unlabelled(out / "features", frames, devices)
    rows = np.random.default_rng(seed).permutation(len(examples.columns["length"]))
    held_out, rows = np.split(rows, [max(len(rows) // HELD_OUT, 1)])
    if not len(rows):
        raise UserError(f"{_INPUT.value} has only one utterance: name more speech")
    members = np.isin(np.arange(len(rows) + len(held_out)), rows)[None]
    (statistics,) = measure_statistics(examples.chunks(), members)

    steps_per_epoch = -(-len(rows) // _BATCH_SIZE.value)
    optimizer = ConfigDict(OPTIMIZER)
    schedule = optimizer, _LEARNING_RATE.value, _EPOCHS.value * steps_per_epoch
    pretraining = Pretraining(
        FrameEncoder(_WIDTH.value, _NUM_LAYERS.value, _KERNEL.value, large.width),
        _NUM_MELS.value,
        make_optimizer(*schedule),
    )
    resident = examples.read is None
    errors = parallel.compile_predict(pretraining.errors, devices, shared_data=resident)

    def validate(state: PretrainState) -> dict[str, float]:
        """The share of the held-out hidden states' variance that is predicted."""
        found = predict_rows(errors, state, examples, held_out, _BATCH_SIZE.value)
        return {"r2": 1 - float(found.mean())}

    def take(steps: range) -> tuple[Any, Any]:
        numbers = [*steps, *[steps[-1]] * (count - len(steps))]
        wanted = [stream_rows(rows, _BATCH_SIZE.value, range(k, k + 1), [seed]) for k in numbers]
        return examples.take(np.concatenate(wanted))

    count = min(32, steps_per_epoch)
    state = train(
        Training(
            title="pretraining",
            epochs=_EPOCHS.value,
            steps_per_epoch=steps_per_epoch,
            steps_per_dispatch=count,
            devices=devices,
            init=lambda: pretraining.init(jax.random.key(seed), statistics),
            frozen=statistics,
            steps=parallel.compile_steps(
                lambda axis: functools.partial(pretraining.step, axis=axis),
                devices,
                shared_data=resident,
            ),
            take=take,
            validate=validate,
            selection_metric="last",
            rng=jax.random.key(seed + 1),
            learning_rate=make_schedule(*schedule),
            shown="r2",
        ),
        out / "training",
    )
    if parallel.is_first_process():
        r2 = validate(state)["r2"]
        about = {"predicts": large.settings, "utterances": len(rows), "r2": round(r2, 4)}
        bands = slice(_NUM_MELS.value)
        made = Distilled(
            sizes, jax.device_get(state.params), statistics.mean[bands], statistics.spread[bands]
        )
        save_distilled(out, made, about)
        print(f"{out} predicts {100 * r2:.1f} % of the variance of held-out hidden states.")
        if skipped := describe(out / "features").metadata["skipped"]:
            count = len(skipped) + len(rows) + len(held_out)
            print(
                f"{len(skipped)} of {count} files were skipped, the first: {skipped[0]['reason']}"
            )


if __name__ == "__main__":
    flags.mark_flags_as_required(["model", "layer", "input", "out"])
    app.run(main, flags_parser=parse_flags)

"""Pretrains a log-mel student: `python -m serkd_jax.pretrain --model=M --input=IN --out=DIR`.

A small convolutional encoder learns to predict, from log-mel frames, the hidden states of layer
`--layer` of M, a HuBERT, wav2vec 2.0, WavLM or Whisper. IN is a folder or a manifest of any speech;
labels are not read. `--config.student.kind=convolutional --config.student.pretrained=DIR` starts
students from it. A command that was killed resumes when it is started again.
"""

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict

from serkd_jax.distributed import parallel, processes
from serkd_jax.errors import UserError, differences, parse_flags

if TYPE_CHECKING:
    from serkd_jax.data.examples import Examples
    from serkd_jax.encoders.frontends import Pretrained

# `serkd_jax.features` and others have some of these flags, too; a process may import both.
_define_text = functools.partial(flags.DEFINE_string, allow_override=True)
_MODEL = _define_text("model", None, "An encoder: a folder or a name on the hub.")
_REVISION = _define_text("revision", None, "Branch, tag or commit on the hub.")
_INPUT = _define_text("input", None, "A folder of audio files, or a .csv or .jsonl manifest.")
_DATA_DIR = _define_text("data_dir", None, "Folder to which the manifest's paths are relative.")
_OUT = _define_text("out", None, "The folder to make.")
_LAYER = flags.DEFINE_integer("layer", None, "The layer to predict.", allow_override=True)
_MAX_SECONDS = flags.DEFINE_float(
    "max_seconds", 3.0, "Length at which files are cut.", allow_override=True
)
_NUM_MELS = flags.DEFINE_integer("num_mels", 64, "Number of log-mel bands.", 1, 256)
_WIDTH = flags.DEFINE_integer("width", 192, "Channels of the small encoder.", 1, 4096)
_NUM_LAYERS = flags.DEFINE_integer("num_layers", 4, "Its convolutions.", 1, 100)
_KERNEL = flags.DEFINE_integer("kernel", 5, "Frames that a convolution sees, odd.", 1, 99)
_EPOCHS = flags.DEFINE_integer("epochs", 40, "Number of epochs.", 1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Utterances in a step.", 1, 65_536)
_LEARNING_RATE = flags.DEFINE_float("learning_rate", 2e-3, "Peak of the learning rate.", 0)
_SEED = flags.DEFINE_integer("seed", 0, "Of weights, batches and levels.", 0, 2**31)

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
    from serkd_jax.data.prepare import frames_of
    from serkd_jax.encoders.distilled import Distilled, Sizes, save_distilled
    from serkd_jax.encoders.frontends import LogMel, Pretrained
    from serkd_jax.stages.standardization import measure_statistics

    frames = frames_of(_MAX_SECONDS.value)
    if _KERNEL.value % 2 == 0:
        raise UserError(f"kernel is {_KERNEL.value}: use an odd number of frames")
    bands, out = _NUM_MELS.value, Path(_OUT.value)
    large = Pretrained(_MODEL.value, _REVISION.value, layer=_LAYER.value)
    beside = dataclasses.replace(large, beside=LogMel(bands))
    examples, skipped = _open_speech(beside, frames, out / "features")
    count = len(examples.columns["length"])
    held_out = max(count // HELD_OUT, 1)
    if held_out == count:
        raise UserError(f"{_INPUT.value} has only one utterance: name more speech")
    rows = np.random.default_rng(_SEED.value).permutation(count)
    held_out, rows = np.split(rows, [held_out])
    members = np.isin(np.arange(count), rows)[None]
    (statistics,) = measure_statistics(examples.chunks(), members)
    sizes = Sizes(bands, _WIDTH.value, _NUM_LAYERS.value, _KERNEL.value, large.width)
    _claim(out, dataclasses.asdict(sizes))
    params, r2 = _train(sizes, examples, rows, held_out, statistics, out / "training")
    if parallel.is_first_process():
        about = {"predicts": large.settings, "utterances": len(rows), "r2": round(r2, 4)}
        mean, spread = statistics.mean[:bands], statistics.spread[:bands]
        save_distilled(out, Distilled(sizes, params, mean, spread), about)
        print(f"{out} predicts {100 * r2:.1f} % of the variance of held-out hidden states.")
        if skipped:
            reason, number = skipped[0]["reason"], len(skipped)
            print(f"{number} of {number + count} files were skipped, the first: {reason}")


def _claim(out: Path, sizes: dict[str, int]) -> None:
    """Refuses a folder in which another encoder was trained; that of other features is refused too.

    Raises:
        UserError: names what differs.
    """
    from serkd_jax.files import read_json, write_json

    values = {"epochs": _EPOCHS, "batch_size": _BATCH_SIZE, "learning_rate": _LEARNING_RATE}
    mine = sizes | {name: flag.value for name, flag in (values | {"seed": _SEED}).items()}
    path = out / "settings.json"
    if (out / "training").exists() and path.exists():
        theirs = read_json(path, f"delete {out}")
        if differ := differences(theirs, mine, mine):
            raise UserError(
                f"{out} holds another pretraining ({', '.join(differ)}): use another --out"
            )
    parallel.wait_for_processes("pretraining claimed")
    if parallel.is_first_process():
        write_json(path, mine)


def _open_speech(
    frontend: "Pretrained", frames: int, folder: Path
) -> tuple["Examples", list[dict[str, str]]]:
    """Extracts the features that are missing; returns the examples, and what was skipped."""
    from serkd_jax.data.prepare import extract_features, open_unlabelled
    from serkd_jax.data.reader import describe
    from serkd_jax.data.sources import AudioFiles

    source = AudioFiles(_INPUT.value, _DATA_DIR.value)
    extract_features(source, frontend, frames, folder, skip_bad=True)
    devices = parallel.choose_devices(0, {"batch_size": _BATCH_SIZE.value})
    return open_unlabelled(folder, frames, devices), describe(folder).metadata["skipped"]


def _train(
    sizes: Any,
    examples: "Examples",
    rows: np.ndarray,
    held_out: np.ndarray,
    statistics: Any,
    folder: Path,
) -> tuple[Any, float]:
    """Trains what remains; returns the parameters, and R² of the hidden states that are held out.

    Args:
        sizes: the sizes of the encoder.
        examples: all utterances.
        rows: those to train on.
        held_out: those to validate on.
        statistics: of the frames of `rows`.
        folder: the folder for checkpoints and metrics.
    """
    from serkd_jax.data.examples import predict_rows, stream_rows
    from serkd_jax.models.students.convolutional import FrameEncoder
    from serkd_jax.stages.base import make_optimizer, make_schedule
    from serkd_jax.stages.imitation import Pretraining, PretrainState
    from serkd_jax.training import Training, train

    batch, seed, devices = _BATCH_SIZE.value, _SEED.value, examples.devices
    steps_per_epoch = -(-len(rows) // batch)
    schedule = ConfigDict(OPTIMIZER), _LEARNING_RATE.value, _EPOCHS.value * steps_per_epoch
    encoder = FrameEncoder(sizes.width, sizes.num_layers, sizes.kernel, sizes.outputs)
    pretraining = Pretraining(encoder, sizes.num_mels, make_optimizer(*schedule))
    resident, count = examples.read is None, min(32, steps_per_epoch)
    errors = parallel.compile_predict(pretraining.errors, devices, shared_data=resident)

    def validate(state: PretrainState) -> dict[str, float]:
        """The share of the held-out hidden states' variance that is predicted."""
        return {"r2": 1 - float(predict_rows(errors, state, examples, held_out, batch).mean())}

    def take(steps: range) -> tuple[Any, Any]:
        taken = stream_rows(rows, batch, steps, [seed])
        return examples.take(np.pad(taken, ((0, count - len(steps)), (0, 0)), mode="edge"))

    training = Training(
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
    )
    state = train(training, folder)
    return jax.device_get(state.params), validate(state)["r2"]


if __name__ == "__main__":
    flags.mark_flags_as_required(["model", "layer", "input", "out"])
    app.run(main, flags_parser=parse_flags)

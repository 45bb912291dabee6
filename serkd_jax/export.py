"""Exports a trained student: `python -m serkd_jax.export --workdir=W --fold=K --out=DIR`.

DIR becomes a folder that runs without checkpoints and TensorFlow, and that is a valid model
repository for the Hugging Face hub. Every format is run on the fold's test utterances, and the
model card says how it compares with the student in Flax.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from absl import app, flags, logging
from tqdm import tqdm

from serkd_jax.deploy import folder as files
from serkd_jax.deploy.backends import at_most, load_classifier
from serkd_jax.deploy.card import UNTOLD, Checked, Told, write_card
from serkd_jax.deploy.formats import write_format
from serkd_jax.deploy.trained import STUDENT_ROWS, Trained, load_test_inputs, load_trained
from serkd_jax.encoders.checkpoint import save_encoder
from serkd_jax.encoders.frontends import Pretrained
from serkd_jax.errors import UserError, parse_flags, told_in_one_line
from serkd_jax.files import write_file
from serkd_jax.results.metrics import classification_metrics

BATCH = 16  # utterances that are checked at once

_WORKDIR = flags.DEFINE_string("workdir", None, "Workdir of a finished run.")
_FOLD = flags.DEFINE_string("fold", "1", "Fold whose model to export.")
_ROW = flags.DEFINE_enum("row", STUDENT_ROWS[0], STUDENT_ROWS, "Which of its students to export.")
# `serkd_jax.features` has this flag, too, and a process may import both.
_OUT = flags.DEFINE_string("out", None, "The folder to make.", allow_override=True)
_FORMAT = flags.DEFINE_list(
    "format",
    ["safetensors"],
    f"all, or some of {', '.join(files.FILES)}; the first is always written.",
)
_CACHE_DIR = flags.DEFINE_string("cache_dir", None, "Cache of the features, if not the run's own.")
_CARD = {
    "name": flags.DEFINE_string("name", "", "The model's name on its card."),
    "data": flags.DEFINE_string("data", "", "What the corpus is, for the card: 'nEMO (Polish)'."),
    "license": flags.DEFINE_string("license", "", "Licence of the weights, as the hub has it."),
    "terms": flags.DEFINE_string("terms", "", "Sentences about that licence, for the card."),
}
_CHECK = flags.DEFINE_bool("check", True, "Run every format on the fold's test utterances.")


def main(argv: list[str]) -> None:
    """Exports, and prints how each format compares with the student in Flax."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.WARNING)
    formats = list(files.FILES) if _FORMAT.value == ["all"] else _FORMAT.value
    out = Path(_OUT.value)
    with told_in_one_line():
        trained = load_trained(Path(_WORKDIR.value), _FOLD.value, _ROW.value)
        inputs = load_test_inputs(trained, _CACHE_DIR.value) if _CHECK.value else None
        export(trained, out, formats, inputs, Told(**{k: flag.value for k, flag in _CARD.items()}))
    print((out / files.CARD).read_text().partition("## Files\n\n")[2].partition("\n\n## ")[0])
    print(f"Written to {out}")


def export(
    trained: Trained,
    folder: Path,
    formats: Sequence[str],
    test_inputs: tuple[np.ndarray, np.ndarray] | None,
    told: Told = UNTOLD,
) -> list[Checked]:
    """Writes the folder: configuration, weights, model card, and the requested formats.

    Args:
        trained: the student.
        folder: a new folder, or that of an earlier export of this student, whose files are
            replaced.
        formats: names in `FILES`; safetensors is always written.
        test_inputs: inputs of the fold's test utterances, from `load_test_inputs`; None to check
            nothing.
        told: what the card cannot know from the run.

    Returns:
        How each format compares on the test utterances.

    Raises:
        UserError: a format is unknown, its converter is not installed, or the folder holds
            something else.
    """
    if unknown := [form for form in formats if form not in files.FILES]:
        raise UserError(f"there is no format {unknown[0]!r}: use {', '.join(files.FILES)} or all")
    config = folder / files.CONFIG
    used = folder.is_dir() and any(folder.iterdir())
    if used and not (config.exists() and config.read_text() == trained.config.to_json()):
        raise UserError(f"{folder} holds something else: name another --out, or delete it")
    folder.mkdir(parents=True, exist_ok=True)
    write_file(config, trained.config.to_json())
    frontend = trained.frontend
    if isinstance(frontend, Pretrained) and trained.config.frontend["model"] is None:
        save_encoder(frontend.checkpoint, folder / files.FRONTEND)
    wanted = [form for form in files.FILES if form == "safetensors" or form in formats]
    for form in tqdm(wanted, "formats", unit="format", disable=None):
        write_format(form, folder, trained.config, trained.variables)
    for form in files.FILES.keys() - wanted:  # they may have other weights
        (folder / files.FILES[form]).unlink(missing_ok=True)
    checked = list(_check(trained, folder, wanted, *test_inputs)) if test_inputs else []
    write_file(folder / files.CARD, write_card(trained, folder, checked, told))
    return checked


def _check(
    trained: Trained,
    folder: Path,
    formats: Sequence[str],
    features: np.ndarray,
    num_frames: np.ndarray,
) -> Iterator[Checked]:
    """Compares the logits of each file and of the run with those of the first file, in Flax."""
    predictions = trained.predictions[trained.fold]
    labels, expected = predictions["label"], None
    for form in tqdm([*formats, "run"], "checks", unit="format", disable=None):
        if form == "run":
            logits = predictions[trained.row]
        else:
            classify = at_most(BATCH, load_classifier(folder, trained.config, form))
            logits = classify(features, num_frames)
        if expected is None:
            expected = logits
        scores = classification_metrics(labels, logits.argmax(-1), len(trained.config.labels))
        agreement = np.mean(logits.argmax(-1) == expected.argmax(-1))
        yield Checked(form, float(np.abs(logits - expected).max()), float(agreement), scores["ua"])


if __name__ == "__main__":
    flags.mark_flags_as_required(["workdir", "out"])
    app.run(main, flags_parser=parse_flags)

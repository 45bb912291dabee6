"""A linear SVM on the mean and deviation over time of features: the baseline of every table.

    python -m benchmarks.linear_probe --features=FOLDER

`FOLDER` holds feature records of any front-end, from `serkd_jax.features` or a run's cache. Where
they have no label and speaker, `--manifest=FILE`, or `--corpus=emodb --data_dir=DIR` for a corpus
that we read, says who speaks and how. One speaker at a time is tested on, the others are trained
on, their vectors standardised; `--splits=W/splits.json` takes the folds of a run instead, all that
it does not test on for training.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from absl import app, flags
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from serkd_jax.errors import UserError
from serkd_jax.metrics import bootstrap_intervals, classification_metrics

_FEATURES = flags.DEFINE_string("features", None, "A folder of feature records.", required=True)
_MANIFEST = flags.DEFINE_string("manifest", "", "Has the label and speaker of each file.")
_CORPUS = flags.DEFINE_string("corpus", "manifest", "Or a corpus by name.")
_DATA_DIR = flags.DEFINE_string("data_dir", "", "Where its recordings, or the manifest's, are.")
_SPLITS = flags.DEFINE_string("splits", "", "The splits.json of a run: its folds.")
_C = flags.DEFINE_float("c", 0.001, "Of the SVM.")
_JSON = flags.DEFINE_bool("json", False, "End with one line of JSON.")


def main(argv: list[str]) -> None:
    """Prints the scores."""
    del argv
    try:
        ids, vectors, labels, speakers = load(Path(_FEATURES.value))
        groups = list(folds(ids, speakers, _SPLITS.value))
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    classes, numbers = np.unique(labels, return_inverse=True)
    tested, predicted = probe(vectors, numbers, groups, _C.value)
    scores = classification_metrics(numbers[tested], predicted, len(classes))
    intervals = bootstrap_intervals(scores["confusion"])
    print(
        f"Linear SVM, C {_C.value:g}, mean and deviation of {vectors.shape[1] // 2} features; "
        f"{len(tested)} utterances, {len(groups)} folds, {len(classes)} classes"
    )
    print("| UA | WA | wF1 |")
    print("|---|---|---|")
    cells = [
        f"{100 * scores[name]:.1f} ({100 * low:.1f} to {100 * high:.1f})"
        for name, (low, high) in intervals.items()
    ]
    print(f"| {' | '.join(cells)} |")
    if _JSON.value:
        print(json.dumps({name: scores[name] for name in ("ua", "wa", "wf1", "n")}))


def probe(
    vectors: np.ndarray,
    labels: np.ndarray,
    groups: Sequence[tuple[np.ndarray, np.ndarray]],
    c: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Trains and tests on every fold.

    Args:
        vectors: (n, D) float.
        labels: (n,) int.
        groups: of each fold, the rows to train on and those to test on.
        c: of the SVM; smaller is more regularised.

    Returns:
        The rows that were tested, and the class predicted for each.
    """
    predicted = []
    for train, test in groups:
        svm = make_pipeline(StandardScaler(), LinearSVC(C=c, random_state=0, max_iter=20_000))
        predicted.append(svm.fit(vectors[train], labels[train]).predict(vectors[test]))
    return np.concatenate([test for _, test in groups]), np.concatenate(predicted)


def pool(features: np.ndarray) -> np.ndarray:
    """(frames, N) to (2 N,): mean and standard deviation over time."""
    features = features.astype(np.float64)
    return np.concatenate([features.mean(0), features.std(0)])


def load(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Ids, (n, 2 N) vectors, labels and speakers of the utterances, by id.

    Raises:
        UserError: an utterance has no label or no speaker.
    """
    from serkd_jax.data import records  # needs TensorFlow

    features = records.load_info(folder).features
    known = [name for name in ("label", "speaker") if name in features]
    listed = _listed() if _MANIFEST.value or _CORPUS.value != "manifest" else {}
    rows = []
    for example in records.read_examples(folder, ["id", "features", *known]):
        key = example["id"]
        label, speaker = listed.get(key) or (example.get("label", ""), example.get("speaker", ""))
        if "label" in known and not listed and not isinstance(label, str):
            label = features["label"].names[label]
        if not label or not speaker:
            raise UserError(
                f"{folder}: {key} has no label or speaker: name a --manifest with path, label and "
                "speaker, or a --corpus and its --data_dir"
            )
        rows.append((key, pool(example["features"]), label, speaker))
    rows.sort(key=lambda row: row[0])
    return tuple(np.array(column) for column in zip(*rows, strict=True))


def _listed() -> dict[str, tuple[str, str]]:
    """Label and speaker, by the id and by the path as seen from the corpus's folder."""
    from serkd_jax.data import corpora

    settings = {"manifest": _MANIFEST.value, "data_dir": _DATA_DIR.value}
    listed = {}
    for utterance in corpora.make_corpus(_CORPUS.value, **settings).list_utterances():
        folder = Path(_DATA_DIR.value or Path(_MANIFEST.value).parent).absolute()
        path = Path(utterance.path).absolute()
        names = [utterance.id]
        names += [path.relative_to(folder).as_posix()] if path.is_relative_to(folder) else []
        listed |= dict.fromkeys(names, (utterance.label, utterance.speaker))
    return listed


def folds(
    ids: np.ndarray, speakers: np.ndarray, splits: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of each fold, the rows to train on and to test on: of a run, or one speaker at a time."""
    if splits:
        tests = [
            np.isin(ids, fold["test"]) for fold in json.loads(Path(splits).read_text()).values()
        ]
    else:
        tests = [speakers == speaker for speaker in np.unique(speakers)]
    for test in tests:
        if not test.any() or test.all():
            raise UserError("a fold has nobody to test on, or nobody to train on")
        yield np.flatnonzero(~test), np.flatnonzero(test)


if __name__ == "__main__":
    app.run(main)

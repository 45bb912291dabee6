"""A linear SVM on the mean and deviation of features over time: the baseline of every table.

    python -m benchmarks.linear_probe --features=FOLDER

`FOLDER` holds feature records of any front-end, from `serkd_jax.features` or a run's cache. If they
have no label and speaker, give `--manifest=FILE`, or `--corpus=emodb --data_dir=DIR` for a corpus
that we read. Each speaker in turn is tested on and the others are trained on, with standardised
vectors. `--splits=W/splits.json` uses the folds of a run instead, and trains on everything that a
fold does not test on.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from serkd_jax.data.reader import describe, read_examples
from serkd_jax.errors import UserError
from serkd_jax.results.intervals import bootstrap
from serkd_jax.results.predictions import score
from serkd_jax.results.probe import C, decide, pool


def main() -> None:
    """Prints the scores."""
    options = parse_options()
    try:
        listed = list_utterances(options.corpus, options.manifest, options.data_dir)
        ids, vectors, labels, speakers = load(options.features, listed)
        groups = list(folds(ids, speakers, options.splits))
    except (UserError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    classes, numbers = np.unique(labels, return_inverse=True)
    decided = {
        str(k): {
            "ids": ids[test],
            "label": numbers[test],
            "linear_probe": decide(vectors, numbers, train, test, options.c),
        }
        for k, (train, test) in enumerate(groups, 1)
    }
    scores = score(decided)["overall"]["linear_probe"]
    intervals = bootstrap(decided)["linear_probe"]
    print(
        f"Linear SVM, C {options.c:g}, mean and deviation of {vectors.shape[1] // 2} features; "
        f"{scores['n']} utterances, {len(groups)} folds, {len(classes)} classes"
    )
    print("| UA | WA | wF1 |")
    print("|---|---|---|")
    cells = [
        f"{100 * scores[name]:.1f} ({100 * low:.1f} to {100 * high:.1f})"
        for name, (low, high) in intervals.items()
    ]
    print(f"| {' | '.join(cells)} |")
    if options.json:
        print(json.dumps({name: scores[name] for name in ("ua", "wa", "wf1", "n")}))


def parse_options() -> argparse.Namespace:
    """The command line; not absl's flags, so that tests can import this with other commands."""
    parser = corpus_parser(__doc__)
    parser.add_argument("--splits", default="", help="the splits.json of a run, to use its folds")
    parser.add_argument("--c", type=float, default=C, help="C of the SVM")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    return parser.parse_args()


def corpus_parser(description: str) -> argparse.ArgumentParser:
    """A parser for a folder of features, its speakers and its labels; see `list_utterances`."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--features", type=Path, required=True, help="folder of feature records")
    parser.add_argument("--manifest", default="", help="has the label and speaker of each file")
    parser.add_argument("--corpus", default="manifest", help="or the name of a corpus")
    parser.add_argument("--data_dir", default="", help="folder of the corpus's or manifest's files")
    return parser


def load(
    folder: Path, listed: dict[str, tuple[str, str]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Ids, (n, 2 N) vectors, labels and speakers of the utterances, sorted by id.

    Args:
        folder: holds feature records.
        listed: label and speaker by id, if the records have none.

    Raises:
        UserError: an utterance has no label or no speaker.
    """
    rows = [
        (key, pool(features), *speech) for key, features, *speech in read_labelled(folder, listed)
    ]
    rows.sort(key=lambda row: row[0])
    return tuple(np.array(column) for column in zip(*rows, strict=True))


def read_labelled(
    folder: Path, listed: dict[str, tuple[str, str]]
) -> Iterator[tuple[str, np.ndarray, str, str]]:
    """Id, (frames, N) features, label and speaker of each utterance; arguments as in `load`."""
    described = describe(folder)
    known = [name for name in ("label", "speaker") if name in described.fields]
    for example in read_examples(folder, ["id", "features", *known]):
        key, label = example["id"], example.get("label", "")
        if not isinstance(label, str):  # a number, in the records of a run
            label = described.class_names[label]
        label, speaker = listed.get(key) or (label, example.get("speaker", ""))
        if not label or not speaker:
            raise UserError(
                f"{folder}: {key} has no label or speaker: name a --manifest with path, label and "
                "speaker, or a --corpus and its --data_dir"
            )
        yield key, example["features"], label, speaker


def list_utterances(corpus: str, manifest: str, data_dir: str) -> dict[str, tuple[str, str]]:
    """Label and speaker, by id and by the path relative to the corpus's folder."""
    if corpus == "manifest" and not manifest:
        return {}
    from serkd_jax.data import corpora

    folder, listed = Path(data_dir or Path(manifest).parent).absolute(), {}
    made = corpora.make_corpus(corpus, manifest=manifest, data_dir=data_dir)
    for utterance in made.list_utterances():
        path = Path(utterance.path).absolute()
        names = [utterance.id]
        names += [path.relative_to(folder).as_posix()] if path.is_relative_to(folder) else []
        listed |= dict.fromkeys(names, (utterance.label, utterance.speaker))
    return listed


def folds(
    ids: np.ndarray, speakers: np.ndarray, splits: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The rows to train and to test on, for each fold of a run, or for one speaker at a time."""
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
    main()

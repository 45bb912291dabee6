"""Test folds, the parts of their training data, and speakers that are in both."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from serkd_jax.data.tables import DIFFER, is_no_name, plain, tidy
from serkd_jax.errors import UserError, some_of

VALIDATION_NAMES = ("validation", "valid", "val", "dev")
PARTS = ("train", "quiz", "reward", "validation", "test")
# Protocols that test on speakers that the models have never heard.
SPEAKER_INDEPENDENT = ("speaker", "session")


@dataclass(frozen=True)
class Fold:
    """Row numbers of one fold's parts; no row is in two of them.

    Attributes:
        name: `1`, `2`, ...
        held_out: a description of the test part, for people.
        train: rows on which the stages train.
        quiz: rows of the training data to which the meta-teacher is fitted, but no student.
        reward: rows of the training data to which nothing is fitted; they reward the policy.
        validation: rows on which epochs are selected.
        test: rows that are scored once, at the end.
    """

    name: str
    held_out: str
    train: np.ndarray
    quiz: np.ndarray
    reward: np.ndarray
    validation: np.ndarray
    test: np.ndarray

    @property
    def parts(self) -> dict[str, np.ndarray]:
        """The parts by name."""
        return {part: getattr(self, part) for part in PARTS}


def make_folds(
    labels: np.ndarray,
    columns: dict[str, Sequence[str]],
    config: ConfigDict,
    class_names: Sequence[str] = (),
) -> list[Fold]:
    """Makes the folds that a protocol asks for, and checks them.

    Args:
        labels: (n,) int, the classes.
        columns: `id`, `speaker`, `session`, `fold` and `split`, n strings each.
        config: the config's `protocol` part. `split_by` is one of: `speaker`, `session` or `fold`,
            to hold out `groups_per_fold` of that column's values in turn; `split`, for one fold by
            the corpus's own train, dev and test; `random`, for `num_folds` stratified folds that
            ignore speakers; `file`, to read the folds from `file`, which `folds_as_json` made.
            Of what is not tested, `training_share` is used, stratified by class. `validation` and
            `quiz` are shares of this training data, stratified likewise; with
            `speakers_apart` their speakers do not occur in the rest of the training data. Half of
            `quiz` becomes the reward part. `seed` is the seed of all that is drawn.
        class_names: what messages call the classes; their numbers if it is empty.

    Raises:
        UserError: a column is missing or has only one value, a part would be empty, or the test
            part has an utterance, or in a speaker-independent protocol a speaker, that is trained
            on.
    """
    if len(np.unique(labels)) < 2:
        raise UserError("all utterances are of one class: there is nothing to tell apart")
    if config.groups_per_fold < 1 or config.num_folds < 2:
        raise UserError("protocol.groups_per_fold must be at least 1 and num_folds at least 2")
    if config.split_by == "file":
        folds = _read_folds(config.file, columns["id"])
    else:
        folds = _draw_folds(labels, columns, config)
    speakers = np.asarray(columns["speaker"])
    for fold in folds:
        _check_parts(fold, labels, columns["id"], class_names)
        if config.split_by in SPEAKER_INDEPENDENT and (both := _heard_before(fold, speakers)):
            raise UserError(
                f"fold {fold.name} ({fold.held_out}): speakers {some_of(both)} are in both "
                "training and test. For a protocol that is not speaker-independent, use "
                "split_by=fold, split or random"
            )
    return folds


def folds_as_json(folds: Sequence[Fold], ids: np.ndarray) -> str:
    """Returns the folds as JSON: fold name -> {held_out, and for each part the list of its ids}."""
    described = {
        fold.name: {"held_out": fold.held_out}
        | {part: ids[rows].tolist() for part, rows in fold.parts.items()}
        for fold in folds
    }
    return json.dumps(described, indent=1, ensure_ascii=False) + "\n"


def speaker_note(folds: Sequence[Fold], speakers: Sequence[str]) -> str:
    """Says what a reader of the scores must know about speakers in both training and test."""
    speakers = np.asarray(speakers)
    shared = [_heard_before(fold, speakers) for fold in folds]
    unknown = sum(map(is_no_name, speakers.tolist()))
    if unknown and not any(shared):
        return (
            f"{unknown:,} of {len(speakers):,} utterances have no speaker: whether test speakers "
            "are also trained on could not be checked."
        )
    if not any(shared):
        for fold in folds:
            if twins := _twins(fold, speakers):
                return (
                    f"WARNING: fold {fold.name} tests {twins[0][0]!r} and trains on "
                    f"{twins[0][1]!r}, which {DIFFER}. If they are one person, the scores are not "
                    "speaker-independent: give each person one name."
                )
        return "No test speaker is trained on: the scores are speaker-independent."
    first = next(k for k, both in enumerate(shared) if both)
    there = len(set(speakers[folds[first].test].tolist()) - {""})
    return (
        f"In {sum(map(bool, shared))} of {len(folds)} fold(s), test speakers are also trained on "
        f"(fold {folds[first].name}: {len(shared[first])} of {there}): the scores are not "
        "speaker-independent."
    )


def _draw_folds(
    labels: np.ndarray, columns: dict[str, Sequence[str]], config: ConfigDict
) -> list[Fold]:
    if config.split_by == "split":
        parts = [_official_split(columns["split"])]
    elif config.split_by == "random":
        part = _deal(labels, config.num_folds, np.random.default_rng([config.seed, 1]))
        parts = [
            (f"random part {k + 1}", np.flatnonzero(part == k), None)
            for k in range(config.num_folds)
        ]
    elif config.split_by in ("speaker", "session", "fold"):
        parts = _groups(config.split_by, columns[config.split_by], config.groups_per_fold)
    else:
        raise UserError(
            f"protocol.split_by is {config.split_by!r}: use speaker, session, fold, split, random "
            "or file"
        )
    speakers = np.asarray(columns["speaker"]) if config.speakers_apart else None
    if speakers is not None:
        _refuse_empty("speakers_apart=True", "speaker", speakers)
    folds = []
    for number, (held_out, test, validation) in enumerate(parts, start=1):
        # A generator per fold: the draws of other folds depend on the labels of this test part.
        rng = np.random.default_rng([config.seed, 1, number])
        taken = test if validation is None else np.concatenate([test, validation])
        train = np.setdiff1d(np.arange(len(labels)), taken)
        if config.training_share < 1:
            train = _draw_share(train, labels, None, config.training_share, rng)
        if validation is None:
            validation = _draw_share(train, labels, speakers, config.validation, rng)
        train = np.setdiff1d(train, validation)
        quiz = _draw_share(train, labels, speakers, config.quiz, rng)
        train = np.setdiff1d(train, quiz)
        half = _deal(labels[quiz], 2, rng)
        quiz, reward = quiz[half == 0], quiz[half == 1]
        folds.append(Fold(str(number), held_out, train, quiz, reward, validation, test))
    return folds


def _groups(column: str, values: Sequence[str], groups_per_fold: int) -> list[tuple]:
    """Makes test parts that each hold out `groups_per_fold` of the column's values."""
    values = np.asarray(values)
    _refuse_empty(f"split_by={column}", column, values)
    # Sorted by number, so that fold 10 comes after fold 9.
    names = sorted(set(values.tolist()), key=lambda n: (int(n) if n.isdecimal() else 0, n))
    if len(names) <= groups_per_fold:
        raise UserError(
            f"cannot hold out {groups_per_fold} {column}(s): the corpus has only {len(names)} "
            f"({some_of(names)}). Use protocol.split_by=random or split"
        )
    chunks = [names[i : i + groups_per_fold] for i in range(0, len(names), groups_per_fold)]
    return [
        (f"{column} {some_of(chunk)}", np.flatnonzero(np.isin(values, chunk)), None)
        for chunk in chunks
    ]


def _official_split(values: Sequence[str]) -> tuple:
    """Returns the corpus's own test part, and its validation part if it has one."""
    values = np.asarray([v.lower() for v in values])
    _refuse_empty("split_by=split", "split", values)
    unknown = sorted(set(values.tolist()) - {"train", "test", *VALIDATION_NAMES})
    if unknown:
        raise UserError(
            f"protocol.split_by=split, but the split column has {some_of(unknown)}: "
            f"use train, test and {VALIDATION_NAMES[0]}"
        )
    validation = np.flatnonzero(np.isin(values, VALIDATION_NAMES))
    test = np.flatnonzero(values == "test")
    return "the test split", test, validation if len(validation) else None


def _refuse_empty(setting: str, column: str, values: np.ndarray) -> None:
    if missing := int((values == "").sum()):
        raise UserError(
            f"protocol.{setting}, but {missing} of {len(values)} utterances have no {column}: "
            "fill the column, or use protocol.split_by=random with speakers_apart=False"
        )


def _deal(labels: np.ndarray, num_folds: int, rng: np.random.Generator) -> np.ndarray:
    """Deals each class's rows to `num_folds` parts of equal size; returns (n,) part numbers."""
    part = np.empty(len(labels), int)
    dealt = 0
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        part[rows] = (np.arange(len(rows)) + dealt) % num_folds
        dealt += len(rows)
    return part


def _draw_share(
    rows: np.ndarray,
    labels: np.ndarray,
    speakers: np.ndarray | None,
    share: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """Draws about `share` of each class among `rows`; if speakers are given, whole speakers."""
    if speakers is not None and share > 0 and len(rows):
        return _whole_speakers(rows, labels, speakers, share, rng)
    classes, sizes = np.unique(labels[rows], return_counts=True)
    wanted = share * sizes
    # At least one, if the class has two.
    counts = np.maximum(np.floor(wanted), (share > 0) & (sizes > 1)).astype(int)
    # The classes with the largest remainders give one more, so that the total (rare classes apart)
    # is the share of all rows whatever the labels are. No class gives its last row.
    missing = max(round(share * len(rows)) - counts.sum(), 0)
    largest = np.argsort(counts - wanted, kind="stable")
    counts[largest[(sizes - counts)[largest] > 1][:missing]] += 1
    chosen = [
        rng.permutation(rows[labels[rows] == label])[:count]
        for label, count in zip(classes, counts, strict=True)
    ]
    return np.sort(np.concatenate(chosen)) if chosen else rows[:0]


def _whole_speakers(
    rows: np.ndarray,
    labels: np.ndarray,
    speakers: np.ndarray,
    share: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """Takes all rows of some speakers: of 100 draws, the one nearest to `share` of every class."""
    names, speaker = np.unique(speakers[rows], return_inverse=True)
    if len(names) < 2:
        raise UserError(
            f"protocol.speakers_apart=True, but only speaker {some_of(names)} is left to divide: "
            "use fewer groups_per_fold or speakers_apart=False"
        )
    counts = np.zeros((len(names), labels.max() + 1))
    np.add.at(counts, (speaker, labels[rows]), 1)
    wanted = share * counts.sum(axis=0)
    best, least = None, np.inf
    for _ in range(100):
        order = rng.permutation(len(names))
        distance = np.abs(counts[order].cumsum(axis=0) - wanted).sum(axis=1)[:-1]
        if distance.min() < least:
            best, least = order[: distance.argmin() + 1], distance.min()
    return rows[np.isin(speaker, best)]


def _read_folds(path: str, ids: Sequence[str]) -> list[Fold]:
    """Reads folds that `folds_as_json` made of these utterances; some may be in no part."""
    try:
        described = {
            str(int(name)): (
                str(fold["held_out"]),
                [[tidy(str(key)) for key in fold[part]] for part in PARTS],
            )
            for name, fold in json.loads(Path(path).read_text(encoding="utf-8")).items()
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"protocol.split_by=file, but protocol.file={path!r} cannot be read "
            f"({type(error).__name__}: {error}); give the splits.json of another workdir"
        ) from error
    if not described:
        raise UserError(f"{path} has no folds")
    row_of = {name: row for row, name in enumerate(ids)}
    folds = []
    for name, (held_out, parts) in described.items():
        if unknown := [key for keys in parts for key in keys if key not in row_of]:
            raise UserError(
                f"{path}: {len(unknown)} ids of fold {name} are not in the corpus, e.g. "
                f"{unknown[0]!r}; the split is of another corpus or copy"
            )
        rows = (np.array(sorted(row_of[key] for key in keys), int) for keys in parts)
        folds.append(Fold(name, held_out, *rows))
    return folds


def _check_parts(
    fold: Fold, labels: np.ndarray, ids: Sequence[str], class_names: Sequence[str]
) -> None:
    """Refuses empty parts, untrainable classes, and utterances in two parts."""
    for part, rows in fold.parts.items():
        if len(rows) == 0:
            raise UserError(
                f"fold {fold.name} ({fold.held_out}): the {part} part is empty. Check the "
                "protocol's split_by, validation and quiz against the corpus"
            )
    unseen = sorted(set(labels[fold.test].tolist()) - set(labels[fold.train].tolist()))
    if unseen:
        raise UserError(
            f"fold {fold.name} ({fold.held_out}): no training example of the classes "
            f"{some_of(class_names[k] if class_names else k for k in unseen)}, which the "
            "test part has. Use larger folds or merge the classes"
        )
    rows, counts = np.unique(np.concatenate([*fold.parts.values()]), return_counts=True)
    if (counts > 1).any():
        twice = some_of(ids[row] for row in rows[counts > 1])
        raise UserError(f"fold {fold.name}: {twice} are in two parts, or twice in one")


def _twins(fold: Fold, speakers: np.ndarray) -> list[tuple[str, str]]:
    """Test speakers whose names look like those of others in the rest of the fold."""
    fitted = np.concatenate([rows for part, rows in fold.parts.items() if part != "test"])
    known = {plain(name): name for name in set(speakers[fitted].tolist()) - {""}}
    tested = sorted(set(speakers[fold.test].tolist()) - {""})
    return [(name, known[plain(name)]) for name in tested if plain(name) in known]


def _heard_before(fold: Fold, speakers: np.ndarray) -> list[str]:
    """Returns the speakers, where known, that are in both the test part and the rest of a fold."""
    fitted = np.concatenate([rows for part, rows in fold.parts.items() if part != "test"])
    both = set(speakers[fitted].tolist()) & set(speakers[fold.test].tolist())
    return sorted(both - {""})

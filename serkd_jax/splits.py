"""Test folds, and the validation and quiz parts of their training data."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from ml_collections import ConfigDict

from serkd_jax.errors import UserError

VALIDATION_NAMES = ("validation", "valid", "val", "dev")


@dataclass(frozen=True)
class Fold:
    """Row numbers of one fold's parts; no row is in two of them.

    Attributes:
        name: ``1``, ``2``, ...
        held_out: what the test part consists of, for people.
        train: rows that the stages train on.
        quiz: rows of the training data that the meta-teacher and the policy are rewarded on.
        validation: rows that select epochs.
        test: rows that are scored once, at the end.
    """

    name: str
    held_out: str
    train: np.ndarray
    quiz: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def make_folds(
    labels: np.ndarray, columns: dict[str, Sequence[str]], config: ConfigDict, seed: int
) -> list[Fold]:
    """Makes the folds that a protocol asks for.

    Args:
        labels: (n,) int classes.
        columns: ``speaker``, ``session``, ``fold`` and ``split``, n strings each.
        config: ``split_by``: ``speaker``, ``session`` or ``fold`` hold out ``groups_per_fold``
            of that column's values in turn; ``split`` is one fold by the corpus's own train, dev
            and test; ``random`` is ``num_folds`` stratified folds that ignore speakers.
            ``validation`` and ``quiz`` are shares of the training data.
        seed: of the random choices.

    Raises:
        UserError: a column is missing or has one value, or a part would be empty.
    """
    if len(np.unique(labels)) < 2:
        raise UserError("all utterances are of one class: there is nothing to tell apart")
    if config.groups_per_fold < 1 or config.num_folds < 2:
        raise UserError("protocol.groups_per_fold must be at least 1 and num_folds at least 2")
    rng = np.random.default_rng([seed, 1])
    if config.split_by == "split":
        parts = [_official_split(columns["split"])]
    elif config.split_by == "random":
        part = _deal(labels, config.num_folds, rng)
        parts = [
            (f"random part {k + 1}", np.flatnonzero(part == k), None)
            for k in range(config.num_folds)
        ]
    elif config.split_by in ("speaker", "session", "fold"):
        parts = _groups(config.split_by, columns[config.split_by], config.groups_per_fold)
    else:
        raise UserError(
            f"protocol.split_by is {config.split_by!r}: use speaker, session, fold, split or random"
        )
    folds = []
    for number, (held_out, test, validation) in enumerate(parts, start=1):
        taken = test if validation is None else np.concatenate([test, validation])
        train = np.setdiff1d(np.arange(len(labels)), taken)
        if validation is None:
            validation = _stratified_share(train, labels, config.validation, rng)
        train = np.setdiff1d(train, validation)
        quiz = _stratified_share(train, labels, config.quiz, rng)
        fold = Fold(str(number), held_out, np.setdiff1d(train, quiz), quiz, validation, test)
        _check(fold, labels, columns["speaker"] if config.split_by == "speaker" else None)
        folds.append(fold)
    return folds


def _groups(column: str, values: Sequence[str], groups_per_fold: int) -> list[tuple]:
    """Test parts that hold out ``groups_per_fold`` of the column's values each."""
    values = np.asarray(values)
    missing = int((values == "").sum())
    if missing:
        raise UserError(
            f"protocol.split_by={column}, but {missing} of {len(values)} utterances have no "
            f"{column}: fill the column, or use protocol.split_by=random"
        )
    names = sorted(set(values.tolist()))
    if len(names) <= groups_per_fold:
        raise UserError(
            f"cannot hold out {groups_per_fold} {column}(s): the corpus has only {len(names)} "
            f"({', '.join(names)}). Use protocol.split_by=random or split"
        )
    chunks = [names[i : i + groups_per_fold] for i in range(0, len(names), groups_per_fold)]
    return [
        (f"{column} {', '.join(chunk)}", np.flatnonzero(np.isin(values, chunk)), None)
        for chunk in chunks
    ]


def _official_split(values: Sequence[str]) -> tuple:
    """The corpus's own test part, and its validation part where it has one."""
    values = np.asarray([v.lower() for v in values])
    unknown = sorted(set(values.tolist()) - {"train", "test", *VALIDATION_NAMES})
    if unknown:
        raise UserError(
            f"protocol.split_by=split, but the split column has {unknown}: "
            f"use train, test and {VALIDATION_NAMES[0]}"
        )
    validation = np.flatnonzero(np.isin(values, VALIDATION_NAMES))
    test = np.flatnonzero(values == "test")
    return "the test split", test, validation if len(validation) else None


def _deal(labels: np.ndarray, num_folds: int, rng: np.random.Generator) -> np.ndarray:
    """Deals each class's rows to ``num_folds`` parts of equal size; (n,) part numbers."""
    part = np.empty(len(labels), int)
    dealt = 0
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        part[rows] = (np.arange(len(rows)) + dealt) % num_folds
        dealt += len(rows)
    return part


def _stratified_share(
    rows: np.ndarray, labels: np.ndarray, share: float, rng: np.random.Generator
) -> np.ndarray:
    """About ``share`` of each class among ``rows``; at least one where the class has two."""
    chosen = []
    for label in np.unique(labels[rows]):
        of_class = rng.permutation(rows[labels[rows] == label])
        count = max(round(share * len(of_class)), int(share > 0 and len(of_class) > 1))
        chosen.append(of_class[:count])
    return np.sort(np.concatenate(chosen)) if chosen else rows[:0]


def _check(fold: Fold, labels: np.ndarray, speakers: Sequence[str] | None) -> None:
    """Refuses empty parts, untrainable classes, and anything in both training and test."""
    parts = {part: getattr(fold, part) for part in ("train", "quiz", "validation", "test")}
    for part, rows in parts.items():
        if len(rows) == 0:
            raise UserError(
                f"fold {fold.name} ({fold.held_out}): the {part} part is empty. Check the "
                "protocol's split_by, validation and quiz against the corpus"
            )
    unseen = sorted(set(labels[fold.test].tolist()) - set(labels[fold.train].tolist()))
    if unseen:
        raise UserError(
            f"fold {fold.name} ({fold.held_out}): no training example of the classes numbered "
            f"{unseen}, which the test part has. Use larger folds or merge the classes"
        )
    rows, counts = np.unique(np.concatenate(list(parts.values())), return_counts=True)
    if (counts > 1).any():
        raise UserError(f"fold {fold.name}: rows {rows[counts > 1][:5]} are in two parts")
    if speakers is not None:
        speakers = np.asarray(speakers)
        fitted = np.concatenate([fold.train, fold.quiz, fold.validation])
        both = sorted(set(speakers[fitted].tolist()) & set(speakers[fold.test].tolist()))
        if both:
            raise UserError(f"fold {fold.name}: speakers {both} are in both training and test")

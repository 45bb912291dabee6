"""Folds, validation and quiz parts; what is refused; and which rows a step sees."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from serkd_jax.batches import sample_rows, stream_rows
from serkd_jax.errors import UserError
from serkd_jax.splits import make_folds

N, CLASSES = 120, 3
LABELS = np.arange(N) % CLASSES
COLUMNS = {
    "id": [f"u{i:03d}" for i in range(N)],
    "speaker": [f"s{i // 20}" for i in range(N)],
    "session": [""] * N,
    "fold": [str(i % 4) for i in range(N)],
    "split": ["test" if i < 30 else "dev" if i < 50 else "train" for i in range(N)],
}


def protocol(**changes):
    values = {"split_by": "speaker", "groups_per_fold": 2, "num_folds": 5, "file": ""}
    values |= {"speakers_apart": False}
    return ConfigDict(values | {"validation": 0.1, "quiz": 0.2} | changes)


def folds(columns=COLUMNS, labels=LABELS, seed=0, **changes):
    return make_folds(labels, columns, protocol(**changes), seed)


def parts(fold):
    return [fold.train, fold.quiz, fold.validation, fold.test]


@pytest.mark.parametrize("split_by", ["speaker", "fold", "random", "split"])
def test_every_part_is_disjoint_and_together_they_are_the_corpus(split_by):
    for fold in folds(split_by=split_by):
        assert np.array_equal(np.sort(np.concatenate(parts(fold))), np.arange(N))


@pytest.mark.parametrize("split_by", ["speaker", "fold", "random"])
def test_every_utterance_is_tested_once(split_by):
    tested = np.concatenate([fold.test for fold in folds(split_by=split_by)])
    assert np.array_equal(np.sort(tested), np.arange(N))


def test_speakers_are_held_out_in_pairs():
    made = folds()
    assert [fold.held_out for fold in made] == [
        "speaker s0, s1",
        "speaker s2, s3",
        "speaker s4, s5",
    ]
    for fold in made:
        speakers = np.array(COLUMNS["speaker"])
        assert not set(speakers[fold.test]) & set(speakers[np.concatenate(parts(fold)[:3])])


def test_validation_and_quiz_are_stratified_shares_of_the_training_data():
    for fold in folds():
        assert np.bincount(LABELS[fold.validation]).tolist() == [3, 3, 3]  # 10 % of about 27
        assert np.bincount(LABELS[fold.quiz]).tolist() == [5, 5, 5]


def test_the_corpus_own_split_is_used_as_it_is():
    (fold,) = folds(split_by="split")
    assert np.array_equal(fold.test, np.arange(30))
    assert np.array_equal(fold.validation, np.arange(30, 50))


def test_the_same_seed_gives_the_same_folds():
    first, again, other = folds(seed=1), folds(seed=1), folds(seed=2)
    assert all(np.array_equal(a.quiz, b.quiz) for a, b in zip(first, again, strict=True))
    assert any(not np.array_equal(a.quiz, b.quiz) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(
    ("columns", "changes", "message"),
    [
        ({"speaker": ["s0"] * N}, {"groups_per_fold": 1}, "only 1"),
        ({}, {"split_by": "session"}, "no session"),
        ({"split": ["train"] * N}, {"split_by": "split"}, "test part is empty"),
        ({"split": ["trian"] * N}, {"split_by": "split"}, "trian"),
        ({}, {"quiz": 0.0}, "quiz part is empty"),
        ({}, {"split_by": "gender"}, "gender"),
        ({}, {"groups_per_fold": 0}, "at least 1"),
    ],
)
def test_a_protocol_that_the_corpus_cannot_serve_is_refused(columns, changes, message):
    with pytest.raises(UserError, match=message):
        folds(columns=COLUMNS | columns, **changes)


def test_a_corpus_of_one_class_is_refused():
    with pytest.raises(UserError, match="one class"):
        folds(labels=np.zeros(N, int))


def test_a_class_that_only_the_test_part_has_is_refused():
    labels = LABELS.copy()
    labels[0] = CLASSES
    with pytest.raises(UserError, match="no training example"):
        folds(labels=labels)


def test_the_stream_shows_every_row_once_per_pass_and_depends_on_the_step_alone():
    rows = np.arange(100, 110)
    shown = np.concatenate([stream_rows(rows, 4, step, [0]) for step in range(5)])
    assert np.array_equal(np.sort(shown[:10]), rows)
    assert np.array_equal(np.sort(shown[10:]), rows)
    assert not np.array_equal(shown[:10], shown[10:])
    assert np.array_equal(stream_rows(rows, 4, 3, [0]), shown[12:16])


def test_fewer_rows_than_the_batch_are_repeated_evenly():
    rows = np.array([5, 6, 7])
    for batch in (stream_rows(rows, 7, 0, [0]), sample_rows(rows, 7, 0, [0])):
        counts = np.bincount(batch, minlength=8)[5:]
        assert counts.sum() == 7
        assert counts.max() - counts.min() <= 1

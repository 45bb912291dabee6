"""Folds, validation, quiz and reward parts; what is refused; and which rows a step sees."""

import json

import numpy as np
import pytest
from ml_collections import ConfigDict

from serkd_jax.data import splits
from serkd_jax.data.examples import are_resident, sample_rows, stream_rows
from serkd_jax.data.splits import folds_as_json, make_folds, speaker_note
from serkd_jax.distributed import parallel
from serkd_jax.errors import UserError

N, CLASSES = 120, 3
LABELS = np.arange(N) % CLASSES
COLUMNS = {
    "id": [f"u{i:03d}" for i in range(N)],
    "speaker": [f"s{i // 20}" for i in range(N)],
    "session": [""] * N,
    "fold": [str(i % 4) for i in range(N)],
    "split": ["test" if i < 30 else "dev" if i < 50 else "train" for i in range(N)],
}

SPEAKERS = np.arange(600) % 10  # as in IEMOCAP: five sessions of two speakers
IEMOCAP_LABELS = np.random.default_rng(0).integers(4, size=600)
IEMOCAP = {
    "id": [f"t{i:03d}" for i in range(600)],
    "speaker": [f"Ses0{s // 2 + 1}{'FM'[s % 2]}" for s in SPEAKERS],
    "session": [str(s // 2 + 1) for s in SPEAKERS],
    "fold": [str(i % 4) for i in range(600)],
    "split": [""] * 600,
}


def protocol(**changes):
    values = {"split_by": "speaker", "groups_per_fold": 2, "num_folds": 5, "file": ""}
    values |= {"speakers_apart": False, "seed": 0, "training_share": 1.0}
    return ConfigDict(values | {"validation": 0.1, "quiz": 0.2} | changes)


def folds(columns=COLUMNS, labels=LABELS, seed=0, **changes):
    return make_folds(labels, columns, protocol(seed=seed, **changes))


def parts(fold):
    return [fold.train, fold.quiz, fold.reward, fold.validation, fold.test]


def fitted(fold):
    return np.concatenate(parts(fold)[:-1])


def whole_quiz(fold):
    """The share of the training data that is not trained on, in both its uses."""
    return np.concatenate([fold.quiz, fold.reward])


def iemocap_folds(seed=0, **changes):
    return folds(IEMOCAP, IEMOCAP_LABELS, seed, **{"groups_per_fold": 1} | changes)


def are_equal(first, second):
    return all(np.array_equal(a, b) for a, b in zip(parts(first), parts(second), strict=True))


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
        assert not set(speakers[fold.test]) & set(speakers[fitted(fold)])


def test_folds_are_in_the_order_of_their_numbers():
    made = folds(COLUMNS | {"fold": [str(1 + i % 12) for i in range(N)]}, split_by="fold")
    assert [fold.held_out for fold in made][-2:] == ["fold 9, 10", "fold 11, 12"]


def test_validation_and_quiz_are_stratified_shares_of_the_training_data():
    """The share of all is exact, so that it does not depend on the labels; classes round."""
    for fold in folds():
        left = fitted(fold)
        for part, share in ((fold.validation, 0.1), (whole_quiz(fold), 0.2)):
            assert len(part) == round(share * len(left))
            wanted = share * np.bincount(LABELS[left])
            assert (np.abs(np.bincount(LABELS[part]) - wanted) < 1).all()
            left = np.setdiff1d(left, part)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("split_by", ["session", "speaker", "random"])
def test_the_reward_part_is_half_of_the_quiz_share_class_by_class(split_by, apart):
    for fold in iemocap_folds(split_by=split_by, speakers_apart=apart):
        assert 0 <= len(fold.quiz) - len(fold.reward) <= 1
        quiz, reward = (
            np.bincount(IEMOCAP_LABELS[rows], minlength=4) for rows in (fold.quiz, fold.reward)
        )
        assert np.abs(quiz - reward).max() <= 1


def test_a_quiz_share_of_two_rows_is_enough_for_both_its_parts():
    """One of each class: so it is of a corpus of some twenty clips."""
    columns = {"split": ["train"] * 12 + ["test"] * 6, "id": [str(i) for i in range(18)]}
    columns["speaker"] = [""] * 18
    (fold,) = folds(columns, np.arange(18) % 2, split_by="split", validation=0.1, quiz=0.2)
    assert (len(fold.quiz), len(fold.reward)) == (1, 1)


def test_no_class_gives_its_last_row_to_make_up_the_share():
    labels = np.repeat([0, 1, 2, 3], [1, 2, 2, 25])  # the remainders of the rare ones are largest
    columns = {"split": ["train"] * 29 + ["test"], "id": [str(i) for i in range(30)]}
    columns["speaker"] = [""] * 30
    (fold,) = folds(columns, labels, split_by="split", validation=0.3, quiz=0.3)
    assert set(labels[fold.train]) == {0, 1, 2, 3}


def test_a_class_of_two_has_one_in_validation():
    labels = np.array([0] * 40 + [1] * 40 + [2] * 2)
    columns = {"split": ["train"] * 82 + ["test"] * 20, "id": [str(i) for i in range(102)]}
    columns["speaker"] = [""] * 102
    (fold,) = folds(columns, np.append(labels, [0, 1] * 10), split_by="split")
    assert np.bincount(labels[fold.validation], minlength=3).tolist() == [4, 4, 1]


def test_sessions_of_two_speakers_are_held_out_in_five_folds_and_speakers_in_ten():
    for split_by, num_folds, num_speakers in [("session", 5, 2), ("speaker", 10, 1)]:
        made = iemocap_folds(split_by=split_by)
        assert [fold.name for fold in made] == [str(k + 1) for k in range(num_folds)]
        for fold in made:
            held_out = {IEMOCAP["speaker"][row] for row in fold.test}
            assert len(held_out) == num_speakers
            assert not held_out & {IEMOCAP["speaker"][row] for row in fitted(fold)}


@pytest.mark.parametrize("seed", range(8))
def test_no_protocol_puts_a_row_in_two_parts_whatever_the_corpus(seed):
    rng = np.random.default_rng(seed)
    n, num_speakers = rng.integers(150, 400), rng.integers(6, 15)
    of_row = rng.choice(num_speakers, n, p=rng.dirichlet(np.full(num_speakers, 5)))
    columns = {
        "id": [f"u{i}" for i in range(n)],
        "speaker": [f"s{s}" for s in of_row],
        "session": [str(s // 2) for s in of_row],
        "fold": rng.choice(["1", "2", "3"], n),
        "split": rng.choice(["train", "dev", "test"], n, p=[0.7, 0.1, 0.2]),
    }
    labels = rng.integers(4, size=n)
    for split_by in ("speaker", "session", "fold", "split", "random"):
        for apart in (False, True):
            for fold in folds(
                columns, labels, seed, split_by=split_by, groups_per_fold=1, speakers_apart=apart
            ):
                assert np.array_equal(np.sort(np.concatenate(parts(fold))), np.arange(n))


def test_the_corpus_own_split_is_used_as_it_is():
    (fold,) = folds(split_by="split")
    assert np.array_equal(fold.test, np.arange(30))
    assert np.array_equal(fold.validation, np.arange(30, 50))


def test_a_share_of_the_training_data_is_the_same_for_all_its_parts_and_leaves_the_test_alone():
    for half, whole in zip(folds(training_share=0.5), folds(), strict=True):
        np.testing.assert_array_equal(half.test, whole.test)
        assert np.setdiff1d(fitted(half), fitted(whole)).size == 0
        assert len(fitted(half)) == len(fitted(whole)) / 2
        wanted = np.bincount(LABELS[fitted(whole)]) / 2
        assert (np.abs(np.bincount(LABELS[fitted(half)]) - wanted) < 1).all()
        assert len(half.validation) == len(whole.validation) / 2


@pytest.mark.parametrize("apart", [False, True])
def test_the_same_seed_gives_the_same_folds(apart):
    first, again, other = (folds(seed=seed, speakers_apart=apart) for seed in (1, 1, 2))
    assert all(map(are_equal, first, again))
    assert not all(map(are_equal, first, other))


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


# Speakers in several parts


def test_a_speaker_of_two_sessions_is_refused_with_the_name():
    session = ["1" if i < 50 else "2" for i in range(N)]
    with pytest.raises(UserError, match=r"fold 1 \(session 1\): speakers s2 are in both"):
        folds(COLUMNS | {"session": session}, split_by="session", groups_per_fold=1)


@pytest.mark.parametrize("split_by", ["speaker", "session"])
def test_a_speaker_independent_protocol_that_divides_speakers_is_refused(monkeypatch, split_by):
    """Even if the folds come from a grouping with an error in it."""
    monkeypatch.setattr(splits, "_groups", lambda *_: [("a half", np.arange(0, N, 2), None)])
    with pytest.raises(UserError, match="speakers s0, s1, s2, s3, s4, s5 are in both"):
        folds(split_by=split_by)


@pytest.mark.parametrize("split_by", ["fold", "random", "split"])
def test_other_protocols_may_divide_speakers(split_by):
    assert "not speaker-independent" in speaker_note(folds(split_by=split_by), COLUMNS["speaker"])


def test_unknown_speakers_are_not_taken_for_one_speaker_of_all_sessions():
    columns = COLUMNS | {"speaker": [""] * N, "session": COLUMNS["fold"]}
    assert len(folds(columns, split_by="session", groups_per_fold=1)) == 4


def test_the_note_tells_independent_shared_and_unknown_speakers_apart():
    speakers = COLUMNS["speaker"]
    assert speaker_note(folds(), speakers).startswith("No test speaker is trained on")
    some = [*speakers[:90], *[""] * 30]
    for known, count in [([""] * N, 120), (some, 30)]:
        assert speaker_note(folds(), known).startswith(f"{count} of 120 utterances have no speaker")
    # Of the 30 tested, 20 are of s0 and 10 of s1, who also speaks in the validation part.
    assert "In 1 of 1 fold(s), test speakers are also trained on (fold 1: 1 of 2)" in speaker_note(
        folds(split_by="split"), speakers
    )
    thirds = COLUMNS | {"fold": [str(1 + (i >= 40) + (i >= 70)) for i in range(N)]}
    assert "In 2 of 3 fold(s), test speakers are also trained on (fold 2: 1 of 2)" in speaker_note(
        folds(thirds, split_by="fold", groups_per_fold=1), speakers
    )


@pytest.mark.parametrize("split_by", ["session", "speaker", "fold", "random"])
def test_validation_and_quiz_can_be_of_speakers_apart(split_by):
    for fold in iemocap_folds(split_by=split_by, speakers_apart=True):
        train, quiz, validation = (
            set(SPEAKERS[rows].tolist()) for rows in (fold.train, whole_quiz(fold), fold.validation)
        )
        assert train.isdisjoint(quiz | validation)
        assert quiz.isdisjoint(validation)
        rest = len(fold.train) + len(whole_quiz(fold))
        for rows, share, of in [
            (fold.validation, 0.1, rest + len(fold.validation)),
            (whole_quiz(fold), 0.2, rest),
        ]:
            assert abs(len(rows) - share * of) <= 30  # half a speaker
            assert np.bincount(IEMOCAP_LABELS[rows], minlength=4).min() >= 5  # of about 15


def test_without_speakers_apart_the_parts_share_speakers():
    for fold in iemocap_folds(split_by="session"):
        assert set(SPEAKERS[fold.train]) == set(SPEAKERS[fold.validation]) == {*SPEAKERS[fold.quiz]}


def test_of_many_uneven_speakers_those_apart_make_up_about_the_share():
    rng = np.random.default_rng(0)
    speakers = rng.choice([f"s{i}" for i in range(20)], 1000, p=rng.dirichlet(np.full(20, 2.0)))
    columns = dict.fromkeys(("id", "session", "split"), [""] * 1000)
    columns |= {"speaker": speakers, "fold": [*"12"] * 500, "id": [f"u{i}" for i in range(1000)]}
    labels = rng.integers(4, size=1000)
    for seed in range(10):
        settings = {"split_by": "fold", "groups_per_fold": 1, "speakers_apart": True}
        for fold in folds(columns, labels, seed, **settings, quiz=0.2):
            assert 0.07 < len(fold.validation) / 500 < 0.13
            assert 0.15 < len(whole_quiz(fold)) / (500 - len(fold.validation)) < 0.25


def test_speakers_apart_need_enough_speakers_and_their_names():
    columns = COLUMNS | {"speaker": [f"s{i % 3}" for i in range(N)]}
    with pytest.raises(UserError, match=r"only speaker s\d is left to divide"):
        folds(columns, groups_per_fold=1, speakers_apart=True)
    with pytest.raises(UserError, match="120 of 120 utterances have no speaker"):
        folds(COLUMNS | {"speaker": [""] * N}, split_by="random", speakers_apart=True)


# Folds of a file


@pytest.mark.parametrize("split_by", ["speaker", "random", "split"])
def test_written_folds_are_read_back_as_they_were(tmp_path, split_by):
    written = folds(split_by=split_by)
    path = tmp_path / "splits.json"
    path.write_text(folds_as_json(written, np.array(COLUMNS["id"])))
    read = folds(split_by="file", file=str(path), seed=7)
    assert [(f.name, f.held_out) for f in read] == [(f.name, f.held_out) for f in written]
    assert all(map(are_equal, read, written))


def test_a_file_is_of_ids_whatever_their_order_in_the_corpus(tmp_path):
    written = folds()
    (tmp_path / "splits.json").write_text(folds_as_json(written, np.array(COLUMNS["id"])))
    turned = {name: values[::-1] for name, values in COLUMNS.items()}
    read = folds(turned, LABELS[::-1], split_by="file", file=str(tmp_path / "splits.json"))
    for there, here in zip(written, read, strict=True):
        for rows, turned_rows in zip(parts(there), parts(here), strict=True):
            assert np.array_equal(rows, np.sort(N - 1 - turned_rows))


def one_fold():
    ids = COLUMNS["id"]
    cut = {"train": ids[:60], "quiz": ids[60:70], "reward": ids[70:80]}
    cut |= {"validation": ids[80:90], "test": ids[90:110]}
    return {"held_out": "somebody"} | cut


def test_a_file_may_leave_utterances_out(tmp_path):
    (tmp_path / "splits.json").write_text(json.dumps({"3": one_fold()}))
    (fold,) = folds(split_by="file", file=str(tmp_path / "splits.json"))
    assert (fold.name, fold.held_out) == ("3", "somebody")
    assert np.array_equal(np.concatenate(parts(fold)), np.arange(110))


def test_a_file_may_divide_speakers(tmp_path):
    (tmp_path / "splits.json").write_text(json.dumps({"1": one_fold()}))
    made = folds(split_by="file", file=str(tmp_path / "splits.json"))
    assert "(fold 1: 1 of 2)" in speaker_note(made, COLUMNS["speaker"])


BAD_FILES = {
    r"splits\.json: 2 ids of fold 1 are not in the corpus, e\.g\. 'x1'": lambda fold: {
        "1": fold | {"test": [*fold["test"], "x1", "x2"]}
    },
    r"fold 1: u090 are in two parts": lambda fold: {"1": fold | {"quiz": [*fold["quiz"], "u090"]}},
    r"2 ids of fold 1 are not in the corpus, e\.g\. '\['": lambda fold: {
        "1": fold | {"quiz": ["[", ["u090"]]}
    },
    r"fold 1 \(somebody\): the quiz part is empty": lambda fold: {"1": fold | {"quiz": []}},
    r"splits\.json' cannot be read \(KeyError: 'quiz'\)": lambda fold: {
        "1": {part: ids for part, ids in fold.items() if part != "quiz"}
    },
    r"splits\.json' cannot be read \(ValueError.*'first'": lambda fold: {"first": fold},
    r"splits\.json' cannot be read \(TypeError": lambda fold: {"1": fold["train"]},
    r"splits\.json' cannot be read \(AttributeError": lambda fold: [fold],
    r"splits\.json has no folds": lambda fold: {},
}


@pytest.mark.parametrize("problem", BAD_FILES)
def test_a_faulty_file_is_refused_with_its_name_or_the_fold(tmp_path, problem):
    (tmp_path / "splits.json").write_text(json.dumps(BAD_FILES[problem](one_fold())))
    with pytest.raises(UserError, match=problem):
        folds(split_by="file", file=str(tmp_path / "splits.json"))


def test_a_missing_or_broken_file_is_refused_with_its_name(tmp_path):
    path = tmp_path / "splits.json"
    with pytest.raises(UserError, match=r"splits\.json' cannot be read \(FileNotFoundError"):
        folds(split_by="file", file=str(path))
    path.write_text('{"1": {')
    with pytest.raises(UserError, match=r"splits\.json' cannot be read \(JSONDecodeError"):
        folds(split_by="file", file=str(path))
    with pytest.raises(UserError, match=r"protocol\.file='' cannot be read"):
        folds(split_by="file")


# Classes


def test_a_corpus_of_one_class_is_refused():
    with pytest.raises(UserError, match="one class"):
        folds(labels=np.zeros(N, int))


def test_a_class_that_only_the_test_part_has_is_refused():
    labels = LABELS.copy()
    labels[0] = CLASSES
    with pytest.raises(UserError, match="no training example"):
        folds(labels=labels)


# Rows of a step


def test_the_stream_shows_every_row_once_per_pass_and_depends_on_the_step_alone():
    rows = np.arange(100, 110)
    shown = stream_rows(rows, 4, range(5), [0]).reshape(-1)
    assert np.array_equal(np.sort(shown[:10]), rows)
    assert np.array_equal(np.sort(shown[10:]), rows)
    assert not np.array_equal(shown[:10], shown[10:])
    assert np.array_equal(stream_rows(rows, 4, range(3, 4), [0]), [shown[12:16]])


def test_examples_are_resident_if_they_fit_or_as_chosen(monkeypatch):
    monkeypatch.setattr(parallel, "memory_of_device", lambda _: 1000)
    choices = ("auto", 400), ("auto", 401), ("device", 401), ("records", 1)
    assert [are_resident(*choice, []) for choice in choices] == [True, False, True, False]


def test_fewer_rows_than_the_batch_are_repeated_evenly():
    rows = np.array([5, 6, 7])
    for batch in (stream_rows(rows, 7, range(1), [0])[0], sample_rows(rows, 7, 0, [0])):
        counts = np.bincount(batch, minlength=8)[5:]
        assert counts.sum() == 7
        assert counts.max() - counts.min() <= 1

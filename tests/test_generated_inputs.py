"""Inputs by chance: damaged recordings, tables by a grammar, recipes of random values.

Everything about a case follows from its number. `GENERATED_INPUTS=10000` makes so many cases
instead of a few hundred; with `-n 1 --timeout=60 --timeout-method=thread`, pytest names those that
crash or never end, and goes on.
"""

import contextlib
import csv
import functools
import io
import json
import math
import os
import random
import re
import resource
import sys
import unicodedata

import jax
import numpy as np
import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

import tiny_config
from exported_models import write_model
from recordings import KINDS, RATE, make_recording
from serkd_jax import experiment, programs
from serkd_jax.audio.decoding import read_audio
from serkd_jax.audio.waveform import AudioError
from serkd_jax.config import check_config
from serkd_jax.data.corpora import CorpusError, Manifest
from serkd_jax.data.counts import check_counts
from serkd_jax.data.prepare import prepare_records
from serkd_jax.data.reader import load_skipped, load_table
from serkd_jax.deploy.model import Failure
from serkd_jax.errors import LONGEST, UserError, parse_flags
from serkd_jax.experiment import check_stages, prepare_experiment
from serkd_jax.predict import load_model

CASES = int(os.environ.get("GENERATED_INPUTS", 400))


def cases(share):
    """Numbers the cases of a test that gets this share of them."""
    return pytest.mark.parametrize("number", range(round(share * CASES)))


def is_told(error, *names):
    """Whether an error is one line that a terminal can show, and has one of the names."""
    told = str(error)
    return told.isprintable() and len(told) <= LONGEST and any(str(name) in told for name in names)


# Recordings

EXTREMES = [0, 1, 3, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Kind -> the bytes of a whole recording."""
    folder = tmp_path_factory.mktemp("whole")
    return {kind: make_recording(folder, kind, seconds=1.2).read_bytes() for kind in KINDS}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(write_model(tmp_path_factory.mktemp("made") / "m"))


def damage(content, rng, others):
    """Damages a file in one place, most often where its headers are."""
    start = rng.randrange(min(rng.choice([64, 512, 10**9]), len(content)) or 1)
    if rng.random() < 0.15:  # some formats have their tables at the end
        start = max(0, len(content) - 1 - start)
    width, other = rng.choice([1, 2, 4, 8, 100, 5000]), rng.choice(others)
    before, there, after = content[:start], content[start : start + width], content[start + width :]
    parts = {
        "noise": rng.randbytes(len(there)),
        "zeros": bytes(len(there)),
        "ones": b"\xff" * len(there),
        "number": rng.choice(EXTREMES).to_bytes(8, rng.choice(["big", "little"]))[-width:],
        "deletion": b"",
        "insertion": rng.randbytes(width) + there,
        "repetition": there * rng.randrange(2, 5),
        "part of another": other[start : start + width],
    }
    if there:
        parts["bit"] = bytes([there[0] ^ 1 << rng.randrange(8)]) + there[1:]
    wholes = [before, there + after, content + other, before + other + after, other[:start] + after]
    wholes.append(content.decode("latin-1").encode())  # as text, as some servers send it
    if rng.random() < 0.25:
        return rng.choice(wholes)
    return before + parts[rng.choice(sorted(parts))] + after


def write_damaged(folder, recordings, rng, name="a"):
    """Writes a recording that is damaged in one or a few places, often with another suffix."""
    kind = rng.choice(KINDS)
    content = recordings[kind]
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        content = damage(content, rng, [*recordings.values()])
    path = folder / f"{name}.{rng.choice([kind] * 30 + KINDS).rpartition('.')[2]}"
    path.write_bytes(content)
    return path


@cases(0.6)
def test_a_damaged_recording_is_read_or_told(tmp_path, recordings, number):
    rng = random.Random(f"recording {number}")
    path = write_damaged(tmp_path, recordings, rng)
    part = rng.choice([{}, {}, {"max_samples": 4000}, {"start": 0.2}, {"start": 0.3, "end": 0.9}])
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        waveform = read_audio(path, **part)
    except AudioError as error:
        assert is_told(error, path), str(error)  # noqa: PT017
    else:
        assert waveform.dtype == np.float32
        assert np.isfinite(waveform).all()
        assert 400 <= len(waveform) <= part.get("max_samples", 60 * RATE)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < memory + 300_000  # KiB


@cases(0.01)
def test_of_damaged_recordings_none_is_lost(tmp_path, recordings, model, number):
    """Each is in the records, or is named with the reason; each is predicted or fails."""
    rng = random.Random(f"recordings {number}")
    paths = [write_damaged(tmp_path, recordings, rng, str(k)) for k in range(rng.randrange(1, 16))]
    rows = [f"{path.name},{rng.choice('ab')}" for path in paths]
    (tmp_path / "m.csv").write_text("\n".join(["path,label", *rows]))
    corpus = Manifest(str(tmp_path / "m.csv"))
    try:
        folder = prepare_records(corpus, tmp_path / "cache")
    except CorpusError as error:
        assert is_told(error, f"none of {len(paths)} audio files"), str(error)  # noqa: PT017
    else:
        table, skipped = load_table(folder), load_skipped(folder)
        listed = [*table.ids, *(skip["id"] for skip in skipped)]
        assert sorted(listed) == sorted(path.name for path in paths)
        report = check_counts(table, corpus, strict=False)
        assert all(f"- `{skip['id']}`: {skip['reason']}" in report for skip in skipped)
    results = [*model.predict(paths)]
    assert [result.source for result in results] == [*map(str, paths)]
    for result in results:
        if isinstance(result, Failure):
            assert is_told(result.error, result.source), result.error
        else:
            assert sum(result.probabilities.values()) == pytest.approx(1)


# Tables

LABELS = ["sad", "Freude", "très content", "怒り", "1", "True", "on|off", 'a "b"', "a,b", "a;b"]
ALIASES = {"path": "wav", "label": "emo", "id": "key", "start": "start_time", "end": "end_time"}
OPTIONAL = ("id", "speaker", "session", "split", "fold", "start", "comment", "Größe")
STRANGE = ["\0", "a" * 200_000, "../" * 3000, "a/\x1b[31m", "a\nb", "\u202e", "🎙" * 99, "nan", "~"]
STRANGE += ["CON", "%s", "{}", "=1+1", "-", ".", "/", "\\\\", "http://a/b.wav", "1e999", "\ud800"]
WITHOUT_MEANING = [
    lambda row: {"path": ""},
    lambda row: {"label": ""},
    lambda row: {},  # the same row
    lambda row: {"start": "0:30"},
    lambda row: {"start": "nan"},
    lambda row: {"start": "2", "end": "1"},
    lambda row: {"end": "inf"},
    lambda row: {"LABEL": "x"},
    lambda row: {"label": row["label"] + "\u0301", "path": "b.wav", "id": "b"},  # an accent
]


def make_rows(rng):
    """The rows of a table, as people mean them: each is a recording, or a part of one."""
    columns = [name for name in OPTIONAL if rng.random() < 0.4]
    rows = []
    for number in range(rng.randrange(1, 6)):
        row = {"path": f"{rng.choice(['', 'wav/', 's1/größe/', '/data/'])}{number}.wav"}
        row["label"] = rng.choice(LABELS)
        for name in columns:
            row[name] = rng.choice(["", name, f"{name}-ü", str(number), "0.50", "no; name, 'here'"])
        if "id" in columns:
            row["id"] = rng.choice(["", f"u{number}", f"ä {number}"])
        if "start" in columns:
            row["start"], row["end"] = rng.choice([("", ""), ("0.5", "2.25"), ("1", ""), ("", "3")])
        rows.append(row)
    return rows


def meant(rows):
    """What a reader must find in the rows: for each its names, and the part of the file."""
    found = []
    for row in rows:
        start, end = row.get("start", ""), row.get("end", "")
        key = row.get("id") or row["path"] + (f"#{start}-{end}" if start or end else "")
        names = (row.get(name, "") for name in ("label", "speaker", "session", "split", "fold"))
        found.append((key, *names, float(start or 0), float(end) if end else None))
    return sorted(found)


def untidy(text, rng):
    """A text as people write it, with what does not show."""
    first, last = (rng.choice(["", "", "", " ", "\u00a0", "\u200b", "\ufeff"]) for _ in range(2))
    return first + unicodedata.normalize(rng.choice(["NFC", "NFD"]), text) + last


def as_csv(columns, rows, rng, separator):
    text, end = io.StringIO(newline=""), rng.choice(["\n", "\r\n"])
    quoting = rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
    writer = csv.writer(text, delimiter=separator, lineterminator=end, quoting=quoting)
    for cells in (columns, *rows):
        writer.writerow(cells)
        if rng.random() < 0.1:
            text.write(rng.choice(["", separator, separator * (len(columns) - 1)]) + end)
    return text.getvalue()


def as_jsonl(columns, rows, rng):
    def value(text):
        if not text:
            return rng.choice(["", None, math.nan])
        return rng.choice([text, int(text)]) if text.isascii() and text.isdigit() else text

    objects = [dict(zip(columns, map(value, row), strict=True)) for row in rows]
    lines = [json.dumps(row, ensure_ascii=rng.random() < 0.5) for row in objects]
    return "\n".join(lines) + rng.choice(["", "\n", "\n\n"])


def write_table(folder, rows, rng):
    """Writes rows as one of the ways in which people write them down."""
    columns = [rng.choice([name, name, ALIASES.get(name, name)]) for name in rows[0]]
    columns = [
        rng.choice([c, c, c.upper()]) if c.isascii() and c != "comment" else c for c in columns
    ]
    columns = [untidy(name, rng) for name in columns]
    cells = [
        [
            untidy(text, rng) if text and name not in ("start", "end") else text
            for name, text in row.items()
        ]
        for row in rows
    ]
    kind = rng.choice(["csv", "csv", "tsv", "jsonl"])
    if kind == "jsonl":
        text = as_jsonl(columns, cells, rng)
    else:
        text = as_csv(columns, cells, rng, "\t" if kind == "tsv" else rng.choice(",;\t"))
    path = folder / f"table.{kind}"
    path.write_bytes(text.encode(rng.choice(["utf-8", "utf-8-sig"]), "surrogatepass"))
    return path


@cases(0.1)
def test_a_table_is_read_as_it_is_meant(tmp_path, number):
    rng = random.Random(f"table {number}")
    rows, label_map = make_rows(rng), ""
    path = write_table(tmp_path, rows, rng)
    if rng.random() < 0.3:
        classes = {label: rng.choice(["A", "B", label]) for label in LABELS}
        content = json.dumps({untidy(k, rng): untidy(v, rng) for k, v in classes.items()})
        label_map = tmp_path / "map.json"
        label_map.write_text(content, encoding=rng.choice(["utf-8", "utf-8-sig"]))
        rows = [row | {"label": classes[row["label"]]} for row in rows]
    found = [
        (u.id, u.label, u.speaker, u.session, u.split, u.fold, u.start, u.end)
        for u in Manifest(str(path), label_map=str(label_map)).utterances
    ]
    assert found == meant(rows)


@cases(0.05)
def test_a_table_that_means_nothing_is_refused(tmp_path, number):
    rng = random.Random(f"no table {number}")
    rows = make_rows(rng)
    rows.append(rows[0] | rng.choice(WITHOUT_MEANING)(rows[0]))
    rows = [{name: row.get(name, "") for name in rows[-1]} for row in rows]
    path = write_table(tmp_path, rows, rng)
    with pytest.raises(CorpusError) as error:
        _ = Manifest(str(path)).utterances
    assert is_told(error.value, path, "differ in case, width"), str(error.value)


@cases(0.1)
def test_a_strange_table_is_listed_or_told(tmp_path, number):
    rng = random.Random(f"strange table {number}")
    rows = make_rows(rng)
    for row in rows[: rng.randrange(3)]:
        row[rng.choice([*row])] = rng.choice(STRANGE)
    if rng.random() < 0.1:
        rows = [rows[0] | {rng.choice(STRANGE): "x"}]
    path, label_map = write_table(tmp_path, rows, rng), ""
    content = path.read_bytes()
    if rng.random() < 0.6:
        content = damage(
            content, rng, [content, b"[" * 99_999, b'{"path": {"a": [1]}, "label": 2}']
        )
    if rng.random() < 0.2:
        encoding = rng.choice(["utf-16", "latin-1", "utf-8-sig", "cp037"])
        content = content.decode("utf-8", "replace").encode(encoding, "replace")
    path.write_bytes(content)
    if rng.random() < 0.4:
        classes = {rng.choice([*LABELS, *STRANGE]): rng.choice(["a", 1, None, {}]) for _ in "abc"}
        content = json.dumps(dict.fromkeys(LABELS, "b") | (classes if rng.random() < 0.5 else {}))
        others = [b"[" * 99_999, b'{"sad": "x", "sad": "y"}']
        label_map = tmp_path / "map.json"
        label_map.write_bytes(damage(content.encode(), rng, others))
    try:
        corpus = Manifest(str(path), label_map=str(label_map))
        assert len(corpus.utterances) <= 3 * len(rows)
        assert corpus.fingerprint
        for utterance in corpus.utterances:
            assert (utterance.id + utterance.label).encode()
            with contextlib.suppress(AudioError):
                corpus.read_waveform(utterance)
    except CorpusError as error:
        names = ("table.", "map.json", "differ in case, width", "cannot be shown")
        assert is_told(error, *names), str(error)  # noqa: PT017


# Recipes

VALUES = [-1, 0, 1, 2, 3, 7, 100, 2**31, 2**63, 10**30, 0.5, -0.5, 1e-300, 1e308, 1e9, math.nan]
VALUES += [math.inf, -math.inf, None, "", "x", "auto", "class", "\0", True, False, [], [0], [3, 5]]
VALUES += [[1e9], (-1,), [[1]], {}, {"a": 1}, "1", "2,3", "nan", "split", "random", "teacher", b"x"]
NO_KEYS = ["", ".", "seed.a", "seed[0]", "student.a", "student.classifier_dims[7]", "[", "a-b"]
TEXTS = ["auto", "records", "bfloat16", "ua", "last", "constant", "all", "post", "tokens", "none"]
TEXTS += ["flatten", "random", "session", "student_teacher", "first_order", "class", "uniform", "x"]


def keys_of(config, prefix=""):
    """The keys of a recipe and of all its parts."""
    for key, value in config.items():
        yield f"{prefix}{key}"
        if isinstance(value, ConfigDict):
            yield from keys_of(value, f"{prefix}{key}.")


def value_of(config, key):
    return functools.reduce(getattr, key.split("."), config)


def change(config, changes):
    for key, value in changes.items():
        part, _, last = key.rpartition(".")
        with contextlib.suppress(AttributeError):  # another change has replaced the part
            place = value_of(config, part) if part else config
            with place.ignore_type():
                place[last] = ConfigDict(value) if isinstance(value, dict) else value
    return config


@cases(0.07)
def test_a_recipe_of_any_values_is_accepted_or_told(number):
    rng = random.Random(f"recipe {number}")
    config = tiny_config.get_config()
    keys = rng.sample([*keys_of(config)], rng.choice([1, 2, 3]))
    try:
        check_config(change(config, {key: rng.choice(VALUES) for key in keys}))
        check_stages(config)
    except UserError as error:
        assert is_told(error, "the recipe has", *keys), str(error)  # noqa: PT017


@cases(0.06)
def test_a_command_line_of_any_values_is_parsed_or_told(monkeypatch, capsys, number):
    rng = random.Random(f"command line {number}")
    monkeypatch.setattr(flags, "FLAGS", flags.FlagValues())
    config_flags.DEFINE_config_file("config", flag_values=flags.FLAGS)
    keys, values = [*keys_of(tiny_config.get_config()), *NO_KEYS], [v for v in VALUES if v != "\0"]
    words = ["main", f"--config={tiny_config.__file__}"]
    for _ in range(rng.choice([1, 1, 2])):
        words.append(f"--config.{rng.choice(keys)}{rng.choice('== ')}{rng.choice(values)}")
    monkeypatch.setattr(sys, "argv", words)  # where the recipe's flag looks for its keys
    try:
        parse_flags(words)
        check_config(flags.FLAGS.config)
        check_stages(flags.FLAGS.config)
    except UserError as error:
        assert is_told(error, *keys), str(error)  # noqa: PT017
    except SystemExit:
        (line,) = capsys.readouterr().err.splitlines()
        assert is_told(line, "error: "), line


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("config.bath_size.x = 3", "line 3: AttributeError: .*batch_size"),
        ("config.seed = 1 / 0", "line 3: ZeroDivisionError"),
        ("import nothing_at_all", "line 3: ModuleNotFoundError"),
        ("config.batch_size = 'x'", "Could not override field 'batch_size'"),
        ("return 3", "--config=.*'int' object"),
        ("config =", "SyntaxError: .*line 3"),
    ],
)
def test_a_mistake_in_a_recipe_is_told_in_one_line(tmp_path, monkeypatch, capsys, code, told):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "import configs.demo\n"
        "def get_config(config=configs.demo.get_config()):\n"
        f"  {code}\n"
        "  return config\n"
    )
    monkeypatch.setattr(flags, "FLAGS", flags.FlagValues())
    config_flags.DEFINE_config_file("config", flag_values=flags.FLAGS)
    monkeypatch.setattr(sys, "argv", ["main", f"--config={recipe}"])
    with pytest.raises(SystemExit):
        parse_flags(sys.argv)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(f"error: .*{told}", line), line


def plausible(value, rng):
    """A value that a person might give instead of this one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice([0, 1, 2, 3, 5, 8, 16])
    if isinstance(value, float):
        return rng.choice([0, 0.0, 1e-9, 0.1, 0.5, 0.99, 1.0, 10, 1000.0])
    if isinstance(value, tuple):
        return rng.choice([(), (1,), (3, 5), (64,)])
    return rng.choice([*TEXTS, value])


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    """Records and features that recipes share."""
    config = tiny_config.get_config()
    config.cache_dir = str(tmp_path_factory.mktemp("records"))
    prepare_experiment(config, tmp_path_factory.mktemp("run"))
    return config.cache_dir


def zeros(function, *arguments):
    """What a function would return, without the computation."""
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(function, *arguments))


@pytest.fixture
def shapes_only(monkeypatch):
    """Makes runs trace every program, and compute nothing."""

    def train(run, directory):
        data, rows = run.take(range(min(run.steps_per_dispatch, run.steps_per_epoch)))
        state = zeros(run.init).replace(frozen=run.frozen)
        assert math.isfinite(run.learning_rate(1))
        return zeros(run.steps, state, data, rows, 1, run.rng)[0]

    def predict_rows(predict, params, examples, rows, batch_size):
        data, places = examples.take(np.resize(rows, batch_size))
        return jax.tree.map(
            lambda x: np.resize(x, (len(rows), *x.shape[1:])), zeros(predict, params, data, places)
        )

    monkeypatch.setattr(experiment, "train", train)
    monkeypatch.setattr(programs, "predict_rows", predict_rows)


@cases(0.02)
def test_a_recipe_that_is_accepted_can_be_run(tmp_path, cache_dir, shapes_only, number):
    rng = random.Random(f"accepted recipe {number}")
    config = tiny_config.get_config()
    config.cache_dir = cache_dir
    if rng.random() < 0.8:
        config.stages = rng.choice(["student", "teacher", "teacher,student"])
    values = {key: value_of(config, key) for key in keys_of(config)}
    keys = [key for key, x in values.items() if not isinstance(x, ConfigDict) and "dir" not in key]
    changes = {
        key: plausible(values[key], rng) for key in rng.sample(keys, rng.choice([1, 1, 2, 3]))
    }
    try:
        run = prepare_experiment(change(config, changes), tmp_path)
    except UserError as error:
        assert is_told(error, ""), str(error)  # noqa: PT017
    else:
        run.folds[1:] = []
        run.run()

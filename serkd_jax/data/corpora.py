"""Speech emotion corpora: which utterances there are, and how to read their audio.

To add a corpus, subclass `SpeechCorpus`, say in `list_utterances` what there is, and name the class
in `CORPORA`. Listing decodes no audio, so a corpus is listed and fingerprinted at each start;
`serkd_jax.data.records` then writes its audio records once per fingerprint.
"""

import abc
import csv
import dataclasses
import hashlib
import inspect
import json
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import ClassVar, TextIO

import numpy as np

from serkd_jax.audio import SAMPLE_RATE, read_audio
from serkd_jax.errors import UserError


class CorpusError(UserError):
    """A corpus that cannot be used; the message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class Utterance:
    """One labelled recording; fields that the corpus does not give are empty."""

    id: str
    label: str
    path: str = ""
    speaker: str = ""
    session: str = ""
    split: str = ""  # an official part, e.g. train, dev, test
    fold: str = ""  # the official cross-validation fold that tests on this utterance


class SpeechCorpus(abc.ABC):
    """A corpus: its utterances, sorted by id, and their audio.

    `skipped` holds {"id", "reason"} of files that were found but are no utterances.
    """

    name: ClassVar[str]  # lower_snake_case, also the name of the TFDS dataset
    VERSION: ClassVar[str] = "1.0.0"

    def __init__(self):
        self.skipped: list[dict[str, str]] = []

    @abc.abstractmethod
    def list_utterances(self) -> list[Utterance]:
        """Lists the utterances without decoding audio; read `utterances` instead.

        Raises:
          CorpusError: there is nothing to list, or it makes no sense.
        """

    def read_waveform(self, utterance: Utterance) -> np.ndarray:
        """Float32 (num_samples,) 16 kHz mono audio of an utterance.

        Raises:
          AudioError: the file cannot be used.
        """
        return read_audio(utterance.path)

    @cached_property
    def utterances(self) -> tuple[Utterance, ...]:
        """The utterances sorted by id."""
        return tuple(sorted(self.list_utterances(), key=lambda utterance: utterance.id))

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes in the order of their integer labels: alphabetical."""
        return tuple(sorted({utterance.label for utterance in self.utterances}))

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change with the classes, any utterance's data, or a file."""
        described = [self.name, self.VERSION, self.class_names]
        described += [
            dataclasses.astuple(dataclasses.replace(u, path="")) + self._source(u)
            for u in self.utterances
        ]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]

    def _source(self, utterance: Utterance) -> tuple:
        """What tells that the audio of an utterance has changed: size and time of its file."""
        try:
            stat = Path(utterance.path).stat()
        except OSError:
            return ("missing",)
        return (stat.st_size, stat.st_mtime_ns)


class EmoDB(SpeechCorpus):
    """Berlin Database of Emotional Speech (Burkhardt et al., 2005): 535 utterances, 7 classes.

    Everything is in the file name: 03a01Fa.wav is speaker 03, text a01, emotion F (Freude), take a.
    """

    name = "emodb"
    EMOTIONS: ClassVar[dict[str, str]] = {
        "W": "anger",
        "L": "boredom",
        "E": "disgust",
        "A": "fear",
        "F": "happiness",
        "N": "neutral",
        "T": "sadness",
    }
    FILE_NAME: ClassVar[re.Pattern] = re.compile(r"(\d\d)[ab]\d\d([WLEAFTN])[a-z]")

    def __init__(self, data_dir: str = ""):
        super().__init__()
        if not data_dir:
            raise CorpusError("EMO-DB needs data_dir, the folder that holds wav/*.wav")
        self.data_dir = Path(data_dir)

    @property
    def class_names(self) -> tuple[str, ...]:
        """All seven emotions, also where a part of the corpus is read."""
        return tuple(sorted(self.EMOTIONS.values()))

    def list_utterances(self) -> list[Utterance]:
        """Lists `data_dir/wav/*.wav` or `data_dir/*.wav`."""
        folder = self.data_dir / "wav" if (self.data_dir / "wav").is_dir() else self.data_dir
        if not folder.is_dir():
            raise CorpusError(f"EMO-DB: {folder} is no folder; data_dir must hold wav/*.wav")
        utterances, self.skipped = [], []
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() != ".wav" or path.name.startswith("._"):  # ._* is macOS litter
                continue
            if match := self.FILE_NAME.fullmatch(path.stem):
                speaker, emotion = match.groups()
                label = self.EMOTIONS[emotion]
                utterances.append(Utterance(path.stem, label, str(path), speaker=speaker))
            else:
                reason = f"{path}: not an EMO-DB file name such as 03a01Fa.wav; rename or remove it"
                self.skipped.append({"id": path.stem, "reason": reason})
        if not utterances:
            raise CorpusError(
                f"EMO-DB: {folder} holds no file named like 03a01Fa.wav; "
                "data_dir must be the unpacked corpus, with wav/*.wav"
            )
        return utterances


class Manifest(SpeechCorpus):
    """Any corpus that a CSV or JSONL file lists, EmoBox's published JSONL files included.

    Columns: path, label, and optionally id (default: the path), speaker, session, split, fold.
    EmoBox's names `wav`, `emo` and `key` do as well. Relative paths are looked up below `data_dir`,
    or beside the manifest if there is none; leading folders that are not there are left off.

    A label map {label: class name} renames and merges labels; `label_map.json` beside the manifest
    is used by itself. The classes are the distinct labels after mapping, sorted. EmoBox's folders
    `fold_K/` beside the manifest say which fold tests on an utterance.
    """

    name = "manifest"

    def __init__(self, manifest: str = "", data_dir: str = "", label_map: str = ""):
        super().__init__()
        if not manifest:
            raise CorpusError("give `manifest`, a .csv or .jsonl file with the columns path, label")
        self.manifest = Path(manifest)
        self.data_dir = Path(data_dir) if data_dir else self.manifest.parent
        beside = self.manifest.parent / "label_map.json"
        self.label_map = Path(label_map) if label_map else beside if beside.is_file() else None

    def list_utterances(self) -> list[Utterance]:
        """Lists the rows of the manifest."""
        if not self.manifest.is_file():
            raise CorpusError(f"manifest {self.manifest}: no such file")
        if not self.data_dir.is_dir():
            raise CorpusError(f"data_dir {self.data_dir} is no folder; it must hold the audio")
        classes, folds = self._read_label_map(), self._read_folds()
        utterances, places = [], {}
        for where, values in read_manifest(self.manifest):
            utterance = self._utterance(where, values, classes, folds)
            for what in (f"id {utterance.id!r}", f"file {utterance.path}"):
                if what in places:
                    raise CorpusError(
                        f"{where}: {what} is also at {places[what]}; each row must be a recording "
                        "of its own"
                    )
                places[what] = where
            utterances.append(utterance)
        if not utterances:
            raise CorpusError(f"{self.manifest} lists no utterances; it needs rows of path, label")
        return utterances

    def _utterance(
        self,
        where: str,
        values: dict[str, str],
        classes: dict[str, str] | None,
        folds: dict[str, str],
    ) -> Utterance:
        for column in ("path", "label"):
            if not values.get(column):
                raise CorpusError(
                    f"{where}: no {column}; each row needs path and label, "
                    f"this one has {', '.join(values)}"
                )
        name = values.get("id") or values["path"]
        return Utterance(
            id=name,
            label=self._class_of(values["label"], classes, where),
            path=str(find_file(values["path"], self.data_dir)),
            speaker=values.get("speaker", ""),
            session=values.get("session", ""),
            split=values.get("split", ""),
            fold=values.get("fold") or folds.get(name, ""),
        )

    def _class_of(self, label: str, classes: dict[str, str] | None, where: str) -> str:
        if classes is None:
            return label
        if label in classes:
            return classes[label]
        # EmoBox maps "Neutral" where its data say "neutral".
        matches = {name for key, name in classes.items() if key.lower() == label.lower()}
        if len(matches) != 1:
            raise CorpusError(
                f"{where}: label {label!r} is not in {self.label_map}; "
                f"it has {', '.join(classes)}; add it there or mend the row"
            )
        return matches.pop()

    def _read_label_map(self) -> dict[str, str] | None:
        if self.label_map is None:
            return None
        try:
            classes = json.loads(self.label_map.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError) as error:
            raise CorpusError(f"label map {self.label_map} cannot be read: {error}") from error
        if not isinstance(classes, dict) or not all(isinstance(c, str) for c in classes.values()):
            raise CorpusError(f'label map {self.label_map} must be like {{"label": "class name"}}')
        return classes

    def _read_folds(self) -> dict[str, str]:
        """Ids to the number of the fold whose test list names them."""
        folds = {}
        for path in sorted(self.manifest.parent.glob("fold_*/*_test_fold_*.jsonl")):
            fold = path.parent.name.removeprefix("fold_")
            for where, row in _read_rows(path):
                if (key := str(row.get("key"))) in folds:
                    raise CorpusError(f"{where}: {key!r} is also tested by fold {folds[key]}")
                folds[key] = fold
        return folds


def find_file(path: str, folder: Path) -> Path:
    """Looks for a path, then for its trailing parts, below a folder."""
    parts = Path(path).parts
    candidates = [folder.joinpath(*parts[start:]) for start in range(len(parts))]
    return next((found for found in candidates if found.is_file()), candidates[0])


def read_manifest(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields ("FILE, line N", {column: value}) of a CSV or JSONL file; EmoBox columns are renamed.

    Raises:
      CorpusError: the file cannot be read or a line makes no sense.
    """
    aliases = {"wav": "path", "emo": "label", "key": "id"}
    for where, row in _read_rows(path):
        values = {aliases.get(column, column): value for column, value in row.items()}
        yield where, {str(k): "" if value is None else str(value) for k, value in values.items()}


def _read_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """Yields ("FILE, line N", row) of a CSV or JSONL file."""
    readers = {".csv": _read_csv, ".jsonl": _read_jsonl}
    if (kind := path.suffix.lower()) not in readers:
        raise CorpusError(f"manifest {path}: unknown kind {kind!r}; use .csv or .jsonl")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from readers[kind](file, path)
    except OSError as error:
        raise CorpusError(f"manifest {path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise CorpusError(f"manifest {path}: {error}; save it as UTF-8 text") from error


def _read_csv(file: TextIO, path: Path) -> Iterator[tuple[str, dict]]:
    reader = csv.DictReader(file)
    for row in reader:
        where = f"{path}, line {reader.line_num}"
        if None in row:  # DictReader's key for values without a column
            raise CorpusError(f"{where}: more values than columns; quote values that hold commas")
        yield where, row


def _read_jsonl(file: TextIO, path: Path) -> Iterator[tuple[str, dict]]:
    for number, line in enumerate(file, start=1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise CorpusError(f"{where}: not JSON ({error}); put one object on a line") from error
        if not isinstance(row, dict):
            raise CorpusError(f"{where}: {line.strip()[:40]!r} is not a JSON object")
        yield where, row


@dataclasses.dataclass(frozen=True)
class _Manner:
    """How an emotion sounds in the synthetic corpus, relative to the speaker's own voice."""

    pitch: float  # semitones above the speaker's base
    pitch_range: float  # semitones of movement
    slope: float  # semitones of rise over the utterance
    level: float  # dB
    rate: float  # syllables a second
    tilt: float  # dB per octave of the voice source


class Synthetic(SpeechCorpus):
    """An embedded corpus that needs no download: vowel-like syllables in four manners of speaking.

    Speakers differ in base pitch, vocal tract length, timbre and loudness by about as much as the
    classes do, and every utterance strays from its class, so that the classes can be learned but
    overlap. Two speakers make a session. Audio is a function of `seed` and the utterance alone.
    """

    name = "synthetic"
    MANNERS: ClassVar[dict[str, _Manner]] = {
        "angry": _Manner(4.0, 3.0, -2.0, 5.0, 5.2, -7.0),
        "happy": _Manner(4.5, 4.5, 2.0, 2.0, 5.0, -9.0),
        "neutral": _Manner(0.0, 2.0, -1.0, 0.0, 4.4, -10.0),
        "sad": _Manner(-1.5, 1.0, -1.5, -4.0, 3.2, -12.5),
    }

    def __init__(
        self,
        num_speakers: int = 8,
        utterances_per_class: int = 12,
        min_seconds: float = 1.0,
        max_seconds: float = 2.0,
        seed: int = 0,
    ):
        super().__init__()
        self.parameters = {
            "num_speakers": num_speakers,
            "utterances_per_class": utterances_per_class,
            "min_seconds": min_seconds,
            "max_seconds": max_seconds,
            "seed": seed,
        }
        if num_speakers < 1 or utterances_per_class < 1 or not 0.1 <= min_seconds <= max_seconds:
            raise CorpusError(
                "synthetic corpus: needs at least 1 speaker, 1 utterance per class and "
                f"0.1 <= min_seconds <= max_seconds; got {self.parameters}"
            )

    def list_utterances(self) -> list[Utterance]:
        """Lists ids such as 03_happy_007."""
        return [
            Utterance(
                f"{speaker:02d}_{label}_{take:03d}",
                label,
                speaker=f"{speaker:02d}",
                session=str((speaker + 1) // 2),
            )
            for speaker in range(1, self.parameters["num_speakers"] + 1)
            for label in self.class_names
            for take in range(1, self.parameters["utterances_per_class"] + 1)
        ]

    @property
    def class_names(self) -> tuple[str, ...]:
        """The four manners."""
        return tuple(sorted(self.MANNERS))

    def _source(self, utterance: Utterance) -> tuple:
        return tuple(self.parameters.values())

    def read_waveform(self, utterance: Utterance) -> np.ndarray:
        """Speaks an utterance: float32 (num_samples,) at 16 kHz."""
        seed = self.parameters["seed"]
        take = int(utterance.id.rsplit("_", 1)[1])
        speaker = np.random.default_rng([seed, int(utterance.speaker)])
        voice_pitch = 140 * 2 ** (speaker.normal(0, 3.5) / 12)  # Hz
        tract = np.exp(speaker.normal(0, 0.08))  # scales the formants
        voice_tilt, voice_level = speaker.normal(0, 1.5), speaker.normal(0, 2.0)  # dB

        label = self.class_names.index(utterance.label)
        rng = np.random.default_rng([seed, int(utterance.speaker), label, take])
        seconds = rng.uniform(self.parameters["min_seconds"], self.parameters["max_seconds"])
        manner = self._stray(self.MANNERS[utterance.label], rng)
        return _speak(
            dataclasses.replace(
                manner, tilt=manner.tilt + voice_tilt, level=manner.level + voice_level
            ),
            voice_pitch,
            tract,
            num_samples=int(seconds * SAMPLE_RATE),
            rng=rng,
        )

    @staticmethod
    def _stray(manner: _Manner, rng: np.random.Generator) -> _Manner:
        """One utterance's own manner, some way off its class."""
        return _Manner(
            pitch=manner.pitch + rng.normal(0, 1.8),
            pitch_range=manner.pitch_range * np.exp(rng.normal(0, 0.4)),
            slope=manner.slope + rng.normal(0, 1.5),
            level=manner.level + rng.normal(0, 2.5),
            rate=manner.rate * np.exp(rng.normal(0, 0.15)),
            tilt=manner.tilt + rng.normal(0, 1.5),
        )


_VOWELS = np.array(  # formants F1, F2, F3 in Hz (Peterson and Barney, 1952, men)
    [[730, 1090, 2440], [270, 2290, 3010], [300, 870, 2240], [530, 1840, 2480], [570, 840, 2410]]
)
_FORMANT_WIDTHS = np.array([90.0, 120.0, 180.0])  # Hz


def _speak(
    manner: _Manner, pitch: float, tract: float, num_samples: int, rng: np.random.Generator
) -> np.ndarray:
    """Source-filter synthesis: harmonics of a moving pitch, shaped by each syllable's vowel."""
    time = np.arange(num_samples) / SAMPLE_RATE
    syllable = np.floor(time * manner.rate).astype(int)
    accents = rng.normal(0, 0.5, syllable[-1] + 2)  # the pitch moves from accent to accent
    contour = manner.pitch_range * np.interp(time * manner.rate, np.arange(len(accents)), accents)
    contour += manner.slope * (time / time[-1] - 0.5)
    f0 = pitch * 2 ** ((manner.pitch + contour) / 12)
    rotation = np.exp(2j * np.pi * np.cumsum(f0) / SAMPLE_RATE)

    formants = tract * _VOWELS[rng.integers(len(_VOWELS), size=syllable[-1] + 1)]
    frequencies = pitch * np.arange(1, int(7_600 / f0.max()) + 1)  # no aliasing
    gains = np.abs(
        1 / (1 + 1j * (frequencies[:, None, None] - formants) / (tract * _FORMANT_WIDTHS))
    ).sum(axis=-1)  # (harmonics, syllables)
    gains *= 10 ** (manner.tilt * np.log2(frequencies / pitch) / 20)[:, None]

    voice, harmonic = np.zeros(num_samples), np.ones(num_samples, complex)
    for gain in gains:
        harmonic *= rotation
        voice += gain[syllable] * harmonic.imag
    voice *= np.sin(np.pi * (time * manner.rate % 1)) ** 1.5  # silence between syllables
    voice /= np.sqrt(np.mean(voice**2))
    audio = 0.05 * 10 ** (manner.level / 20) * voice + rng.normal(0, 1e-3, num_samples)
    return np.clip(audio, -1, 1).astype(np.float32)


CORPORA: dict[str, type[SpeechCorpus]] = {
    corpus.name: corpus for corpus in (EmoDB, Manifest, Synthetic)
}


def make_corpus(name: str, **settings) -> SpeechCorpus:
    """Makes a corpus by name; empty settings ('') mean the corpus's own default.

    Raises:
      CorpusError: no such corpus, or a setting it does not know.
    """
    if name not in CORPORA:
        raise CorpusError(f"no corpus is named {name!r}; there are {', '.join(CORPORA)}")
    given = {key: value for key, value in settings.items() if value != ""}
    known = inspect.signature(CORPORA[name]).parameters
    if unknown := given.keys() - known.keys():
        raise CorpusError(
            f"corpus {name!r} has no setting {', '.join(sorted(unknown))}; "
            f"it has {', '.join(known)}"
        )
    return CORPORA[name](**given)

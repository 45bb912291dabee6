"""The base class of corpora: utterances with labels, and how to read their audio.

Listing decodes no audio, so a corpus is listed and fingerprinted at every start;
`serkd_jax.data.audio_records` writes its audio records once per fingerprint.
"""

import abc
import collections
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from serkd_jax.audio.decoding import check_file, read_audio
from serkd_jax.audio.waveform import SAMPLE_RATE, AudioError, to_int16
from serkd_jax.data.tables import DIFFER, CorpusError, alike, is_class_name, is_no_name, tidy
from serkd_jax.files import content_hashes

NAMES = ("id", "label", "speaker", "session", "split", "fold")
MOST_NAMED = 5  # groups of names that look alike


@dataclasses.dataclass(frozen=True)
class Utterance:
    """A labelled recording; fields that the corpus does not provide are empty."""

    id: str
    label: str
    path: str = ""
    speaker: str = ""
    session: str = ""
    split: str = ""  # an official part, e.g. train, dev, test
    fold: str = ""  # the official cross-validation fold that tests on this utterance
    start: float = 0.0  # seconds, if the utterance is a part of the file; so is `end`
    end: float | None = None
    seconds: float | None = None  # how long it is, as the corpus says
    extras: Mapping[str, str | float] = dataclasses.field(default_factory=dict)  # see EXTRAS


@dataclasses.dataclass(frozen=True)
class PublishedCounts:
    """The number of utterances of each class that the authors or the paper report."""

    source: str  # e.g. Table 1
    column: str  # what the rows are: session, split, or empty if there is only one row
    classes: tuple[str, ...]  # in the published order
    rows: Mapping[str, tuple[int, ...]]  # row -> utterances of each class


class SpeechCorpus(abc.ABC):
    """A corpus: its utterances, sorted by id, and their audio.

    Listing fills `skipped` with {"id", "reason"} of things that were found but are not utterances,
    and `notes` with what else a reader of the results should know about this copy.
    """

    name: ClassVar[str]  # lower_snake_case, also the name of the TFDS dataset
    VERSION: ClassVar[str] = "1.1.0"
    CLASSES: ClassVar[tuple[str, ...]] = ()  # alphabetical; if empty, the labels that occur
    SPLITS: ClassVar[tuple[str, ...]] = ()  # official parts; ids begin with them and sort alike
    EXTRAS: ClassVar[Mapping[str, type]] = {}  # further fields of a record, each str or float
    PUBLISHED: ClassVar[PublishedCounts | None] = None
    # Ids of utterances that no copy has, with the (row, class) of PUBLISHED in which they count.
    KNOWN_FLAWS: ClassVar[Mapping[str, tuple[str, str]]] = {}
    HOMEPAGE: ClassVar[str | None] = None
    CITATION: ClassVar[str | None] = None
    LICENSE: ClassVar[str | None] = None

    def __init__(self):
        self.skipped: list[dict[str, str]] = []
        self.notes: list[str] = []

    @abc.abstractmethod
    def list_utterances(self) -> list[Utterance]:
        """Lists the utterances without decoding audio; read `utterances` instead.

        Raises:
            CorpusError: there is nothing to list, or it is malformed.
        """

    def turn_of(self, utterance: Utterance) -> tuple[str, float]:
        """Returns an utterance's dialogue, empty if it is in none, and its place in it.

        Only the order of a speaker's own turns has to be right.
        """
        return str(utterance.extras.get("dialogue", "")), float(utterance.extras.get("turn", 0))

    def check_file(self, utterance: Utterance) -> None:
        """Checks, without decoding, that the audio of an utterance exists.

        Raises:
            AudioError: it does not.
        """
        check_file(utterance.path)

    def read_waveform(self, utterance: Utterance, notices: list[str] | None = None) -> np.ndarray:
        """Reads the audio of an utterance: float32 (num_samples,), 16 kHz mono.

        Args:
            utterance: one of the corpus.
            notices: a list that gets a sentence for each thing that the user should know.

        Raises:
            AudioError: the file cannot be used.
        """
        start, end = utterance.start, utterance.end
        return read_audio(utterance.path, start=start, end=end, notices=notices)

    def read_record(self, utterance: Utterance) -> dict[str, Any]:
        """Makes the record of an utterance, with int16 audio, or {"id", "reason"} if it has none.

        This runs in other processes and needs neither TensorFlow nor JAX.
        """
        notices: list[str] = []
        try:
            audio = to_int16(self.read_waveform(utterance, notices))
        except AudioError as error:
            return {"id": utterance.id, "reason": str(error)}
        record = {name: getattr(utterance, name) for name in NAMES} | dict(utterance.extras)
        there, stated = len(audio) / SAMPLE_RATE, utterance.seconds
        if stated is not None and there > 3 * stated + 5:
            notices.append(f"it lasts {there:.1f} s, but its annotation says {stated:.1f} s")
        digest = hashlib.sha256(audio.tobytes()).hexdigest()[:16]
        record |= {"sha256": digest, "notice": "; ".join(notices)}
        return record | {"audio": audio, "num_samples": len(audio)}

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out what was listed, since other processes get the utterances one by one."""
        listed = ("utterances", "skipped", "notes")
        return {name: value for name, value in self.__dict__.items() if name not in listed}

    @cached_property
    def utterances(self) -> tuple[Utterance, ...]:
        """The utterances sorted by id.

        Raises:
            CorpusError: see `list_utterances`; or two utterances have the same id.
        """
        listed = map(_tidy, self.list_utterances())
        utterances = sorted(listed, key=lambda utterance: utterance.id)
        self.notes += _check_names(utterances)
        counts = collections.Counter(utterance.id for utterance in utterances)
        if twice := [name for name, count in counts.items() if count > 1]:
            raise CorpusError(
                f"{self.name}: {len(twice)} ids are listed more than once, e.g. {twice[0]!r}; "
                "remove the copies"
            )
        return tuple(utterances)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes in the order of their integer labels, which is alphabetical."""
        return self.CLASSES or tuple(sorted({utterance.label for utterance in self.utterances}))

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change with the classes, with any utterance's data and with files."""
        described = [self.name, self.VERSION, self.class_names]
        content = self._content()
        described += [
            (*dataclasses.astuple(dataclasses.replace(u, path="")), content[u.path])
            for u in self.utterances
        ]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]

    def _content(self) -> dict[str, Any]:
        """Returns what tells that the file of a path has changed: the hash of its content."""
        return content_hashes({utterance.path for utterance in self.utterances})


def _tidy(utterance: Utterance) -> Utterance:
    names = {name: tidy(getattr(utterance, name)) for name in NAMES}
    return dataclasses.replace(utterance, **names)


def _check_names(utterances: Sequence[Utterance]) -> list[str]:
    """What a reader must know of names that may not mean what they say.

    Raises:
        CorpusError: two classes have names that look alike, or one cannot be shown.
    """
    notes = []
    for column in NAMES[1:]:
        counts = collections.Counter(getattr(utterance, column) for utterance in utterances)
        # `splits` reads official parts whatever their case.
        groups = alike(counts) if column != "split" else []
        for names in groups[:MOST_NAMED]:
            listed = " and ".join(map(repr, names))
            if column == "label":
                raise CorpusError(
                    f"the classes {listed} {DIFFER}: give both one name in the data, or in a "
                    "label map"
                )
            notes.append(
                f"WARNING: the {column}s {listed} {DIFFER} and are taken as different: if they are "
                f"one {column}, give it one name."
            )
        if more := len(groups[MOST_NAMED:]):
            notes.append(f"WARNING: {more} more groups of {column}s {DIFFER}.")
        if column == "label" and (strange := [n for n in counts if not is_class_name(n)]):
            raise CorpusError(
                f"the class {strange[0]!r} cannot be shown: use up to 100 printable characters"
            )
        for name in filter(is_no_name, filter(None, counts)):
            notes.append(
                f"WARNING: {counts[name]} utterances have the {column} {name!r}, which is taken as "
                "a name: leave it empty if it is missing."
            )
    return notes


class Release(SpeechCorpus):
    """A corpus that is read from its folder as its authors publish it."""

    FOLDER: ClassVar[str]  # what `data_dir` must be
    HOW_TO_GET: ClassVar[str]

    def __init__(self, data_dir: str = ""):
        super().__init__()
        if not data_dir:
            raise CorpusError(f"{self.name} needs data_dir, {self.FOLDER}")
        self.data_dir = Path(data_dir)

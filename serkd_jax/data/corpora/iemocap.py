"""IEMOCAP (Busso et al., 2008) as USC publishes it."""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from serkd_jax.audio.decoding import is_litter
from serkd_jax.data.corpora.base import (
    CorpusError,
    PublishedCounts,
    Release,
    Utterance,
)


class IEMOCAP(Release):
    """Interactive emotional dyadic motion capture database: acted dialogues of ten speakers.

    It has the four classes of the paper (Section 4.1.1), which are neutral, happy (happiness and
    excitement), sad and angry: 5,531 of the 10,039 turns. It is read from `data_dir`, which is
    IEMOCAP_full_release or the folder that holds it: `SessionN/dialog/EmoEvaluation/*.txt` list the
    turns and `SessionN/sentences/wav/DIALOG/TURN.wav` have their audio. A speaker is the session
    with F or M, taken from the *end* of a turn's name; the F or M in the middle of the name is the
    speaker who wore the markers.
    """

    name = "iemocap"
    FOLDER = "the folder IEMOCAP_full_release"
    EMOTIONS: ClassVar[dict[str, str]] = {
        "neu": "neutral",
        "hap": "happy",
        "exc": "happy",
        "sad": "sad",
        "ang": "angry",
    }
    CLASSES = ("angry", "happy", "neutral", "sad")
    SESSIONS = ("1", "2", "3", "4", "5")
    EXTRAS: ClassVar[dict[str, type]] = {
        "emotion": str,  # before merging, e.g. hap or exc
        "style": str,  # improvised or scripted
        "valence": float,  # mean over the annotators, 1 to 5; so are the next two
        "arousal": float,
        "dominance": float,
    }
    PUBLISHED = PublishedCounts(
        source="Table 1 of the paper",
        column="session",
        classes=("neutral", "happy", "sad", "angry"),
        rows={
            "1": (384, 278, 194, 229),
            "2": (362, 327, 197, 137),
            "3": (320, 286, 305, 240),
            "4": (258, 303, 143, 327),
            "5": (384, 442, 245, 170),
        },
    )
    HOMEPAGE = "https://sail.usc.edu/iemocap/"
    LICENSE = "By agreement with USC's SAIL laboratory, for research; not to be passed on."
    HOW_TO_GET = (
        "Ask for IEMOCAP at https://sail.usc.edu/iemocap/iemocap_release.htm and unpack it, so "
        "that the manual folder is, or holds, IEMOCAP_full_release with Session1 to Session5."
    )
    CITATION = """@article{busso2008iemocap,
  title={{IEMOCAP}: Interactive emotional dyadic motion capture database},
  author={Busso, Carlos and Bulut, Murtaza and Lee, Chi-Chun and Kazemzadeh, Abe and Mower, Emily
    and Kim, Samuel and Chang, Jeannette N. and Lee, Sungbok and Narayanan, Shrikanth S.},
  journal={Language Resources and Evaluation},
  volume={42}, number={4}, pages={335--359}, year={2008}
}"""

    # [6.2901 - 8.2357]<TAB>Ses01F_impro01_F000<TAB>neu<TAB>[2.5000, 2.5000, 2.5000]
    _LINE = re.compile(
        r"\[\s*{0} - {0}\s*\]\t(\S+)\t(\w+)\t\[({0}), ({0}), ({0})\]\s*".format(r"\d+(?:\.\d+)?")
    )
    _TURN = re.compile(r"(Ses0([1-5])[FM]_(impro|script)\w*)_([FM])\d{3}")

    def turn_of(self, utterance: Utterance) -> tuple[str, float]:
        """See `SpeechCorpus`; the turns of each speaker have numbers of their own."""
        dialogue, _, turn = utterance.id.rpartition("_")
        return dialogue, float(turn[1:])

    def list_utterances(self) -> list[Utterance]:
        """Lists the turns of the four classes in the evaluation files."""
        root = self._root()
        self.skipped, self.notes = [], []
        utterances, others = [], Counter()
        for session in self.SESSIONS:
            for turn in self._turns(root / f"Session{session}", session):
                if turn.label:
                    utterances.append(turn)
                else:
                    others[turn.extras["emotion"]] += 1
        if not utterances:
            raise CorpusError(
                f"IEMOCAP: {root} has no turn of the classes {', '.join(self.CLASSES)}; "
                f"{' '.join(self.notes) or 'unpack the release again'}"
            )
        if others:
            listed = ", ".join(f"{emotion} {count:,}" for emotion, count in others.most_common())
            self.notes.append(
                f"{others.total():,} turns have a label outside the protocol: {listed}."
            )
        return utterances

    def _root(self) -> Path:
        for root in (self.data_dir, self.data_dir / "IEMOCAP_full_release"):
            if any((root / f"Session{session}").is_dir() for session in self.SESSIONS):
                return root
        raise CorpusError(
            f"IEMOCAP: neither {self.data_dir} nor an IEMOCAP_full_release in it has folders "
            "Session1 to Session5; data_dir must be the unpacked release"
        )

    def _turns(self, folder: Path, session: str) -> Iterator[Utterance]:
        """Yields the turns of a session; turns of other classes have no label."""
        evaluations = sorted((folder / "dialog" / "EmoEvaluation").glob("*.txt"))
        evaluations = [path for path in evaluations if path.is_file() and not is_litter(path)]
        if not evaluations:
            what = folder.name if not folder.is_dir() else f"{folder.name}/dialog/EmoEvaluation"
            self.notes.append(f"{what} is missing or empty: no turn of session {session} is used.")
        elif not (folder / "sentences" / "wav").is_dir():
            self.notes.append(f"{folder.name}/sentences/wav is missing.")
        for path in evaluations:
            # Nothing but the names of annotators is ever non-ASCII.
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            turns = [(n, line) for n, line in enumerate(lines, 1) if re.match(r"\[\s*\d", line)]
            if not turns:
                reason = f"{path}: has no turns; copy the file from the release again"
                self.skipped.append({"id": path.name, "reason": reason})
            for number, line in turns:
                if turn := self._turn(line, f"{path}, line {number}", folder, session):
                    yield turn

    def _turn(self, line: str, where: str, folder: Path, session: str) -> Utterance | None:
        fields = self._LINE.fullmatch(line)
        name = self._TURN.fullmatch(fields[1]) if fields else None
        if name is None or name[2] != session:
            problem = "not a turn of this session" if fields else "not a complete annotation"
            reason = f"{where}: {problem}: {line[:80]!r}; copy the file from the release again"
            self.skipped.append({"id": fields[1] if fields else where, "reason": reason})
            return None
        dialog, _, style, sex = name.groups()
        _, emotion, *attributes = fields.groups()
        valence, arousal, dominance = map(float, attributes)
        return Utterance(
            id=name[0],
            label=self.EMOTIONS.get(emotion, ""),
            path=str(folder / "sentences" / "wav" / dialog / f"{name[0]}.wav"),
            speaker=f"{session}{sex}",
            session=session,
            extras={
                "emotion": emotion,
                "style": {"impro": "improvised", "script": "scripted"}[style],
                "valence": valence,
                "arousal": arousal,
                "dominance": dominance,
            },
        )

"""MELD (Poria et al., 2019), read from MELD.Raw as published."""

import re
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
from serkd_jax.data.tables import read_rows


class MELD(Release):
    """Multimodal EmotionLines Dataset: 13,708 utterances of the series Friends, seven emotions.

    It is read from `data_dir`, which holds, anywhere up to three folders deep, the annotations
    `train_sent_emo.csv`, `dev_sent_emo.csv` and `test_sent_emo.csv` and the recordings
    `dia{D}_utt{U}.mp4` in `train_splits`, `dev_splits_complete` and `output_repeated_splits_test`,
    or in `train`, `dev` and `test`. If there is a `.wav` or `.flac` of the same name, with or
    without the `.mp4`, it is read instead.
    """

    name = "meld"
    FOLDER = "the folder MELD.Raw"
    CLASSES = ("anger", "disgust", "fear", "joy", "neutral", "sadness", "surprise")
    SPLITS = ("dev", "test", "train")
    EXTRAS: ClassVar[dict[str, type]] = {"text": str, "sentiment": str}
    FOLDERS: ClassVar[dict[str, str]] = {
        "train": "train_splits",
        "dev": "dev_splits_complete",
        "test": "output_repeated_splits_test",
    }
    PUBLISHED = PublishedCounts(
        source="Table 2 of the paper",  # where the sum for sadness should be 1,002
        column="split",
        classes=CLASSES,
        rows={
            "train": (1109, 271, 268, 1743, 4710, 683, 1205),
            "dev": (153, 22, 40, 163, 470, 111, 150),
            "test": (345, 68, 50, 402, 1256, 208, 281),
        },
    )
    # The first cannot be decoded; the second is in no copy of the release.
    KNOWN_FLAWS: ClassVar[dict[str, tuple[str, str]]] = {
        "train_dia125_utt3": ("train", "neutral"),
        "dev_dia110_utt7": ("dev", "neutral"),
    }
    HOMEPAGE = "https://affective-meld.github.io/"
    LICENSE = "The annotations are GPL-3.0; the recordings are of a television series."
    HOW_TO_GET = (
        "Fetch MELD.Raw.tar.gz from https://affective-meld.github.io/, unpack it and the three "
        "archives in it, so that the manual folder is, or holds, MELD.Raw."
    )
    CITATION = """@inproceedings{poria2019meld,
  title={{MELD}: A Multimodal Multi-Party Dataset for Emotion Recognition in Conversations},
  author={Poria, Soujanya and Hazarika, Devamanyu and Majumder, Navonil and Naik, Gautam and
    Cambria, Erik and Mihalcea, Rada},
  booktitle={Proceedings of the 57th Annual Meeting of the Association for Computational
    Linguistics},
  pages={527--536}, year={2019}
}"""

    _COLUMNS = ("Utterance", "Speaker", "Emotion", "Sentiment", "Dialogue_ID", "Utterance_ID")
    _SUFFIXES = (".wav", ".flac", ".mp4")  # in this order

    def turn_of(self, utterance: Utterance) -> tuple[str, float]:
        """See `SpeechCorpus`; the id has both."""
        dialogue, _, turn = utterance.id.rpartition("_utt")
        return dialogue, float(turn)

    def list_utterances(self) -> list[Utterance]:
        """Lists the rows of the annotation files."""
        if not self.data_dir.is_dir():
            raise CorpusError(f"MELD: {self.data_dir} is not a folder; data_dir must be MELD.Raw")
        self.skipped, self.notes = [], []
        utterances = []
        for split in self.FOLDERS:
            annotations = self._find(f"{split}_sent_emo.csv")
            if annotations is None:
                self.notes.append(f"{split}_sent_emo.csv is missing: the {split} part is not used.")
            else:
                utterances += self._split(split, annotations)
        if not utterances:
            raise CorpusError(
                f"MELD: no utterance is listed below {self.data_dir}; it must hold "
                "train_sent_emo.csv, dev_sent_emo.csv and test_sent_emo.csv"
            )
        return utterances

    def _find(self, name: str) -> Path | None:
        """Finds the shallowest file or folder of this name."""
        for depth in range(4):
            found = sorted(self.data_dir.glob("*/" * depth + name))
            if found := [path for path in found if not is_litter(path)]:
                return found[0]
        return None

    def _split(self, split: str, annotations: Path) -> list[Utterance]:
        """Lists one part; recordings that its annotations do not name are skipped."""
        name = self.FOLDERS[split]
        folder = self._find(name) or self._find(split)
        if folder is None:
            self.notes.append(f"No folder {name} below {self.data_dir}.")
            folder = self.data_dir / name
        files = {
            path.name.lower(): path
            for path in (sorted(folder.iterdir()) if folder.is_dir() else ())
            if path.suffix.lower() in self._SUFFIXES and not is_litter(path)
        }
        utterances = list(self._rows(split, annotations, folder, files))
        if not utterances:
            self.notes.append(f"{annotations} lists no utterance.")
        used = {Path(utterance.path).stem.lower() for utterance in utterances}
        for path in files.values():
            if path.stem.lower() not in used:
                reason = f"{path}: not an utterance, {annotations.name} does not list it"
                self.skipped.append({"id": f"{split}/{path.name}", "reason": reason})
        return utterances

    def _rows(
        self, split: str, annotations: Path, folder: Path, files: dict[str, Path]
    ) -> Iterator[Utterance]:
        for where, row in read_rows(annotations):
            if missing := [name for name in self._COLUMNS if name not in row]:
                raise CorpusError(
                    f"{annotations} has no column {', '.join(missing)}; it has {', '.join(row)}. "
                    "Fetch it from MELD's repository again"
                )
            numbers = (row["Dialogue_ID"] or "", row["Utterance_ID"] or "")
            emotion = (row["Emotion"] or "").strip().lower()
            if emotion not in self.CLASSES or not all(re.fullmatch(r"\d+", n) for n in numbers):
                reason = f"{where}: no emotion or no ids ({emotion!r}, {', '.join(numbers)!r})"
                self.skipped.append({"id": where, "reason": f"{reason}; correct the row"})
                continue
            stem = "dia{}_utt{}".format(*map(int, numbers))
            names = [stem + suffix for suffix in self._SUFFIXES]
            yield Utterance(
                id=f"{split}_{stem}",
                label=emotion,
                path=str(next((files[n] for n in names if n in files), folder / names[-1])),
                speaker=(row["Speaker"] or "").strip(),
                split=split,
                seconds=_seconds_between(row.get("StartTime", ""), row.get("EndTime", "")),
                extras={"text": row["Utterance"] or "", "sentiment": row["Sentiment"] or ""},
            )


def _seconds_between(start: str, end: str) -> float | None:
    """Returns the seconds from one time to another, such as 00:20:57,256; None if there is none."""
    found = [re.fullmatch(r"(\d+):(\d+):(\d+)[,.](\d{3})", time) for time in (start, end)]
    if None in found:
        return None
    first, last = (
        3600 * int(h) + 60 * int(m) + int(s) + int(ms) / 1000
        for h, m, s, ms in (match.groups() for match in found if match)
    )
    return last - first if last > first else None

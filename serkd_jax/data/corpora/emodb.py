"""The Berlin Database of Emotional Speech."""

import re
from typing import ClassVar

from serkd_jax.audio.decoding import is_litter
from serkd_jax.data.corpora.base import (
    CorpusError,
    PublishedCounts,
    Release,
    Utterance,
)


class EmoDB(Release):
    """Berlin Database of Emotional Speech (Burkhardt et al., 2005): 535 utterances, 7 classes.

    The file name has all data: 03a01Fa.wav is speaker 03, text a01, emotion F (Freude), take a.
    """

    name = "emodb"
    FOLDER = "the folder that holds wav/*.wav"
    EMOTIONS: ClassVar[dict[str, str]] = {
        "W": "anger",
        "L": "boredom",
        "E": "disgust",
        "A": "fear",
        "F": "happiness",
        "N": "neutral",
        "T": "sadness",
    }
    CLASSES = tuple(sorted(EMOTIONS.values()))
    PUBLISHED = PublishedCounts(
        source="Burkhardt et al. (2005)",
        column="",
        classes=CLASSES,
        rows={"all": (127, 81, 46, 69, 71, 79, 62)},
    )
    HOMEPAGE = "http://emodb.bilderbar.info/"
    LICENSE = "Free of charge for research."
    HOW_TO_GET = (
        "Fetch http://emodb.bilderbar.info/download/download.zip and unpack it, so that the manual "
        "folder holds wav/*.wav."
    )
    CITATION = """@inproceedings{burkhardt2005emodb,
  title={A database of {German} emotional speech},
  author={Burkhardt, Felix and Paeschke, Astrid and Rolfes, Miriam and Sendlmeier, Walter F. and
    Weiss, Benjamin},
  booktitle={Proc. Interspeech},
  pages={1517--1520}, year={2005}
}"""
    FILE_NAME: ClassVar[re.Pattern] = re.compile(r"(\d\d)[ab]\d\d([WLEAFTN])[a-z]")

    def list_utterances(self) -> list[Utterance]:
        """Lists `data_dir/wav/*.wav` or `data_dir/*.wav`."""
        folder = self.data_dir / "wav" if (self.data_dir / "wav").is_dir() else self.data_dir
        if not folder.is_dir():
            raise CorpusError(f"EMO-DB: {folder} is not a folder; data_dir must hold wav/*.wav")
        utterances, self.skipped = [], []
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() != ".wav" or is_litter(path):
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

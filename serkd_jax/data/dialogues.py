"""Whole dialogues as examples, for students that classify an utterance by its dialogue."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from serkd_jax.data.corpora.base import SpeechCorpus
from serkd_jax.data.examples import Examples
from serkd_jax.data.reader import Table
from serkd_jax.errors import UserError
from serkd_jax.models.students.mmdfn import MARKS


@dataclass(frozen=True)
class Dialogues:
    """The dialogue of each of n utterances; U is the length of the longest.

    Attributes:
        members: (n, U) int32, the rows of the utterances of its dialogue in order; -1 after them.
        speakers: (n, U) int32, for each of them the place of the first one of its speaker.
    """

    members: np.ndarray
    speakers: np.ndarray

    def shape(self, width: int) -> tuple[int, int]:
        """Returns the shape of an example, (U, N + 2), for utterances' vectors of width N."""
        return self.members.shape[1], width + MARKS

    @property
    def fingerprint(self) -> str:
        """Changes with the utterances of any dialogue, and who says them."""
        digest = hashlib.sha256(self.members.tobytes())
        digest.update(self.speakers.tobytes())
        return digest.hexdigest()[:16]

    def num_bytes(self, width: int) -> int:
        """Returns the size of the examples of all utterances, for vectors of this width."""
        return 2 * self.members.size * (width + MARKS)


def find_dialogues(corpus: SpeechCorpus, table: Table) -> Dialogues:
    """Finds the dialogue of each utterance that is in the records; others are left out.

    Raises:
        UserError: an utterance is in no dialogue, or has no speaker.
    """
    turns = {each.id: corpus.turn_of(each) for each in corpus.utterances}  # dialogue and place
    ids = table.ids.tolist()
    groups: dict[str, list[int]] = {}
    for row, key in enumerate(ids):
        dialogue = turns[key][0]
        if not dialogue or not table.speakers[row]:
            lacks = "speaker" if dialogue else "dialogue"
            raise UserError(
                f"{corpus.name}: {key} has no {lacks}, which this student needs: use another "
                "student.kind, or a manifest with the columns speaker, dialogue and turn"
            )
        groups.setdefault(dialogue, []).append(row)
    longest = max(map(len, groups.values()))
    members = np.full((len(ids), longest), -1, np.int32)
    speakers = np.zeros_like(members)
    for rows in groups.values():
        rows.sort(key=lambda row: (turns[ids[row]][1], ids[row]))
        names = [table.speakers[row] for row in rows]
        members[rows, : len(rows)] = rows
        speakers[rows, : len(rows)] = [names.index(name) for name in names]
    return Dialogues(members, speakers)


def dialogue_examples(
    dialogues: Dialogues,
    frames: Examples,
    labels: Sequence[int],
    devices: list[jax.Device],
    resident: bool,
) -> Examples:
    """Makes examples that are utterances with their whole dialogues.

    An input is float16 (U, N + 2): a row for each utterance of the dialogue, with the mean of its
    frames, the place of the first utterance of its speaker, and 1 if it is the one to classify.

    Args:
        dialogues: the dialogue of each utterance.
        frames: the utterances' frames.
        labels: (n,) int, their classes.
        devices: the devices of all processes.
        resident: whether to put the inputs on the devices; otherwise they are made when needed.
    """
    vectors = np.concatenate(
        [
            [x[:n].mean(0, dtype=np.float32) for x, n in zip(inputs, lengths, strict=True)]
            for _, inputs, lengths in frames.chunks()
        ]
    ).astype(np.float16)

    def read(rows: np.ndarray) -> np.ndarray:
        members = dialogues.members[rows]
        marks = np.stack([dialogues.speakers[rows], members == rows[:, None]], axis=-1)
        inputs = np.concatenate([vectors[members], marks.astype(np.float16)], axis=-1)
        return inputs * (members >= 0)[..., None]

    index = np.arange(len(vectors), dtype=np.int32)
    lengths = (dialogues.members >= 0).sum(1).astype(np.int32)
    columns = {"length": lengths, "index": index, "label": np.asarray(labels)}
    if resident:
        columns["inputs"] = read(index)
    return Examples({}, devices, None if resident else read).with_columns(**columns)

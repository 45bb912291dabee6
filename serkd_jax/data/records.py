"""Audio records: a corpus as TFRecords, written once; `tfds.builder_from_directory` opens them."""

import contextlib
import dataclasses
import io
import logging
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from serkd_jax.audio import AudioError, check_audio, to_int16
from serkd_jax.data.corpora import CorpusError, SpeechCorpus, Utterance
from serkd_jax.errors import UserError

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # no banners; errors still show
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # nor its notice; TF only reads files here
import tensorflow as tf
import tensorflow_datasets as tfds
from google.protobuf import json_format

for kind in ("GPU", "TPU"):  # the accelerators belong to JAX
    tf.config.set_visible_devices([], kind)
# TFDS 4.9.10 warns of its own use of a deprecated property, once per feature.
logging.getLogger("absl").addFilter(
    lambda record: "`FeatureConnector.dtype` is deprecated" not in record.getMessage()
)

SPLIT = "utterances"  # the one TFDS split; TFDS keeps the name "all" for the union of splits


class RecordsError(UserError):
    """Records that cannot be written or read; the message names the place and the remedy."""


@dataclasses.dataclass(frozen=True)
class Table:
    """What the records say of each utterance, audio apart; all columns are sorted by id."""

    ids: np.ndarray  # (n,) str
    labels: np.ndarray  # (n,) int32, index into class_names
    class_names: tuple[str, ...]
    speakers: np.ndarray  # (n,) str, as are the next three; empty where the corpus has none
    sessions: np.ndarray
    splits: np.ndarray
    folds: np.ndarray
    num_samples: np.ndarray  # (n,) int32, at 16 kHz
    skipped: list[dict[str, str]]  # {"id", "reason"} of files that could not be used

    def __len__(self) -> int:
        return len(self.ids)


def utterance_features(class_names: Collection[str]) -> dict[str, tfds.features.FeatureConnector]:
    """The TFDS features that audio and feature records share."""
    texts = ("id", "speaker", "session", "split", "fold")
    return {
        **{name: tfds.features.Text() for name in texts},
        "label": tfds.features.ClassLabel(names=list(class_names)),
    }


class AudioRecords(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes any corpus as one TFDS split of int16 audio at 16 kHz, in the order of the ids.

    Files that cannot be used are left out, and named with the reason in `info.metadata["skipped"]`.
    """

    def __init__(self, corpus: SpeechCorpus, data_dir: str | os.PathLike):
        self.corpus = corpus
        self.name = corpus.name
        self.VERSION = tfds.core.Version(corpus.VERSION)
        super().__init__(data_dir=data_dir)

    def _info(self) -> tfds.core.DatasetInfo:
        audio = tfds.features.Tensor(shape=(None,), dtype=np.int16, encoding="bytes")
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.corpus.__doc__,
            features=tfds.features.FeaturesDict(
                {
                    **utterance_features(self.corpus.class_names),
                    "audio": audio,
                    "num_samples": tfds.features.Scalar(np.int32),
                }
            ),
            metadata=tfds.core.MetadataDict(corpus_fingerprint=self.corpus.fingerprint),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {SPLIT: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict]]:
        skipped = list(self.corpus.skipped)
        utterances = tqdm(self.corpus.utterances, f"{self.name}: audio", unit="file")
        for index, utterance in enumerate(utterances):
            try:
                audio = check_audio(self.corpus.read_waveform(utterance), utterance.id)
            except AudioError as error:
                skipped.append({"id": utterance.id, "reason": str(error)})
            else:
                yield index, _example(utterance, to_int16(audio))
        if len(skipped) == len(self.corpus.skipped) + len(self.corpus.utterances):
            raise CorpusError(
                f"{self.name}: none of {len(self.corpus.utterances)} audio files can be used; "
                f"the first: {skipped[-1]['reason']}"
            )
        self.info.metadata["skipped"] = skipped


def _example(utterance: Utterance, audio: np.ndarray) -> dict:
    example = dataclasses.asdict(utterance) | {"audio": audio, "num_samples": len(audio)}
    del example["path"]
    return example


def prepare_records(corpus: SpeechCorpus, cache_dir: str | os.PathLike) -> Path:
    """Writes the audio records of a corpus, unless they are there, and returns their folder.

    The folder appears when it is whole: TFDS writes into a temporary one and renames it. One
    process at a time may prepare the same corpus.

    Raises:
      CorpusError: the corpus cannot be listed, or none of its files can be used.
    """
    root = Path(cache_dir) / "records" / f"{corpus.name}-{corpus.fingerprint}"
    folder = root / corpus.name / corpus.VERSION  # TFDS's layout
    if not folder.exists():
        for leftover in folder.parent.glob("incomplete.*"):  # of a run that was killed
            shutil.rmtree(leftover)
        tfds.disable_progress_bar()
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints what it "downloads"
            offline = tfds.download.DownloadConfig(try_download_gcs=False)
            AudioRecords(corpus, root).download_and_prepare(download_config=offline)
    if skipped := load_info(folder).metadata.get("skipped"):
        tqdm.write(f"{corpus.name}: {len(skipped)} files skipped, e.g. {skipped[0]['reason']}")
    return folder


def load_table(records_dir: str | os.PathLike) -> Table:
    """Reads everything but the audio.

    Raises:
      RecordsError: the folder is no records folder, or is damaged.
    """
    info = load_info(records_dir)
    names = ("id", "label", "speaker", "session", "split", "fold", "num_samples")
    examples = list(read_examples(records_dir, names))

    def column(name: str, dtype: type) -> np.ndarray:
        return np.array([example[name] for example in examples], dtype)

    return Table(
        ids=column("id", str),
        labels=column("label", np.int32),
        class_names=tuple(info.features["label"].names),
        speakers=column("speaker", str),
        sessions=column("session", str),
        splits=column("split", str),
        folds=column("fold", str),
        num_samples=column("num_samples", np.int32),
        skipped=info.metadata.get("skipped", []),
    )


def load_waveforms(
    records_dir: str | os.PathLike, max_samples: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loads all audio, cut or zero-padded to one length.

    Returns:
      ids (n,) str, sorted; audio int16 (n, max_samples); num_samples int32 (n,), at most
      max_samples.
    """
    count = load_info(records_dir).splits[SPLIT].num_examples
    ids, audio = [], np.zeros((count, max_samples), np.int16)
    num_samples = np.zeros(count, np.int32)
    for row, example in enumerate(read_examples(records_dir, ("id", "audio"))):
        ids.append(example["id"])
        num_samples[row] = min(len(example["audio"]), max_samples)
        audio[row, : num_samples[row]] = example["audio"][:max_samples]
    return np.array(ids, str), audio, num_samples


def load_info(folder: str | os.PathLike) -> tfds.core.DatasetInfo:
    """The TFDS description of a records folder.

    Raises:
      RecordsError: the folder holds no whole dataset.
    """
    with _readable_errors(folder):
        return tfds.builder_from_directory(folder).info


def read_examples(folder: str | os.PathLike, names: Collection[str]) -> Iterator[dict]:
    """Streams the named features of each example, in the stored order; text comes as str.

    Raises:
      RecordsError: the folder is damaged.
    """
    with _readable_errors(folder):
        builder = tfds.builder_from_directory(folder)
        features = builder.info.features
        texts = [name for name in names if isinstance(features[name], tfds.features.Text)]
        dataset = builder.as_dataset(
            split=SPLIT,
            decoders=tfds.decode.PartialDecoding(dict.fromkeys(names, True)),
            read_config=tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False),
        )
        count = 0
        for count, example in enumerate(dataset.as_numpy_iterator(), start=1):  # noqa: B007
            yield example | {name: example[name].decode() for name in texts}
        if count != builder.info.splits[SPLIT].num_examples:
            raise ValueError(f"{count} of {builder.info.splits[SPLIT].num_examples} examples")


@contextlib.contextmanager
def _readable_errors(folder: str | os.PathLike) -> Iterator[None]:
    try:
        yield
    except (tf.errors.OpError, json_format.Error, OSError, ValueError, KeyError) as error:
        problem = " ".join(str(error).split())[:200]
        raise RecordsError(
            f"{folder} is missing or damaged ({type(error).__name__}: {problem}); "
            "delete this folder and run again to rebuild it"
        ) from error

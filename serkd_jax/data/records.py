"""Audio records: a corpus as TFRecords, written once; `tfds.builder_from_directory` opens them."""

import contextlib
import dataclasses
import fcntl
import inspect
import io
import json
import logging
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from tqdm import tqdm

from serkd_jax.data import corpora
from serkd_jax.data.corpora.base import CorpusError, Release, SpeechCorpus, Utterance
from serkd_jax.errors import UserError
from serkd_jax.waveform import AudioError

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # no banners; errors still show
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # nor its notice; TF only reads files here
import tensorflow as tf
import tensorflow_datasets as tfds
from google.protobuf import json_format
from tensorflow.python.lib.io.tf_record import tf_record_random_reader

for kind in ("GPU", "TPU"):  # the accelerators belong to JAX
    tf.config.set_visible_devices([], kind)
# TFDS 4.9.10 warns of its own use of a deprecated property, once per feature.
logging.getLogger("absl").addFilter(
    lambda record: "`FeatureConnector.dtype` is deprecated" not in record.getMessage()
)

SPLIT = "utterances"  # the TFDS split of a corpus that has none of its own
PARALLEL_FROM = 512  # recordings; of fewer, starting processes takes as long as decoding
CHUNK = 256  # recordings that are decoded before the first of them is written


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
    """Writes a corpus as int16 audio at 16 kHz, in the order of the ids.

    The TFDS splits are the corpus's own, or one that is called `utterances`. Files that cannot be
    used are left out, and named with the reason in `skipped-*.jsonl` beside the records.
    """

    CORPUS: ClassVar[type[Release]]  # what `tfds build` makes of the manual folder
    VERSION = tfds.core.Version(SpeechCorpus.VERSION)

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.VERSION = tfds.core.Version(cls.CORPUS.VERSION)
        cls.MANUAL_DOWNLOAD_INSTRUCTIONS = cls.CORPUS.HOW_TO_GET

    def __init__(self, corpus: SpeechCorpus | None = None, **kwargs):
        self.corpus = corpus
        self._described = corpus or self.CORPUS
        self.name = self._described.name
        self.VERSION = tfds.core.Version(self._described.VERSION)
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        corpus = self._described
        audio = tfds.features.Tensor(shape=(None,), dtype=np.int16, encoding="bytes")
        kinds = {str: tfds.features.Text(), float: tfds.features.Scalar(np.float32)}
        return tfds.core.DatasetInfo(
            builder=self,
            description=inspect.cleandoc(corpus.__doc__),
            homepage=corpus.HOMEPAGE,
            citation=corpus.CITATION,
            license=corpus.LICENSE,
            features=tfds.features.FeaturesDict(
                {
                    **utterance_features(corpus.CLASSES or corpus.class_names),
                    **{name: kinds[kind] for name, kind in corpus.EXTRAS.items()},
                    "audio": audio,
                    "num_samples": tfds.features.Scalar(np.int32),
                }
            ),
            supervised_keys=("audio", "label"),
            metadata=tfds.core.MetadataDict(),
            disable_shuffling=True,
        )

    def download_and_prepare(
        self, *, download_config: tfds.download.DownloadConfig | None = None, **kwargs
    ) -> None:
        """Writes the records; by Apache Beam if the config names a runner or options for it."""
        config = download_config or tfds.download.DownloadConfig()
        self._use_beam = bool(config.beam_runner or config.beam_options)
        try:
            super().download_and_prepare(download_config=config, **kwargs)
        except Exception as error:  # Beam raises whatever a worker did
            if not self._use_beam or isinstance(error, UserError):
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise RecordsError(f"{self.name}: Apache Beam failed: {reason}") from error

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        corpus = self.corpus or self.CORPUS(data_dir=str(dl_manager.manual_dir))
        present, missing = [], []
        for utterance in corpus.utterances:
            try:
                corpus.check_file(utterance)
                present.append(utterance)
            except AudioError as error:
                missing.append({"id": utterance.id, "reason": str(error)})
        if not present:
            problem = f"{corpus.name}: none of {len(missing)} audio files can be used; the first: "
            raise CorpusError(" ".join([f"{problem}{missing[0]['reason']}.", *corpus.notes]))
        self.info.metadata["corpus_fingerprint"] = corpus.fingerprint
        _write_skipped(self._skipped_path("missing"), missing)
        parts = {}
        for utterance in present:
            parts.setdefault(utterance.split if corpus.SPLITS else SPLIT, []).append(utterance)
        if self._use_beam:
            return {s: _beam_examples(corpus, u, self._skipped_path(s)) for s, u in parts.items()}
        return {s: self._generate_examples(corpus, s, u) for s, u in parts.items()}

    def _generate_examples(
        self, corpus: SpeechCorpus, split: str, utterances: list[Utterance]
    ) -> Iterator[tuple[int, dict]]:
        skipped = []
        bar = tqdm(total=len(utterances), desc=f"{corpus.name}: {split}", unit="file")
        with bar, _parallel_map(len(utterances)) as parallel_map:
            for first in range(0, len(utterances), CHUNK):
                chunk = utterances[first : first + CHUNK]
                for index, example in enumerate(parallel_map(corpus.read_record, chunk), first):
                    if "reason" in example:
                        skipped.append(example)
                    else:
                        yield index, example
                bar.update(len(chunk))
        if len(skipped) == len(utterances):
            raise CorpusError(
                f"{corpus.name}: none of {len(utterances)} audio files of {split} can be used; "
                f"the first: {skipped[0]['reason']}"
            )
        _write_skipped(self._skipped_path(split), skipped)

    def _skipped_path(self, part: str) -> tfds.core.Path:
        return self.data_path / f"skipped-{part}.jsonl"


class Iemocap(AudioRecords):
    """`tfds build iemocap --imports=serkd_jax.data.records --manual_dir=IEMOCAP_full_release`."""

    CORPUS = corpora.IEMOCAP


class Meld(AudioRecords):
    """`tfds build meld --imports=serkd_jax.data.records --manual_dir=MELD.Raw`."""

    CORPUS = corpora.MELD


class Emodb(AudioRecords):
    """`tfds build emodb --imports=serkd_jax.data.records --manual_dir=EMODB`."""

    CORPUS = corpora.EmoDB


@contextlib.contextmanager
def _parallel_map(size: int) -> Iterator[Callable]:
    """`map` by a process for each core; threads decode videos slower than no threads do."""
    if size < PARALLEL_FROM:
        yield map
        return
    has_affinity = hasattr(os, "sched_getaffinity")  # not on macOS
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()
    spawn = multiprocessing.get_context("spawn")  # not forked: TensorFlow and JAX have threads
    try:
        with ProcessPoolExecutor(cores, mp_context=spawn) as pool:
            yield partial(pool.map, chunksize=4)
    except BrokenProcessPool as error:
        raise RecordsError(
            "a process that decodes audio was killed, probably for lack of memory; or a script of "
            "your own calls this without `if __name__ == '__main__':`"
        ) from error


def _beam_examples(
    corpus: SpeechCorpus, utterances: list[Utterance], skipped_path: tfds.core.Path
) -> Any:
    """A Beam transform that gives the (index, record) of the usable utterances."""
    import apache_beam as beam  # the extra `beam`

    def read(indexed: tuple[int, Utterance]) -> Iterator[Any]:
        index, utterance = indexed
        example = corpus.read_record(utterance)
        if "reason" in example:
            yield beam.pvalue.TaggedOutput("skipped", json.dumps(example))
        else:
            yield index, example

    @beam.ptransform_fn
    def examples(pipeline):
        listed = pipeline | beam.Create(list(enumerate(utterances))) | beam.Reshuffle()
        outputs = listed | beam.FlatMap(read).with_outputs("skipped", main="examples")
        _ = outputs.skipped | beam.io.WriteToText(str(skipped_path), shard_name_template="")
        return outputs.examples

    return examples()


def _write_skipped(path: tfds.core.Path, skipped: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(skip) + "\n" for skip in skipped))


def prepare_records(
    corpus: SpeechCorpus, cache_dir: str | os.PathLike, beam_options: str = ""
) -> Path:
    """Writes the audio records of a corpus, unless they are there, and returns their folder.

    The folder appears when it is whole: TFDS writes into a temporary one and renames it. Where
    another process prepares the same corpus, this one waits for it. A script that calls this needs
    `if __name__ == "__main__":`, since large corpora are decoded by processes of its own.

    Args:
      corpus: what to write.
      cache_dir: where; the same for `--config.cache_dir`.
      beam_options: comma-separated options of a Beam pipeline, e.g. runner=DirectRunner; if there
        are none, this machine's cores share the work.

    Raises:
      CorpusError: the corpus cannot be listed, or none of its files can be used.
      RecordsError: a process was killed, or Beam failed.
    """
    root = Path(cache_dir) / "records" / f"{corpus.name}-{corpus.fingerprint}"
    folder = root / corpus.name / corpus.VERSION  # TFDS's layout
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    if beam_options:
        config.beam_options = _parse_beam_options(beam_options)
    root.mkdir(parents=True, exist_ok=True)
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            for leftover in folder.parent.glob("incomplete.*"):  # of a run that was killed
                shutil.rmtree(leftover)
            tfds.disable_progress_bar()
            with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints what it "downloads"
                AudioRecords(corpus, data_dir=root).download_and_prepare(download_config=config)
    return folder


def _parse_beam_options(text: str) -> Any:
    try:
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise RecordsError("Apache Beam is missing: pip install apache-beam") from error
    return PipelineOptions(flags=[f"--{option}" for option in text.split(",")])


def load_skipped(records_dir: str | os.PathLike) -> list[dict[str, str]]:
    """{"id", "reason"} of the utterances whose audio could not be used, sorted by id."""
    lines = [
        line
        for path in Path(records_dir).glob("skipped-*.jsonl")
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    return sorted(map(json.loads, lines), key=lambda skip: skip["id"])


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
        skipped=load_skipped(records_dir),
    )


def load_arrays(
    folder: str | os.PathLike, name: str, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loads one array of every example, cut or zero-padded to one length.

    Args:
      folder: audio or feature records.
      name: audio, or features.
      length: samples, or frames.

    Returns:
      ids (n,) str, sorted; arrays (n, length, ...) in their own dtype; their lengths (n,) int32, at
      most ``length``.

    Raises:
      RecordsError: the folder is missing or damaged.
    """
    info = load_info(folder)
    feature, count = info.features[name], info.splits.total_num_examples
    ids, lengths = [], np.zeros(count, np.int32)
    arrays = np.zeros((count, length, *feature.shape[1:]), feature.np_dtype)
    for row, example in enumerate(read_examples(folder, ("id", name))):
        ids.append(example["id"])
        lengths[row] = min(len(example[name]), length)
        arrays[row, : lengths[row]] = example[name][:length]
    return np.array(ids, str), arrays, lengths


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
            split="+".join(sorted(builder.info.splits)),
            decoders=tfds.decode.PartialDecoding(dict.fromkeys(names, True)),
            read_config=tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False),
        )
        count = 0
        for count, example in enumerate(dataset.as_numpy_iterator(), start=1):  # noqa: B007
            yield example | {name: example[name].decode() for name in texts}
        if count != (whole := builder.info.splits.total_num_examples):
            raise ValueError(f"{count} of {whole} examples")


def load_lengths(
    folder: str | os.PathLike, name: str, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and lengths as of :func:`load_arrays`; ``name`` is num_samples, or num_frames."""
    examples = list(read_examples(folder, ("id", name)))
    ids = np.array([example["id"] for example in examples], str)
    return ids, np.array([min(example[name], length) for example in examples], np.int32)


class RandomReader:
    """One array of any examples, in any order, for corpora that fit in no memory.

    Called with (m,) row numbers, as :func:`read_examples` counts them, it gives the arrays
    (m, length, ...), cut or zero-padded.
    """

    def __init__(self, folder: str | os.PathLike, name: str, length: int):
        """Finds where each example begins.

        Raises:
          RecordsError: the folder is missing or damaged.
        """
        self._folder, self._name, self._length = folder, name, length
        with _readable_errors(folder):
            builder = tfds.builder_from_directory(folder)
            self._places = [
                (str(path), start)
                for split in sorted(builder.info.splits)
                for path in builder.info.splits[split].filepaths
                for start in _record_starts(path)
            ]
            if len(self._places) != (whole := builder.info.splits.total_num_examples):
                raise ValueError(f"{len(self._places)} of {whole} examples")
        self._feature = builder.info.features[name]
        decoders = tfds.decode.PartialDecoding({name: True})
        wanted = decoders.extract_features(builder.info.features)
        self._parse = tf.function(
            lambda record: wanted.deserialize_example(record)[name],
            input_signature=[tf.TensorSpec((), tf.string)],
        )
        self._threads, self._readers = ThreadPoolExecutor(os.cpu_count()), threading.local()

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Reads them.

        Raises:
          RecordsError: a file is damaged.
        """
        shape = (len(rows), self._length, *self._feature.shape[1:])
        out = np.zeros(shape, self._feature.np_dtype)
        with _readable_errors(self._folder):
            for i, array in enumerate(self._threads.map(self._read, rows)):
                out[i, : len(array)] = array[: self._length]
        return out

    def _read(self, row: int) -> np.ndarray:
        path, start = self._places[row]
        readers = vars(self._readers)  # this thread's
        if path not in readers:
            readers[path] = tf_record_random_reader(path)
        return self._parse(readers[path].read(start)[0]).numpy()


def _record_starts(path: str) -> Iterator[int]:
    """Of a TFRecord file: 8 bytes of length and 4 of checksum, the record, 4 of checksum."""
    with open(path, "rb") as file:
        start = 0
        while header := file.read(12):
            yield start
            start += 16 + int.from_bytes(header[:8], "little")
            file.seek(start)


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

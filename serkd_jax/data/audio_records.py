"""Audio records: a corpus as TFRecords, to be read by `reader` or `tfds.builder_from_directory`."""

import contextlib
import fcntl
import inspect
import io
import json
import logging
import multiprocessing
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from tqdm import tqdm

from serkd_jax.audio.waveform import AudioError
from serkd_jax.data import corpora
from serkd_jax.data.corpora.base import CorpusError, Release, SpeechCorpus, Utterance
from serkd_jax.data.reader import UTTERANCE_TEXTS, RecordsError
from serkd_jax.errors import UserError

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # no banners; errors still show
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # no notice of it; TF only writes files here
import tensorflow as tf
import tensorflow_datasets as tfds

for kind in ("GPU", "TPU"):  # the accelerators belong to JAX
    tf.config.set_visible_devices([], kind)
# TFDS 4.9.10 warns of its own use of a deprecated property, once per feature.
logging.getLogger("absl").addFilter(
    lambda record: "`FeatureConnector.dtype` is deprecated" not in record.getMessage()
)

SPLIT = "utterances"  # the TFDS split of a corpus without splits of its own
PARALLEL_FROM = 512  # recordings; for fewer, starting processes takes as long as decoding
CHUNK = 256  # recordings that are decoded before the first of them is written


def text_features(names: Iterable[str]) -> dict[str, tfds.features.FeatureConnector]:
    """Makes TFDS features for texts with these names."""
    return {name: tfds.features.Text() for name in names}


def label_feature(class_names: Collection[str]) -> dict[str, tfds.features.FeatureConnector]:
    """Makes the TFDS feature `label`, the number of a class; nothing if there are no classes."""
    names = list(class_names)
    return {"label": tfds.features.ClassLabel(names=names)} if names else {}


class AudioRecords(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes a corpus as int16 audio at 16 kHz, in the order of the ids.

    The TFDS splits are the corpus's own, or a single one called `utterances`. Files that cannot be
    used are left out; `skipped-*.jsonl` beside the records lists them with the reasons.
    """

    CORPUS: ClassVar[type[Release]]  # the corpus that `tfds build` reads from the manual folder
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
                    **text_features((*UTTERANCE_TEXTS, "sha256", "notice")),
                    **label_feature(corpus.CLASSES or corpus.class_names),
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
        """Writes the records; with Apache Beam if the config has a runner or options for it."""
        config = download_config or tfds.download.DownloadConfig()
        self._use_beam = bool(config.beam_runner or config.beam_options)
        try:
            super().download_and_prepare(download_config=config, **kwargs)
        except Exception as error:  # Beam raises whatever a worker raised
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
    """`tfds build iemocap --imports=serkd_jax.data.audio_records --manual_dir=IEMOCAP`."""

    CORPUS = corpora.IEMOCAP


class Meld(AudioRecords):
    """`tfds build meld --imports=serkd_jax.data.audio_records --manual_dir=MELD.Raw`."""

    CORPUS = corpora.MELD


class Emodb(AudioRecords):
    """`tfds build emodb --imports=serkd_jax.data.audio_records --manual_dir=EMODB`."""

    CORPUS = corpora.EmoDB


@contextlib.contextmanager
def _parallel_map(size: int) -> Iterator[Callable]:
    """Gives a `map` with a process per core; threads would decode videos slower than none."""
    if size < PARALLEL_FROM:
        yield map
        return
    has_affinity = hasattr(os, "sched_getaffinity")  # not on macOS
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()
    spawn = multiprocessing.get_context("spawn")  # not fork: TensorFlow and JAX have threads
    try:
        with ProcessPoolExecutor(cores, mp_context=spawn) as pool:
            yield partial(pool.map, chunksize=4)
    except BrokenProcessPool as error:
        raise RecordsError(
            "a process that decodes audio was killed, probably for lack of memory; or your own "
            "script calls this without `if __name__ == '__main__':`"
        ) from error


def _beam_examples(
    corpus: SpeechCorpus, utterances: list[Utterance], skipped_path: tfds.core.Path
) -> Any:
    """Makes a Beam transform that yields (index, record) of the usable utterances."""
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


def write_records(corpus: SpeechCorpus, root: Path, beam_options: str = "") -> None:
    """Writes the audio records of a corpus below `root`; see `prepare.prepare_records`.

    Their folder appears when it is complete: TFDS writes into a temporary folder and renames it.
    If another process is preparing the same corpus, this one waits for it.
    """
    folder = root / corpus.name / corpus.VERSION  # TFDS's layout
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    if beam_options:
        config.beam_options = _parse_beam_options(beam_options)
    root.mkdir(parents=True, exist_ok=True)
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            for leftover in folder.parent.glob("incomplete.*"):  # from a run that was killed
                shutil.rmtree(leftover)
            tfds.disable_progress_bar()
            with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints what it "downloads"
                AudioRecords(corpus, data_dir=root).download_and_prepare(download_config=config)


def _parse_beam_options(text: str) -> Any:
    try:
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise RecordsError("Apache Beam is missing: pip install apache-beam") from error
    return PipelineOptions(flags=[f"--{option}" for option in text.split(",")])

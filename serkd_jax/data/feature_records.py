"""Writes feature records: runs a front-end over any number of utterances, and can resume.

The utterances, sorted by id, are divided into shards of a fixed size, and a shard is the unit that
is read, batched, written and resumed. While one shard is computed, the next is decoded and the
previous one is written, so memory depends on the size of a shard and not on that of the corpus
(except for the names). A process that is killed loses the shards that it was working on.

Of n processes (`parallel.join_processes`), each takes every n-th shard. The content of a shard
depends neither on the number of processes or devices, nor on where an earlier run was stopped; only
another kind of device rounds features differently.
"""

import dataclasses
import json
import os
import platform
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

import serkd_jax
from serkd_jax.audio.logmel import num_frames, num_samples
from serkd_jax.audio.waveform import SAMPLE_RATE
from serkd_jax.data.audio_records import SPLIT, label_feature, text_features, tf, tfds
from serkd_jax.data.examples import read_ahead
from serkd_jax.data.reader import RecordsError
from serkd_jax.data.sources import Clip, Frontend, Source
from serkd_jax.distributed import parallel
from serkd_jax.files import read_json, write_file

PACKAGES = ("jax", "jaxlib", "flax", "transformers", "numpy", "soundfile", "soxr", "av")
PACKAGES += ("tensorflow-datasets",)


def write_features(
    source: Source,
    frontend: Frontend,
    max_frames: int,
    folder: Path,
    settings: dict,
    skip_bad: bool,
) -> None:
    """Writes this process's shards; the first process also writes the description."""
    schema = tfds.features.FeaturesDict(
        {
            **text_features(source.texts),
            **label_feature(source.class_names),
            # Without encoding="bytes", TFDS writes 12 examples a second.
            "features": tfds.features.Tensor(
                shape=(None, frontend.width), dtype=np.float16, encoding="bytes"
            ),
            "num_frames": tfds.features.Scalar(np.int32),
        }
    )
    name = f"{source.name}_{frontend.name}"
    shards = _make_shards(folder, name, len(source), settings["shard_size"])
    job = _Job(source, frontend, max_frames, schema, skip_bad)
    job.run(shards[jax.process_index() :: jax.process_count()])
    parallel.wait_for_processes(f"features written: {folder.name}")
    if jax.process_index() == 0:
        _describe(folder, schema, shards, settings | {"frontend_settings": frontend.settings})


@dataclasses.dataclass(frozen=True)
class _Shard:
    """A TFRecord file of the utterances `rows`, and a report on it until the folder is complete."""

    path: Path
    rows: range

    @property
    def _report_path(self) -> Path:
        return self.path.with_name(f"{self.path.name}.json")

    def report(self) -> dict:
        """Reads the report: {"num_examples", "num_samples", "num_cut", "skipped"}."""
        return read_json(self._report_path, f"delete {self.path}, which it describes")

    def write(self, records: Iterable[bytes], report: dict) -> None:
        """Writes the report, then the shard, which gets its name only when it is complete."""
        partial = self.path.with_name(f"{self.path.name}.tmp")
        try:
            with tf.io.TFRecordWriter(str(partial)) as writer:
                for record in records:
                    writer.write(record)
            write_file(self._report_path, json.dumps(report), by_each=True)
            _sync(partial)
            partial.rename(self.path)
        except (OSError, tf.errors.OpError) as error:
            raise RecordsError(
                f"{partial} cannot be written ({error}): make room and run again; the shards "
                "before it are kept"
            ) from error


@dataclasses.dataclass(frozen=True)
class _Job:
    """The extraction of the features of shards."""

    source: Source
    frontend: Frontend
    max_frames: int
    schema: tfds.features.FeaturesDict
    skip_bad: bool

    def run(self, shards: Sequence[_Shard]) -> None:
        """Writes those of the shards that do not exist yet."""
        todo = [shard for shard in shards if not shard.path.exists()]
        count = self.frontend.num_devices  # shards at a time, so that each device has full batches
        windows = [todo[start : start + count] for start in range(0, len(todo), count)]
        title = f"{self.source.name}: {self.frontend.name}"
        with _Progress(title, shards, todo) as progress, ThreadPoolExecutor(1) as writer:
            writing: list[Future] = []
            for window, clips in zip(windows, read_ahead(self._read, windows), strict=True):
                features = self._extract(clips, progress)
                for written in writing:  # the previous window: at most two are in memory
                    written.result()
                writing = [
                    writer.submit(self._write, *shard)
                    for shard in zip(window, clips, features, strict=True)
                ]
            for written in writing:
                written.result()

    def _read(self, shards: Sequence[_Shard]) -> list[list[Clip]]:
        """Reads the clips of each shard; too long ones with one frame too many, to be counted."""
        limit = num_samples(self.max_frames + 1)
        return [self.source.read(shard.rows, limit) for shard in shards]

    def _extract(
        self, shards: list[list[Clip]], progress: "_Progress"
    ) -> list[dict[int, np.ndarray | str]]:
        """Returns, for each shard, the features of each clip or the reason why there are none."""
        results: list[dict[int, np.ndarray | str]] = [{} for _ in shards]
        places = []
        for k, clips in enumerate(shards):
            for i, clip in enumerate(clips):
                if clip.waveform is None:
                    results[k][i] = clip.problem
                    progress.count(0, skipped=True)
                else:
                    places.append((k, i))
        waveforms = [shards[k][i].waveform for k, i in places]
        groups = [k for k, _ in places]
        for place, features in self.frontend(waveforms, self.max_frames, groups):
            k, i = places[place]
            problem = self._problem(features)
            if problem and not self.skip_bad:
                name = shards[k][i].values["id"]
                raise RecordsError(f"{self.frontend.name}, utterance {name}: {problem}")
            results[k][i] = problem or features
            progress.count(len(waveforms[place]), skipped=bool(problem))
        return results

    def _problem(self, features: np.ndarray) -> str:
        """Returns what is wrong with the features of an utterance; empty if nothing is."""
        width = self.frontend.width
        if features.shape[1:] != (width,) or not 0 < len(features) <= self.max_frames:
            return (
                f"features of shape {features.shape}, expected (1 to {self.max_frames}, {width}); "
                "correct the front-end"
            )
        if not np.isfinite(features).all():
            return (
                "NaN or infinite features; listen to it and remove it from the corpus, or check "
                "the weights of the front-end"
            )
        return ""

    def _write(
        self, shard: _Shard, clips: list[Clip], results: dict[int, np.ndarray | str]
    ) -> None:
        good = [i for i in range(len(clips)) if not isinstance(results[i], str)]
        limit = num_samples(self.max_frames)
        report = {
            "num_examples": len(good),
            "num_samples": sum(min(len(clips[i].waveform), limit) for i in good),
            "num_cut": sum(num_frames(len(clips[i].waveform)) > self.max_frames for i in good),
            "skipped": [
                {"id": clips[i].values["id"], "reason": results[i]}
                for i in range(len(clips))
                if isinstance(results[i], str)
            ],
        }
        shard.write((self._serialize(clips[i].values, results[i]) for i in good), report)

    def _serialize(self, values: dict, features: np.ndarray) -> bytes:
        example = {**values, "features": features, "num_frames": len(features)}
        # Unless told otherwise, Protobuf orders a map's keys differently in each process.
        proto = tf.train.Example.FromString(self.schema.serialize_example(example))
        return proto.SerializeToString(deterministic=True)


class _Progress:
    """A bar with files, time left, hours of audio, speed and skipped files of this process."""

    def __init__(self, title: str, shards: Sequence[_Shard], todo: Sequence[_Shard]):
        total = sum(len(shard.rows) for shard in shards)
        done = total - sum(len(shard.rows) for shard in todo)
        if jax.process_count() > 1:
            title = f"{title} [{jax.process_index()}]"
        self._bar = tqdm(total=total, initial=done, desc=title, unit="file")
        self._samples = self._skipped = 0

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def count(self, samples: int, skipped: bool) -> None:
        """Counts one more file, which has `samples` samples."""
        self._samples += samples
        self._skipped += skipped
        seconds = self._samples / SAMPLE_RATE
        speed = seconds / max(self._bar.format_dict["elapsed"], 1e-9)
        text = f"{seconds / 3600:.2f} h of audio, {speed:.1f} s per second"
        text += f", {self._skipped} skipped" if self._skipped else ""
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update()


def _make_shards(folder: Path, dataset: str, count: int, size: int) -> list[_Shard]:
    starts = range(0, count, size)
    names = [f"{dataset}-{SPLIT}.tfrecord-{k:05d}-of-{len(starts):05d}" for k in range(len(starts))]
    return [
        _Shard(folder / name, range(start, min(start + size, count)))
        for name, start in zip(names, starts, strict=True)
    ]


def _describe(
    folder: Path, schema: tfds.features.FeaturesDict, shards: Sequence[_Shard], settings: dict
) -> None:
    """Writes the metadata that `tfds.builder_from_directory` needs and that readers want."""
    reports = [shard.report() for shard in shards]
    skipped = [skip for report in reports for skip in report["skipped"]]
    lengths = [report["num_examples"] for report in reports]
    if not sum(lengths):
        raise RecordsError(
            f"none of {len(skipped)} files can be used; the first: {skipped[0]['reason']}"
        )
    versions = {"serkd-jax": serkd_jax.__version__, "python": platform.python_version()}
    versions |= {package: metadata.version(package) for package in PACKAGES}
    split = tfds.core.SplitInfo(
        name=SPLIT,
        shard_lengths=lengths,
        num_bytes=sum(shard.path.stat().st_size for shard in shards),
    )
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=schema,
        split_infos=[split],
        check_data=False,
        description="Features of speech, 50 frames a second, written by serkd-jax.",
        metadata=tfds.core.MetadataDict(
            settings,
            hours=sum(report["num_samples"] for report in reports) / SAMPLE_RATE / 3600,
            num_cut=sum(report["num_cut"] for report in reports),
            skipped=skipped,
            versions=versions,
        ),
        disable_shuffling=True,
    )
    for path in folder.iterdir():
        if ".tfrecord-" not in path.name:  # shards and reports are already synced
            _sync(path)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())

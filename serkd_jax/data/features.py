"""Feature records: a front-end run over the audio records once, with resume.

Shards hold fixed sets of utterances, in the order of the ids. They are written one by one into
`incomplete.NAME`, and the folder is renamed to `NAME` when all are there and described. So a
folder without the prefix is whole, and a run that was killed loses one shard at most.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from serkd_jax.audio import to_float
from serkd_jax.data import records
from serkd_jax.data.records import SPLIT, RecordsError, Table, tf, tfds
from serkd_jax.frontends import Frontend


def prepare_features(
    records_dir: str | os.PathLike,
    frontend: Frontend,
    max_frames: int,
    cache_dir: str | os.PathLike,
    corpus_fingerprint: str,
    *,
    shard_size: int = 64,
    batch_size: int = 16,
) -> Path:
    """Writes the features of all utterances, unless they are there, and returns their folder.

    Features are float16 (num_frames, frontend.width), cut at `max_frames`, not padded. Shards that
    an interrupted run finished are kept. One process at a time may prepare the same features.

    Args:
      records_dir: audio records, from `records.prepare_records`.
      frontend: see `serkd_jax.frontends`.
      max_frames: T, at 50 frames a second.
      cache_dir: the folder is made in `cache_dir/features/`.
      corpus_fingerprint: of the corpus in `records_dir`.
      shard_size: utterances per file.
      batch_size: utterances per call of the front-end, of similar lengths.

    Raises:
      RecordsError: the front-end gave NaN, infinity or a wrong shape; names the utterance.
    """
    info = records.load_info(records_dir)
    skipped = sorted(skip["id"] for skip in info.metadata.get("skipped", []))
    settings = [corpus_fingerprint, skipped, frontend.fingerprint, max_frames, shard_size]
    digest = hashlib.sha256(repr(settings).encode()).hexdigest()[:16]
    folder = Path(cache_dir) / "features" / f"{info.name}-{frontend.name}-{digest}"
    if folder.exists():
        return folder

    work = folder.with_name(f"incomplete.{folder.name}")
    work.mkdir(parents=True, exist_ok=True)
    table = records.load_table(records_dir)
    schema = _schema(table.class_names, frontend.width)
    shards = np.split(np.arange(len(table)), range(shard_size, len(table), shard_size))
    paths = _shard_paths(work, f"{info.name}_{frontend.name}", len(shards))
    todo = [(rows, path) for rows, path in zip(shards, paths, strict=True) if not path.exists()]
    audio = records.iterate_audio(records_dir, [table.ids[row] for rows, _ in todo for row in rows])
    num_done = len(table) - sum(len(rows) for rows, _ in todo)
    title = f"{info.name}: {frontend.name}"
    with tqdm(total=len(table), initial=num_done, desc=title, unit="file") as progress:
        for rows, path in todo:
            # The shards to do follow the order of the records, so the stream serves them in turn.
            waveforms = {row: to_float(next(audio)[1]) for row in rows}
            features = {}
            for batch in _batches(waveforms, batch_size):
                features |= _extract(frontend, batch, max_frames, table)
                progress.update(len(batch))
            _write_shard(path, schema, (_example(table, row, features[row]) for row in rows))
    metadata = {"frontend": frontend.fingerprint, "max_frames": max_frames}
    _describe(work, schema, [len(rows) for rows in shards], paths, metadata)
    work.rename(folder)
    return folder


def load_features(
    features_dir: str | os.PathLike, max_frames: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loads all features, cut or zero-padded to one length.

    Returns:
      ids (n,) str, sorted; features float16 (n, max_frames, width); num_frames int32 (n,), at most
      max_frames.

    Raises:
      RecordsError: the folder is missing or damaged.
    """
    info = records.load_info(features_dir)
    count, width = info.splits[SPLIT].num_examples, info.features["features"].shape[-1]
    ids, num_frames = [], np.zeros(count, np.int32)
    features = np.zeros((count, max_frames, width), np.float16)
    for row, example in enumerate(records.read_examples(features_dir, ("id", "features"))):
        ids.append(example["id"])
        num_frames[row] = min(len(example["features"]), max_frames)
        features[row, : num_frames[row]] = example["features"][:max_frames]
    return np.array(ids, str), features, num_frames


def _schema(class_names: tuple[str, ...], width: int) -> tfds.features.FeaturesDict:
    # Without encoding="bytes", TFDS writes 12 examples a second.
    features = tfds.features.Tensor(shape=(None, width), dtype=np.float16, encoding="bytes")
    return tfds.features.FeaturesDict(
        {
            **records.utterance_features(class_names),
            "features": features,
            "num_frames": tfds.features.Scalar(np.int32),
        }
    )


def _shard_paths(folder: Path, dataset: str, count: int) -> list[Path]:
    return [folder / f"{dataset}-{SPLIT}.tfrecord-{k:05d}-of-{count:05d}" for k in range(count)]


def _batches(waveforms: dict[int, np.ndarray], size: int) -> Iterator[dict[int, np.ndarray]]:
    """Groups waveforms of similar lengths, so that a front-end pads little."""
    by_length = sorted(waveforms, key=lambda row: len(waveforms[row]))
    for start in range(0, len(by_length), size):
        yield {row: waveforms[row] for row in by_length[start : start + size]}


def _extract(
    frontend: Frontend, waveforms: dict[int, np.ndarray], max_frames: int, table: Table
) -> dict[int, np.ndarray]:
    features = dict(zip(waveforms, frontend(list(waveforms.values()), max_frames), strict=True))
    for row, frames in features.items():
        where = f"{frontend.name}, utterance {table.ids[row]}"
        if frames.shape[1:] != (frontend.width,) or not 0 < len(frames) <= max_frames:
            raise RecordsError(
                f"{where}: features of shape {frames.shape}, "
                f"expected (1 to {max_frames}, {frontend.width}); mend the front-end"
            )
        if not np.isfinite(frames).all():
            raise RecordsError(
                f"{where}: NaN or infinite features; listen to it and remove it from the corpus, "
                "or check the front-end's weights"
            )
    return features


def _example(table: Table, row: int, features: np.ndarray) -> dict:
    return {
        "id": table.ids[row],
        "label": int(table.labels[row]),
        "speaker": table.speakers[row],
        "session": table.sessions[row],
        "split": table.splits[row],
        "fold": table.folds[row],
        "features": features,
        "num_frames": len(features),
    }


def _write_shard(path: Path, schema: tfds.features.FeaturesDict, examples: Iterator[dict]) -> None:
    """Writes a TFRecord file that is whole once it has its name."""
    partial = path.with_suffix(".tmp")
    with tf.io.TFRecordWriter(str(partial)) as writer:
        for example in examples:
            # Protobuf orders a map's keys anew in each process unless told not to.
            proto = tf.train.Example.FromString(schema.serialize_example(example))
            writer.write(proto.SerializeToString(deterministic=True))
    _sync(partial)
    partial.rename(path)


def _describe(
    folder: Path,
    schema: tfds.features.FeaturesDict,
    lengths: list[int],
    paths: list[Path],
    metadata: dict,
) -> None:
    """Adds what `tfds.builder_from_directory` needs."""
    split = tfds.core.SplitInfo(
        name=SPLIT,
        shard_lengths=lengths,
        num_bytes=sum(path.stat().st_size for path in paths),
    )
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=schema,
        split_infos=[split],
        check_data=False,
        metadata=tfds.core.MetadataDict(metadata),
        disable_shuffling=True,
    )
    for path in folder.iterdir():
        _sync(path)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())

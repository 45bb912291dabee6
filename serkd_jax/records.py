"""Writes the audio records of a corpus, and compares it with what was published.

    python -m serkd_jax.records --corpus=iemocap --data_dir=IEMOCAP_full_release --cache_dir=DIR

The records in DIR are TFRecords that `tfds.builder_from_directory` opens; with
`--config.cache_dir=DIR` a run of `serkd_jax.main` finds them there. The table on the terminal
compares the number of utterances of each class with the paper's Table 1 or 2; with `--strict`, a
difference is an error.
"""

from absl import app, flags, logging

from serkd_jax.errors import parse_flags, told_in_one_line

_CORPUS = flags.DEFINE_string("corpus", None, "iemocap, meld, emodb, manifest or synthetic.")
_DATA_DIR = flags.DEFINE_string("data_dir", "", "Folder of the corpus as published.")
_MANIFEST = flags.DEFINE_string("manifest", "", "The .csv or .jsonl file of --corpus=manifest.")
_LABEL_MAP = flags.DEFINE_string("label_map", "", "JSON of the manifest's labels to class names.")
_SPEAKER_PATTERN = flags.DEFINE_string(
    "speaker_pattern", "", "Regular expression that finds the speaker in the manifest's ids."
)
_CACHE_DIR = flags.DEFINE_string(
    "cache_dir", None, "Folder for the records; --config.cache_dir of a run."
)
_STRICT = flags.DEFINE_bool("strict", False, "Fail if the counts are not the published ones.")
_BEAM = flags.DEFINE_string(
    "beam_pipeline_options",
    "",
    "Use Apache Beam with these comma-separated options, e.g. runner=DirectRunner.",
)


def main(argv: list[str]) -> None:
    """Writes the records unless they exist, and prints the report."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.WARNING)
    # Slow to import, so only after the flags are parsed.
    from serkd_jax.audio.waveform import SAMPLE_RATE
    from serkd_jax.data import corpora
    from serkd_jax.data.counts import check_counts
    from serkd_jax.data.prepare import prepare_records
    from serkd_jax.data.reader import load_table

    with told_in_one_line():
        corpus = corpora.make_corpus(
            _CORPUS.value,
            data_dir=_DATA_DIR.value,
            manifest=_MANIFEST.value,
            label_map=_LABEL_MAP.value,
            speaker_pattern=_SPEAKER_PATTERN.value,
        )
        folder = prepare_records(corpus, _CACHE_DIR.value, _BEAM.value)
        table = load_table(folder)
        report = check_counts(table, corpus, _STRICT.value)
    hours = table.num_samples.sum() / SAMPLE_RATE / 3600
    print(f"{report}\n\n{len(table):,} utterances, {hours:.2f} h of audio, are in {folder}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["corpus", "cache_dir"])
    app.run(main, flags_parser=parse_flags)

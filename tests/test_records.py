"""Audio records as TFDS users expect them: tfds build, splits, Beam; and written in parallel."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from layouts import make_iemocap, make_meld
from serkd_jax.data import records
from serkd_jax.data.corpora import MELD
from serkd_jax.data.records import load_skipped, load_table, prepare_records, read_examples

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def iemocap(tmp_path_factory):
    return make_iemocap(tmp_path_factory.mktemp("iemocap"))


@pytest.fixture(scope="session")
def meld(tmp_path_factory):
    return make_meld(tmp_path_factory.mktemp("meld"), dialogues=1)


class BuilderCase(tfds.testing.DatasetBuilderTestCase):
    """TFDS's own checks of a builder, on a corpus that the test makes in the real layout."""

    __test__ = False

    @pytest.fixture(autouse=True)
    def _corpus(self, iemocap, meld):
        type(self).EXAMPLE_DIR = {"iemocap": iemocap, "meld": meld}[self.DATASET_CLASS.name]


class IemocapBuilderTest(BuilderCase):
    __test__ = True
    DATASET_CLASS = records.Iemocap
    SPLITS = {"utterances": 100}  # noqa: RUF012


class MeldBuilderTest(BuilderCase):
    __test__ = True
    DATASET_CLASS = records.Meld
    SPLITS = {"dev": 7, "test": 7, "train": 7}  # noqa: RUF012


def test_every_real_corpus_has_what_a_tfds_catalogue_asks_for():
    for builder in (records.Iemocap, records.Meld, records.Emodb):
        corpus = builder.CORPUS
        assert builder.name == corpus.name
        assert builder.MANUAL_DOWNLOAD_INSTRUCTIONS == corpus.HOW_TO_GET
        assert corpus.HOMEPAGE.startswith("http")
        assert corpus.CITATION.startswith("@")
        assert corpus.LICENSE
        assert tuple(sorted(corpus.PUBLISHED.classes)) == corpus.CLASSES


@pytest.mark.slow
def test_tfds_build_prepares_and_tfds_load_reads(meld, tmp_path):
    command = [Path(sys.executable).with_name("tfds"), "build", "meld"]
    command += ["--imports=serkd_jax.data.records", f"--manual_dir={meld}"]
    done = subprocess.run(
        [*command, f"--data_dir={tmp_path}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    examples, info = tfds.load("meld", split="train", data_dir=tmp_path, with_info=True)
    assert {split: info.splits[split].num_examples for split in info.splits} == {
        "dev": 7,
        "test": 7,
        "train": 7,
    }
    assert "poria2019meld" in info.citation
    (first, *_) = examples.as_numpy_iterator()
    assert first["id"] == b"train_dia0_utt0"
    assert first["text"].decode() == "Oh, it’s “lost” it!"
    assert len(first["audio"]) == first["num_samples"]


def test_without_the_corpus_tfds_says_how_to_get_it(tmp_path):
    with pytest.raises(AssertionError, match=r"sail\.usc\.edu/iemocap"):
        records.Iemocap(data_dir=tmp_path).download_and_prepare()


@pytest.mark.slow
def test_beam_writes_the_same_records_as_threads(meld, tmp_path):
    corpus = MELD(str(meld))
    threads = prepare_records(corpus, tmp_path / "threads")
    beam = prepare_records(corpus, tmp_path / "beam", "runner=DirectRunner")
    assert load_skipped(beam) == load_skipped(threads)
    assert [skip["id"] for skip in load_skipped(beam)] == [
        "dev_dia110_utt7",
        "train_dia125_utt3",
    ]
    names = ("id", "label", "split", "text", "audio", "num_samples")
    both = [list(read_examples(folder, names)) for folder in (beam, threads)]
    for by_beam, by_threads in zip(*both, strict=True):
        np.testing.assert_array_equal(by_beam.pop("audio"), by_threads.pop("audio"))
        assert by_beam == by_threads


def test_records_of_several_splits_are_read_in_the_order_of_the_ids(meld, tmp_path):
    table = load_table(prepare_records(MELD(str(meld)), tmp_path))
    assert table.ids.tolist() == sorted(table.ids.tolist())
    assert [name.split("_")[0] for name in table.ids] == table.splits.tolist()

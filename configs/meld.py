"""MELD: 13,708 English utterances of a television series, 7 classes; the official split.

    python -m serkd_jax.main --config=configs/meld.py --config.data_dir=MELD.Raw --workdir=runs/meld

``MELD.Raw`` is the unpacked archive, with its three inner archives unpacked too. The annotation
CSVs and the folders of ``dia*_utt*.mp4`` are found anywhere in it, up to three folders deep. No
system FFmpeg is needed. Epochs are selected by the wF1 on the dev part (``:logmel`` keeps the last
one). The main speakers of the series are in all parts.

``--config.strict=True`` stops if the counts are not those of Table 2 less the two utterances that
no copy has. ``:logmel`` downloads nothing and trains from scratch on log-mel frames; ``:whisper``
and ``:logmel-from-whisper`` work as in ``configs/emodb.py``.

Not run on the corpus itself, which was not available, but on small generated corpora in its layout,
with a tiny HuBERT. For the updated student the paper reports wF1 46.96 and WA 52.28 (Table 6).
"""

from ml_collections import ConfigDict

from configs import common


def get_config(preset: str = "") -> ConfigDict:
    """The recipe."""
    config = common.paper("meld")
    config.corpus = "meld"
    config.protocol.split_by = "split"
    return common.with_preset(config, preset)

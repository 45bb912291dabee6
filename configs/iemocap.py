"""IEMOCAP: 5,531 English utterances, 4 classes, 10 speakers; leave one session out.

    python -m serkd_jax.main --config=configs/iemocap.py \
        --config.data_dir=IEMOCAP_full_release --workdir=runs/iemocap

``IEMOCAP_full_release`` is the folder that USC ships, with ``Session1`` to ``Session5``. Leave one
speaker out instead (10 folds) with ``--config.protocol.split_by=speaker``.

``--config.strict=True`` stops if the counts differ from Table 1. ``:logmel`` downloads nothing
and trains from scratch on log-mel frames; ``:whisper`` and ``:logmel-from-whisper`` work as
in ``configs/emodb.py``.

Not run on the corpus itself, which was not available, but on small generated corpora in its layout,
with a tiny HuBERT. For the updated student the paper reports UA 71.27 and WA 70.25 (Table 5).
"""

from ml_collections import ConfigDict

from configs import common


def get_config(preset: str = "") -> ConfigDict:
    """The recipe."""
    config = common.paper("iemocap")
    config.corpus = "iemocap"
    config.protocol.split_by = "session"
    return common.with_preset(config, preset)

"""A corpus of your own, listed in a CSV or JSONL manifest, or an EmoBox manifest.

    python -m serkd_jax.main --config=configs/manifest.py:logmel \
        --config.manifest=FILE --workdir=runs/mine

``docs/corpora.md`` goes from a folder of recordings to a trained student. It describes the columns,
what ``--config.protocol.split_by`` can hold out, and EmoBox.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(preset: str = "") -> ConfigDict:
    """The recipe."""
    config = common.paper("iemocap")
    config.corpus = "manifest"
    config.manifest = ""
    config.label_map = ""  # JSON: labels to class names; EmoBox's is found automatically
    config.speaker_pattern = ""  # regular expression that finds the speaker in the ids
    return common.with_preset(config, preset)

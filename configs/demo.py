"""The whole pipeline on an embedded synthetic corpus: no download, minutes on two CPU cores.

python -m serkd_jax.main --config=configs/demo.py --workdir=runs/demo
"""

from ml_collections import ConfigDict

from configs import common


def get_config(preset: str = "") -> ConfigDict:
    """The recipe."""
    config = common.logmel(common.paper("iemocap"))
    if preset:
        raise ValueError(f"the demo has no presets, not {preset!r}")
    config.corpus = "synthetic"
    config.max_frames = 100
    config.protocol.groups_per_fold = 4
    config.teacher.epochs = 10
    config.student.epochs = 10
    config.distill.epochs = 10
    config.curriculum.epochs = 5
    return config

"""EMO-DB: 535 German utterances, 7 classes, 10 speakers, each held out in turn.

    python -m serkd_jax.main --config=configs/emodb.py:logmel \
        --config.data_dir=EMODB --workdir=runs/emodb

``EMODB`` is the corpus as its authors ship it: the folder that holds ``wav``.

``:whisper`` uses features of Whisper-base, ``:logmel-from-whisper`` uses them only for the teacher,
and ``:logmel`` downloads nothing; docs/training.md lists all presets. Without one the features and
the teacher are HuBERT-large.

docs/training.md says what to expect, measured on a copy whose recordings are all 2 s long. For
longer recordings raise ``--config.max_frames``.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(preset: str = "") -> ConfigDict:
    """The recipe."""
    config = common.paper("iemocap")
    config.corpus = "emodb"
    config.max_frames = 100  # 2 s
    config = common.with_preset(config, preset)
    for frontend in (config.frontend, config.teacher.frontend):
        if frontend.name == "whisper":
            frontend.layer = 2  # best on inner folds; see docs/encoders.md
    if "whisper" in preset.split(","):
        # An epoch is 13 steps.
        config.teacher.epochs = config.student.epochs = config.distill.epochs = 25
        config.curriculum.epochs = 10
    return config

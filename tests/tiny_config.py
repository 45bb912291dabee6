"""A recipe for the tests: the whole pipeline in seconds of compute."""

from ml_collections import ConfigDict

from configs import common


def get_config(corpus: str = "") -> ConfigDict:
    """Log-mel, everything as small as it goes, on the synthetic corpus or a `manifest` to be named.

    A manifest has the column `split`, so that there is one fold.
    """
    config = common.logmel(common.paper())
    config.corpus = "synthetic"
    config.synthetic = ConfigDict(
        {"num_speakers": 4, "utterances_per_class": 6, "min_seconds": 0.4, "max_seconds": 0.6}
    )
    config.num_devices = 1
    config.batch_size = 16
    config.max_frames = 24
    config.frontend.num_mels = 8
    config.protocol.update({"groups_per_fold": 2, "validation": 0.2, "quiz": 0.2})
    config.teacher.update({"width": 16, "mlp_dim": 16, "num_layers": 1, "num_heads": 2})
    config.teacher.projector = 8  # h(., T) is as wide as h(., S), as in the paper
    config.student.update({"width": 16, "mlp_dim": 16, "num_layers": 1, "num_heads": 2})
    config.student.readout = "variates"
    config.contrastive.queue_size = 32
    config.meta.quiz_batch_size = 8
    config.curriculum.update({"num_tasks": 2, "episode_steps": 3})
    for stage in ("teacher", "student", "distill", "curriculum"):
        config[stage].epochs = 2
    if corpus == "manifest":
        del config.synthetic
        config.corpus, config.manifest = "manifest", ""
        config.protocol.split_by = "split"
    return config

"""The allowed values of a recipe's keys, and which keys do not affect what a run computes."""

import json
from functools import reduce
from typing import Any

import jax
from ml_collections import ConfigDict

from serkd_jax.errors import UserError
from serkd_jax.models.students import STUDENTS, find_student
from serkd_jax.models.students.base import Student, check_sizes

CHOICES = {
    "examples": ("auto", "device", "records"),
    "dtype": ("auto", "float32", "bfloat16"),
    "selection_metric": ("ua", "wa", "wf1", "last"),
    "optimizer.schedule": ("constant", "cosine"),
    "optimizer.decayed": ("kernels", "all"),
    "teacher.input": ("waveform", "features"),
    "student.kind": STUDENTS,
    "distill.direction": ("teacher_student", "student_teacher"),
    "meta.order": ("second_order", "second_order_forward", "first_order", "none"),
    "curriculum.task_by": ("difficulty", "class"),
    "curriculum.sampling": ("policy", "uniform"),
}
# The least and greatest values of numbers, by the last part of their keys; None means no bound.
RANGES: dict[str, tuple[float, float | None]] = {
    **dict.fromkeys(("seed", "num_devices", "patch_frames", "projector", "beta"), (0, None)),
    **dict.fromkeys(("max_frequency_mask", "max_time_mask", "clip_norm"), (0, None)),
    **dict.fromkeys(("learning_rate", "pilot_learning_rate", "policy_learning_rate"), (0, None)),
    **dict.fromkeys(("weight_decay", "quiz_batch_size"), (0, None)),
    **dict.fromkeys(
        ("batch_size", "max_frames", "steps_per_dispatch", "groups_per_fold"), (1, None)
    ),
    **dict.fromkeys(("width", "mlp_dim", "num_heads", "num_layers", "time_pooling"), (1, None)),
    **dict.fromkeys(("num_tasks", "episode_steps", "policy_width", "queue_size"), (1, None)),
    **dict.fromkeys(("num_folds", "num_speakers"), (2, None)),
    **dict.fromkeys(("weight", "momentum", "alpha", "discount", "running_rate", "warmup"), (0, 1)),
    **dict.fromkeys(("dropout", "validation", "quiz"), (0, 0.99)),
    "temperature": (1e-3, None),
}

# The keys of the config's `student` part that are not sizes of its kind.
STUDENT_SETTINGS = ("kind", "standardize", "learning_rate", "epochs")
# Config keys that say where and how a run is carried out, not what it computes.
PATH_KEYS = ("data_dir", "manifest", "label_map", "cache_dir", "stages_dir", "protocol.file")
PLACE_KEYS = (*PATH_KEYS, "num_devices", "strict", "stages", "examples")
PLACE_KEYS += ("steps_per_dispatch", "remat")


def chosen_stages(config: ConfigDict) -> list[str]:
    """Returns the names in `config.stages`, which are separated by commas."""
    return [name.strip() for name in config.stages.split(",")]


def check_config(config: ConfigDict) -> None:
    """Refuses configs that no stage could run, before anything is computed.

    Raises:
        UserError: names the key and its allowed values.
    """
    for key, choices in CHOICES.items():
        value = reduce(getattr, key.split("."), config)
        if value not in choices:
            raise UserError(f"{key} is {value!r}: use {' or '.join(choices)}")
    sizes = {f"student.{key}" for key in config.student if key not in STUDENT_SETTINGS}
    for key, value in _flatten(config.to_dict()).items():
        if key in sizes:  # checked by the student's kind
            continue
        least, greatest = RANGES.get(key.rpartition(".")[2], (None, None))
        if least is not None and not (least <= value and (greatest is None or value <= greatest)):
            allowed = f"at least {least}" if greatest is None else f"{least} to {greatest}"
            raise UserError(f"{key} is {value}: use {allowed}")
    try:
        make_student(config, num_classes=2).check(config.max_frames)
    except ValueError as error:
        raise UserError(str(error)) from error
    if config.teacher.input == "waveform" and not config.teacher.model:
        raise UserError("teacher.input=waveform needs a pretrained encoder in teacher.model")
    if config.teacher.input == "waveform" and config.teacher.frontend.name:
        raise UserError(
            "teacher.input=waveform reads no features: leave teacher.frontend.name empty, or set "
            "teacher.input=features"
        )
    if config.teacher.standardize and not config.teacher.patch_frames:
        raise UserError(
            "teacher.standardize changes what the encoder's layers read: set it to False, or "
            "teacher.patch_frames for layers that read patches of features"
        )
    if config.teacher.time_pooling > 1 and not config.teacher.patch_frames:
        raise UserError("teacher.time_pooling needs teacher.patch_frames: set that to 1")
    if not config.student.projection_dims:
        raise UserError("student.projection_dims is empty: the contrastive branch needs a width")
    if config.contrastive.queue_size < config.batch_size:
        raise UserError(
            f"contrastive.queue_size {config.contrastive.queue_size} must be at least the "
            f"batch_size {config.batch_size}"
        )
    if config.teacher.time_pooling > config.max_frames:
        raise UserError(
            f"teacher.time_pooling {config.teacher.time_pooling} is more than max_frames "
            f"{config.max_frames}: nothing would be left"
        )
    width, heads = config.teacher.get("width", 0), config.teacher.get("num_heads", 1)
    if width % heads:
        raise UserError(f"teacher.width {width} is not divisible by num_heads {heads}")


def choose_dtype(config: ConfigDict, device: jax.Device) -> str:
    """Returns the dtype of the models' computation: `auto` is float32 on a CPU, else bfloat16."""
    if config.dtype != "auto":
        return config.dtype
    return "float32" if device.platform == "cpu" else "bfloat16"


def make_student(config: ConfigDict, num_classes: int, **options: Any) -> Student:
    """Makes the student of a config, S.

    Args:
        config: the whole config.
        num_classes: C.
        **options: fields of `Student` that no recipe sets.

    Raises:
        ValueError: the sizes are not those of the student's kind, or are not allowed.
    """
    values = {k: v for k, v in config.student.items() if k not in STUDENT_SETTINGS}
    kind = find_student(config.student.kind)
    return kind(num_classes, **check_sizes(kind, values), **options)


def quiz_batch_size(config: ConfigDict) -> int:
    """Returns the batch size of the distillation's quiz; by default that of training."""
    return config.meta.quiz_batch_size or config.batch_size


def settings_of(config: ConfigDict) -> dict[str, Any]:
    """Returns what defines a run's results: all values except `PLACE_KEYS`, by dotted keys."""
    return {k: v for k, v in _flatten(config.to_dict()).items() if k not in PLACE_KEYS}


def _flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Joins nested keys with dots; values become what JSON would read back."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.loads(json.dumps(value))
    return flat

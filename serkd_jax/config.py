"""The allowed values of a recipe's keys, and which keys do not affect what a run computes."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from serkd_jax.audio.spectra import BINS, COEFFICIENTS
from serkd_jax.audio.spectral import SPECTRAL
from serkd_jax.errors import UserError
from serkd_jax.models.students import STUDENTS, find_student
from serkd_jax.models.students.base import Rule, Student, check_sizes, rule


def _one_of(*choices: str) -> Rule:
    return rule("", choices=choices)


def _are_layers(value: Any) -> bool:
    return all(type(k) is int for k in (value if isinstance(value, list | tuple) else [value]))


_RATE, _SHARE, _PART = rule(0.0, 0, 1e30), rule(0.0, 0, 1), rule(0.0, 0, 0.99)
_EPOCHS, _FRAMES, _BATCH = rule(1, 0, 10**6), rule(0, 0, 10_000), rule(1, 1, 65_536)
_SWITCH, _TEXT, _TEMPERATURE = rule(True), rule(""), rule(1.0, 1e-3, 1e6)
_FRONTEND = {
    "model": _TEXT,
    "revision": _TEXT,
    "layer": (_are_layers, "a number, or a list of numbers"),
    "dtype": _one_of("float32", "bfloat16"),
    "pad_to_30s": _SWITCH,
    "beside": _one_of("", *SPECTRAL),
    **{each.size: rule(1, each.least, each.most) for each in SPECTRAL.values()},
}
# What the keys of a recipe may hold. The student's sizes are not here; its kind declares them.
KEYS = {
    "seed": rule(0, 0, 2**32 - 1),
    "num_devices": rule(0, 0, 10**6),
    "dtype": _one_of("auto", "float32", "bfloat16"),
    "remat": _SWITCH,
    "examples": _one_of("auto", "device", "records"),
    "steps_per_dispatch": rule(1, 1, 10**6),
    "cache_dir": _TEXT,
    "stages_dir": _TEXT,
    "data_dir": _TEXT,
    "strict": _SWITCH,
    "stages": _TEXT,
    "corpus": _TEXT,
    "frontend.name": _TEXT,
    "max_frames": rule(1, 1, 10_000),
    "selection_metric": _one_of("ua", "wa", "wf1", "last"),
    "patience": _EPOCHS,
    "batch_size": _BATCH,
    "protocol.split_by": _one_of("speaker", "session", "fold", "split", "random", "file"),
    "protocol.groups_per_fold": rule(1, 1, 10**6),
    "protocol.num_folds": rule(2, 2, 10**6),
    "protocol.file": _TEXT,
    "protocol.training_share": rule(0.0, 0.001, 1),
    "protocol.validation": _PART,
    "protocol.quiz": _PART,
    "protocol.speakers_apart": _SWITCH,
    "protocol.seed": rule(0, 0, 2**32 - 1),
    "optimizer.name": _one_of("adamw", "adam", "sgd"),
    "optimizer.beta1": _PART,
    "optimizer.beta2": rule(0.0, 0, 0.999999),
    "optimizer.weight_decay": _RATE,
    "optimizer.decayed": _one_of("kernels", "all"),
    "optimizer.clip_norm": rule(0.0, 0, 1e9),
    "optimizer.schedule": _one_of("constant", "cosine"),
    "optimizer.warmup": _SHARE,
    "optimizer.first_cycle": _SHARE,
    "optimizer.final": _SHARE,
    "teacher.input": _one_of("waveform", "features"),
    "teacher.frontend.name": _TEXT,
    "teacher.model": _TEXT,
    "teacher.revision": _TEXT,
    "teacher.patch_frames": _FRAMES,
    "teacher.time_pooling": rule(1, 1, 10_000),
    "teacher.standardize": _SWITCH,
    "teacher.projector": rule(0, 0, 8192),
    "teacher.classifier_dims": rule((), 1, 8192),
    "teacher.dropout": _PART,
    "teacher.max_frequency_mask": _FRAMES,
    "teacher.max_time_mask": _FRAMES,
    "teacher.learning_rate": _RATE,
    "teacher.epochs": _EPOCHS,
    "student.kind": rule("", choices=STUDENTS),
    "student.standardize": _SWITCH,
    "student.pretrained": _TEXT,
    "student.label_smoothing": _PART,
    "student.focus": rule(0.0, 0, 100),
    "student.learning_rate": _RATE,
    "student.epochs": _EPOCHS,
    "contrastive.weight": _SHARE,
    "contrastive.temperature": _TEMPERATURE,
    "contrastive.momentum": _SHARE,
    "contrastive.queue_size": rule(1, 1, 10**6),
    "contrastive.max_frequency_mask": _FRAMES,
    "contrastive.max_time_mask": _FRAMES,
    "distill.alpha": _SHARE,
    "distill.beta": rule(0.0, 0, 1e9),
    "distill.soft": _SWITCH,
    "distill.temperature": _TEMPERATURE,
    "distill.direction": _one_of("teacher_student", "student_teacher"),
    "distill.learning_rate": _RATE,
    "distill.epochs": _EPOCHS,
    "meta.order": _one_of("second_order", "second_order_forward", "first_order", "none"),
    "meta.learning_rate": _RATE,
    "meta.pilot_learning_rate": _RATE,
    "meta.quiz_batch_size": rule(0, 0, 65_536),
    "curriculum.learning_rate": _RATE,
    "curriculum.epochs": _EPOCHS,
    "curriculum.task_by": _one_of("difficulty", "class"),
    "curriculum.num_tasks": rule(1, 1, 1000),
    "curriculum.sampling": _one_of("policy", "uniform"),
    "curriculum.hold_teacher": _SWITCH,
    "curriculum.episode_steps": rule(1, 1, 10_000),
    "curriculum.discount": _SHARE,
    "curriculum.running_rate": _SHARE,
    "curriculum.policy_width": rule(1, 1, 8192),
    "curriculum.policy_learning_rate": _RATE,
    "curriculum.easy_bias": rule(0.0, -1000, 1000),
}
# Keys that only some recipes have.
OPTIONAL = {
    "manifest": _TEXT,
    "label_map": _TEXT,
    "speaker_pattern": _TEXT,
    "synthetic.num_speakers": rule(1, 1, 1000),
    "synthetic.utterances_per_class": rule(1, 1, 10_000),
    "synthetic.min_seconds": rule(0.0, 0.1, 60),
    "synthetic.max_seconds": rule(0.0, 0.1, 60),
    "synthetic.seed": rule(0, 0, 2**32 - 1),
    **{f"frontend.{key}": allowed for key, allowed in _FRONTEND.items()},
    **{f"teacher.frontend.{key}": allowed for key, allowed in _FRONTEND.items()},
}
FROM_SCRATCH = {  # of a teacher without a pretrained model
    "teacher.width": rule(1, 1, 8192),
    "teacher.mlp_dim": rule(1, 1, 65_536),
    "teacher.num_layers": rule(1, 1, 100),
    "teacher.num_heads": rule(1, 1, 256),
}
# The keys of the config's `student` part that are not sizes of its kind.
STUDENT_SETTINGS = ("kind", "pretrained", "standardize", "label_smoothing", "focus")
STUDENT_SETTINGS += ("learning_rate", "epochs")
# Config keys that say where the data are, and where and how a run is carried out, not what it
# computes.
DATA_KEYS = ("data_dir", "manifest", "label_map", "protocol.file", "student.pretrained")
PATH_KEYS = (*DATA_KEYS, "cache_dir", "stages_dir")
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
    values = dict(leaves(config))
    needed = KEYS.keys() if values.get("teacher.model") else KEYS | FROM_SCRATCH
    if missing := [key for key in needed if key not in values]:
        raise UserError(f"the recipe has no {missing[0]}: see configs/common.py")
    sizes = {f"student.{key}" for key in config.student} - KEYS.keys()
    known = KEYS | OPTIONAL | FROM_SCRATCH
    for key, value in values.items():
        if key in sizes:  # checked by the student's kind
            continue
        if key not in known:
            raise UserError(f"the recipe has {key}, which nothing reads: remove or rename it")
        holds, allowed = known[key]
        if not holds(value):
            raise UserError(f"{key} is {value!r:.50}: use {allowed}")
    check_student(config, config.max_frames)
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
        raise UserError(f"teacher.width {width} is not divisible by teacher.num_heads {heads}")


def check_student(config: ConfigDict, frames: int, variates: int = 1) -> None:
    """Refuses a student whose sizes are not allowed or do not fit T and N; 1 if N is not known yet.

    Raises:
        UserError: says which size, and what is allowed.
    """
    try:
        student = make_student(config, num_classes=2)
        student.check(frames, variates)
    except ValueError as error:
        raise UserError(str(error)) from error
    if student.beside not in ("", config.frontend.get("beside")):
        raise UserError(
            f"student.kind={config.student.kind} reads {student.beside} and an encoder's frames: "
            f"use an encoder as front-end, with frontend.beside={student.beside}"
        )
    if student.beside and (student.bins, student.coefficients) != (BINS, COEFFICIENTS):
        raise UserError(
            f"student.bins and student.coefficients are {BINS} and {COEFFICIENTS} in the features"
        )
    if student.reads_dialogues and (config.student.standardize or config.contrastive.weight):
        raise UserError(
            f"student.kind={config.student.kind} reads speakers and marks beside the features: set "
            "student.standardize=False and contrastive.weight=0"
        )


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
    values = {key: value for key, value in leaves(config) if key not in PLACE_KEYS}
    return json.loads(json.dumps(values))  # as JSON would read them back


def leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields each value that is no part of a config, with its keys joined by dots."""
    for key, value in config.items():
        if isinstance(value, Mapping | ConfigDict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value

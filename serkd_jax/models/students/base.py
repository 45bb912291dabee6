"""What all students share: how their sizes are declared, what they take and what they give."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
from jax.typing import DTypeLike

from serkd_jax.losses import l2_normalize
from serkd_jax.models.transformer import mlp

LONGEST = 8  # list of sizes


class StudentOutput(NamedTuple):
    """What the student says of a batch."""

    hidden: jax.Array  # (B, R) encoder output as it is read out, h(., S)
    logits: jax.Array  # (B, C) ŷ(., S)
    projection: jax.Array | None  # (B, P) L2-normalised contrastive embedding, z


def size(
    default: Any,
    least: float | None = None,
    most: float | None = None,
    choices: Sequence[str] = (),
    deployed: bool = True,
) -> Any:
    """A field of a student that a recipe sets, and an exported `config.json` holds.

    Args:
        default: its value where nothing is said; its type is the field's. A tuple stands for a
            list of integers.
        least: of a number, or of each in a list.
        most: the same.
        choices: what a text may be.
        deployed: whether the exported model has it; False for what training alone reads.
    """
    rule = {"least": least, "most": most, "choices": tuple(choices), "deployed": deployed}
    return dataclasses.field(default=default, metadata=rule)


class Student(nn.Module):
    """A student: (B, T, N) features -> `StudentOutput`.

    Each kind is a subclass in a file of its own, and a line of `STUDENTS`. It declares its sizes by
    `size`, and makes its output by `classify_and_project`. It may have batch statistics (Flax's
    `batch_stats`, with `axis_name=self.axis`; they are updated where dropout is on), and
    dropout of its own by `serkd_jax.models.transformer.Dropout`.

    Attributes:
        num_classes: C.
        classifier_dims: hidden widths of the classifier.
        projection_dims: widths of the contrastive projection, the last being P; training alone
            needs it, and empty is none.
        dtype: of the encoder's computation; None means that of inputs and parameters.
        remat: whether activations are computed again for the gradient, not kept, where it can.
        portable: whether it keeps to operations that every export format knows.
        axis: name of the device axis that batch statistics are averaged over; None is one device.
        description: class attribute, what the model card calls it, with its article.
    """

    num_classes: int
    classifier_dims: Sequence[int] = size((384, 128), 1, 8192)
    projection_dims: Sequence[int] = size((256, 256), 1, 8192, deployed=False)
    dtype: DTypeLike | None = None
    remat: bool = False
    portable: bool = False
    axis: str | None = None

    description: ClassVar[str]

    def __call__(
        self, features: jax.Array, num_frames: jax.Array, dropout_keys: jax.Array | None = None
    ) -> StudentOutput:
        """Encodes and classifies.

        Args:
            features: (B, T, N) float, zero after each example's `num_frames` frames.
            num_frames: (B,) int.
            dropout_keys: (B,) a key per example, in training; None turns dropout off.
        """
        raise NotImplementedError

    def check(self, frames: int, variates: int = 1) -> None:
        """Raises a ValueError where its sizes do not fit each other, or T and N; or are too many.

        Args:
            frames: T.
            variates: N; 1 where it is not known yet.
        """

    @nn.nowrap
    def classify_and_project(self, hidden: jax.Array) -> StudentOutput:
        """The output of h(., S), (B, R) in float32; call it in a compact `__call__`."""
        logits = mlp(hidden, (*self.classifier_dims, self.num_classes), "classifier")
        projection = None
        if self.projection_dims:
            projection = l2_normalize(mlp(hidden, self.projection_dims, "projection"))
        return StudentOutput(hidden, logits, projection)


def sizes(kind: type[Student], deployed: bool = False) -> dict[str, dataclasses.Field]:
    """The fields of a kind that were declared by `size`; with `deployed`, of exported models."""
    fields = {x.name: x for x in dataclasses.fields(kind) if "deployed" in x.metadata}
    return {name: x for name, x in fields.items() if x.metadata["deployed"] or not deployed}


def check_sizes(
    kind: type[Student], values: Mapping[str, Any], deployed: bool = False
) -> dict[str, Any]:
    """The sizes of a kind, as its constructor takes them, from a recipe or a `config.json`.

    Raises:
        ValueError: names one that is absent or too many, or is not what was declared.
    """
    declared = sizes(kind, deployed)
    if unknown := ", ".join(values.keys() - declared.keys()):
        raise ValueError(
            f"student must have the keys {', '.join(declared)}; {unknown} is none of them"
        )
    if missing := declared.keys() - values.keys():
        raise ValueError(f"student must have the keys {', '.join(sorted(missing))}, too")
    for name, field in declared.items():
        holds, allowed = _rule(field)
        if not holds(values[name]):
            raise ValueError(f"student.{name} is {str(values[name])[:50]}: use {allowed}")
    return {name: tuple(x) if isinstance(x, list) else x for name, x in values.items()}


def _rule(field: dataclasses.Field) -> tuple[Callable[[Any], bool], str]:
    """Whether a value is allowed, and in words which are."""
    least, most, choices = (field.metadata[key] for key in ("least", "most", "choices"))
    kind = type(field.default)
    if choices:
        return lambda value: value in choices, " or ".join(choices)
    if kind is bool:
        return lambda value: type(value) is bool, "True or False"
    numbers = (int, float) if kind is float else (int,)
    span = f"{least} to {most}" if kind is float else f"an integer, {least} to {most}"

    def is_number(value: Any) -> bool:
        return type(value) in numbers and least <= value <= most

    def are_numbers(values: Any) -> bool:
        listed = isinstance(values, list | tuple) and len(values) <= LONGEST
        return listed and all(map(is_number, values))

    if kind is tuple:
        return are_numbers, f"a list of up to {LONGEST}, each {span}"
    return is_number, span


class Adapter(nn.Module):
    """Maps h(., S) to the teacher's width, for Eqs. 8, 9 and 12, where it has another.

    Used in training alone; it is not part of the deployed student.
    """

    width: int

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        """(B, R) -> (B, width)."""
        return nn.Dense(self.width, name="dense")(hidden)


def adapt(adapter: Adapter | None, params: Any, hidden: jax.Array) -> jax.Array:
    """h(., S) in the teacher's width; without an adapter it has that."""
    return hidden if adapter is None else adapter.apply({"params": params}, hidden)

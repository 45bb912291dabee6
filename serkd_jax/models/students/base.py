"""What all students share: how they declare their sizes, and their inputs and outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from serkd_jax.losses import l2_normalize
from serkd_jax.models.transformer import mlp

LONGEST = 8  # entries in a list of sizes
# A predicate of the allowed values, and a description of them.
Rule = tuple[Callable[[Any], bool], str]


class StudentOutput(NamedTuple):
    """The student's outputs for a batch."""

    hidden: jax.Array  # (B, R) encoder output after the readout, h(., S)
    logits: jax.Array  # (B, C) ŷ(., S)
    projection: jax.Array | None  # (B, P) L2-normalised contrastive embedding, z


def size(
    default: Any,
    least: float | None = None,
    most: float | None = None,
    choices: Sequence[str] = (),
    deployed: bool = True,
) -> Any:
    """Declares a field of a student that recipes set and that an exported `config.json` contains.

    Args:
        default: the default, whose type is the field's type. A tuple stands for a list of integers.
        least: the least value of the number, or of each number in the list.
        most: the greatest value likewise.
        choices: the values that a text may have.
        deployed: whether the exported model has the field; False if only training reads it.
    """
    rule = {"least": least, "most": most, "choices": tuple(choices), "deployed": deployed}
    return dataclasses.field(default=default, metadata=rule)


class Student(nn.Module):
    """A student, which maps features (B, T, N) to a `StudentOutput`.

    Each kind is a subclass in a file of its own, with a line in `STUDENTS`. It declares its sizes
    with `size` and makes its output with `classify_and_project`. It may have batch statistics
    (Flax's `batch_stats`, with `axis_name=self.axis`, updated when dropout is on), and dropout of
    its own with `serkd_jax.models.transformer.Dropout`.

    Attributes:
        num_classes: C.
        classifier_dims: hidden widths of the classifier.
        projection_dims: widths of the contrastive projection, the last being P. Only training needs
            the projection; empty for none.
        dtype: dtype of the encoder's computation; None means that of inputs and parameters.
        remat: whether to compute activations again for the gradient instead of keeping them, where
            the student can.
        portable: whether to use only operations that every export format knows.
        axis: name of the device axis over which batch statistics are averaged; None for one device.
        description: class attribute; what the model card calls the student, with an article.
        beside: class attribute; the front-end without a model whose frames the student reads beside
            those of an encoder, if it does.
        reads_dialogues: class attribute; whether its features are those of
            `serkd_jax.data.dialogues`, not an utterance's frames.
    """

    num_classes: int
    classifier_dims: Sequence[int] = size((384, 128), 1, 8192)
    projection_dims: Sequence[int] = size((256, 256), 1, 8192, deployed=False)
    dtype: DTypeLike | None = None
    remat: bool = False
    portable: bool = False
    axis: str | None = None

    description: ClassVar[str]
    beside: ClassVar[str] = ""
    reads_dialogues: ClassVar[bool] = False

    def __call__(
        self, features: jax.Array, num_frames: jax.Array, dropout_keys: jax.Array | None = None
    ) -> StudentOutput:
        """Encodes and classifies.

        Args:
            features: (B, T, N) float, zero after the first `num_frames` frames of each example.
            num_frames: (B,) int, the numbers of valid frames.
            dropout_keys: (B,) keys in training, one per example; None turns dropout off.
        """
        raise NotImplementedError

    def check(self, frames: int, variates: int = 1) -> None:
        """Checks that the sizes fit each other and T and N, and are not too large.

        Args:
            frames: T.
            variates: N; 1 if it is not known yet.

        Raises:
            ValueError: they do not fit, or are too large.
        """

    @nn.nowrap
    def classify_and_project(
        self,
        hidden: jax.Array,
        dropout: float = 0.0,
        dropout_keys: jax.Array | None = None,
        kernel_init: nn.initializers.Initializer = nn.linear.default_kernel_init,
    ) -> StudentOutput:
        """Makes the output from h(., S); call it in a compact `__call__`.

        Args:
            hidden: (B, R) h(., S), in float32.
            dropout: dropout rate between the classifier's layers.
            dropout_keys: (B,) keys, one per example; None turns dropout off.
            kernel_init: the initializer of the classifier's kernels.
        """
        widths = (*self.classifier_dims, self.num_classes)
        logits = mlp(hidden, widths, "classifier", dropout, dropout_keys, kernel_init)
        projection = None
        if self.projection_dims:
            projection = l2_normalize(mlp(hidden, self.projection_dims, "projection"))
        return StudentOutput(hidden, logits, projection)


def sizes(kind: type[Student], deployed: bool = False) -> dict[str, dataclasses.Field]:
    """Returns the fields that a kind declares with `size`; with `deployed`, only exported ones."""
    fields = {x.name: x for x in dataclasses.fields(kind) if "deployed" in x.metadata}
    return {name: x for name, x in fields.items() if x.metadata["deployed"] or not deployed}


def check_sizes(
    kind: type[Student], values: Mapping[str, Any], deployed: bool = False
) -> dict[str, Any]:
    """Checks the sizes in a recipe or a `config.json`, and returns them for the constructor.

    Raises:
        ValueError: a size is missing, unknown or not allowed; the message names it.
    """
    declared = sizes(kind, deployed)
    if unknown := ", ".join(values.keys() - declared.keys()):
        raise ValueError(
            f"student must have the keys {', '.join(declared)}; {unknown} is none of them"
        )
    if missing := declared.keys() - values.keys():
        raise ValueError(f"student must have the keys {', '.join(sorted(missing))}, too")
    for name, field in declared.items():
        least, most, choices = (field.metadata[key] for key in ("least", "most", "choices"))
        holds, allowed = rule(field.default, least, most, choices)
        if not holds(values[name]):
            raise ValueError(f"student.{name} is {str(values[name])[:50]}: use {allowed}")
    return {name: tuple(x) if isinstance(x, list) else x for name, x in values.items()}


def rule(
    default: Any,
    least: float | None = None,
    most: float | None = None,
    choices: Collection[str] = (),
) -> Rule:
    """Makes the rule of a value of the default's type; see `size`."""
    kind = type(default)
    if choices:
        return lambda value: value in list(choices), " or ".join(choices)
    if kind is bool:
        return lambda value: type(value) is bool, "True or False"
    if kind is str:
        return lambda value: isinstance(value, str) and "\0" not in value, "text"
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
    """Maps h(., S) to the teacher's width for Eqs. 8, 9 and 12, where its own width differs.

    It is used only in training and is not part of the deployed student.
    """

    width: int

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Maps hidden vectors (B, R) to (B, width)."""
        return nn.Dense(self.width, name="dense")(hidden)


def adapt(adapter: Adapter | None, params: Any, hidden: jax.Array) -> jax.Array:
    """Returns h(., S) in the teacher's width, which it already has if there is no adapter."""
    return hidden if adapter is None else adapter.apply({"params": params}, hidden)


def deployed_params(params: dict[str, Any]) -> dict[str, Any]:
    """Leaves out what only the contrastive branch needs, its projection."""
    return {name: x for name, x in params.items() if not name.startswith("projection_")}


def small_uniform(fan: int) -> nn.initializers.Initializer:
    """Returns torch's default initializer: uniform up to 1 / sqrt(fan) on both sides of 0.

    In a linear layer `fan` is the number of inputs; in a recurrent one, that of hidden units.
    """

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -(fan**-0.5), fan**-0.5)

    return init

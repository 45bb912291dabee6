"""The students, a file each. A new one is a file here and a line of `STUDENTS`.

Nothing is imported before it is needed: who only checks a name needs neither JAX nor Flax.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serkd_jax.models.students.base import Student

# What `config.student.kind` may be, and the module and class of each.
STUDENTS = {"inverted": "serkd_jax.models.students.inverted:InvertedStudent"}


def find_student(kind: str) -> "type[Student]":
    """The class of a kind, one of `STUDENTS`."""
    module, _, name = STUDENTS[kind].partition(":")
    return getattr(importlib.import_module(module), name)

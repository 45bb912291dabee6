"""The students, one file each; a new student is a file here and a line in `STUDENTS`.

Students are imported only when they are needed: checking a name needs neither JAX nor Flax.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serkd_jax.models.students.base import Student

# The values of `config.student.kind`, with the module and class of each.
STUDENTS = {
    "inverted": "serkd_jax.models.students.inverted:InvertedStudent",
    "convolutional": "serkd_jax.models.students.convolutional:ConvolutionalStudent",
    "timnet": "serkd_jax.models.students.timnet:TimNet",
    "dwformer": "serkd_jax.models.students.dwformer:DWFormer",
    "shiftcnn": "serkd_jax.models.students.shiftcnn:ShiftCNN",
    "shiftformer": "serkd_jax.models.students.shiftcnn:Shiftformer",
    "shiftlstm": "serkd_jax.models.students.shiftcnn:ShiftLSTM",
    "speechformer": "serkd_jax.models.students.speechformer:SpeechFormer",
    "camser": "serkd_jax.models.students.camser:CAMSER",
    "mmdfn": "serkd_jax.models.students.mmdfn:MMDFN",
}


def find_student(kind: str) -> "type[Student]":
    """Returns the class of a kind, one of `STUDENTS`."""
    module, _, name = STUDENTS[kind].partition(":")
    return getattr(importlib.import_module(module), name)

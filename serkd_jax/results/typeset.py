"""Tables as Markdown, LaTeX (booktabs) and CSV."""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from serkd_jax.data.tables import markdown_cell

_LATEX = {
    "\\": r"\textbackslash{}",
    **{mark: f"\\{mark}" for mark in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "−": r"$-$",
    "–": "--",
    '"': "''",
    "[": "{[}",  # at the start of a line it would be an option of the line before
}


class Table(NamedTuple):
    """A table of text.

    Attributes:
        name: what its file and its LaTeX label are called.
        title: its heading or caption.
        header: the titles of its columns.
        rows: its cells.
        notes: sentences below it.
    """

    name: str
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


def markdown(table: Table) -> str:
    """Returns a heading, the table and its notes."""
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    text = "\n".join(f"| {' | '.join(map(markdown_cell, line))} |" for line in lines)
    return "\n\n".join([f"## {table.title}", text, *table.notes]) + "\n"


def latex(table: Table) -> str:
    r"""Returns a `table` for a document with `\usepackage{booktabs}`."""
    kinds = "".join(_alignment(column) for column in zip(*table.rows, strict=True))
    lines = [" & ".join(map(escape_latex, line)) + r" \\" for line in (table.header, *table.rows)]
    caption = escape_latex(" ".join([f"{table.title}.", *table.notes]))
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{caption}}}",
            rf"\label{{tab:{table.name}}}",
            rf"\begin{{tabular}}{{{kinds or 'l' * len(table.header)}}}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:],
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _alignment(column: Sequence[str]) -> str:
    return "r" if all(re.match(r"[\d+−–<]", cell) for cell in column) else "l"


def escape_latex(text: str) -> str:
    """Returns text that LaTeX prints as it is."""
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns a CSV file with a header."""
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()

"""Compares finished runs: `python -m serkd_jax.compare RUN [RUN ...] [--out=FOLDER]`.

A RUN is a workdir, or a folder of workdirs. Runs that differ in their seed alone are one line of
the tables. docs/results.md says what is computed and how to read it.
"""

import sys
from pathlib import Path

from absl import app, flags

from serkd_jax.errors import parse_flags

_OUT = flags.DEFINE_string(
    "out",
    "",
    "Folder for a page, and the tables as Markdown, LaTeX and CSV files.",
    allow_override=True,
)


def main(argv: list[str]) -> None:
    """Prints the comparison; names what cannot be read, and compares the others."""
    # Slow to import, so only after the flags are parsed.
    from serkd_jax.files import write_file
    from serkd_jax.results import comparison_tables as made
    from serkd_jax.results import typeset
    from serkd_jax.results.comparison import compare, read_runs
    from serkd_jax.results.html_comparison import comparison_page

    runs, problems = read_runs(argv[1:])
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    if not runs:
        sys.exit("error: no run to compare: name workdirs of finished runs, or folders of them")
    comparison = compare(runs)
    comparison.notes.extend(f"Left out: {problem}." for problem in problems)
    tables = made.tables_of(comparison)
    report = "\n".join(["# Comparison\n", *map(typeset.markdown, tables)])
    print(report)
    if not _OUT.value:
        return
    tests = comparison.between_rows + comparison.between_runs
    files = {
        "comparison.md": report,
        "comparison.html": comparison_page(comparison),
        "comparison.tex": "\n".join(map(typeset.latex, tables)),
        "comparison.csv": typeset.to_csv(made.scores_as_records(comparison.scores)),
        "tests.csv": typeset.to_csv(made.tests_as_records(tests)),
        "mcnemar.csv": typeset.to_csv(made.mcnemar_as_records(tests)),
    }
    for table in made.paper_tables(comparison):
        lines = [dict(zip(table.header, row, strict=True)) for row in table.rows]
        files[f"{table.name}.csv"] = typeset.to_csv(lines)
    try:
        for name, text in files.items():
            write_file(Path(_OUT.value) / name, text)
    except OSError as error:
        sys.exit(f"error: {error}")
    print(f"Written to {_OUT.value}: {', '.join(files)}")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)

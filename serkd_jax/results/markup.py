"""Pieces of a report in HTML: pages, sections, tables, pictures. Everything untrusted is escaped.

A page is one file without scripts. It loads nothing, which its Content-Security-Policy enforces.
"""

import json
import math
import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from serkd_jax.results.figures import printable

Row = Sequence[str]
Panel = tuple[str, str]
"""A picture's heading, and its SVG."""

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_VALUE = r"[-−+<]?[\d.,]+( ?%| ± [\d.]+|M)?"
_NUMBER = re.compile(rf"({_VALUE}( to {_VALUE})?( / [\d,]+)?( \([^()]*\))?|[–—]?)$")

CSS = """
:root{color-scheme:light dark;--ink:#1f2328;--soft:#57606a;--faint:#d8dce1;--paper:#fefefe;
--cell:#3b95d6;--blue:#0067a6;--orange:#c85000;--green:#00795a;--pink:#b0508a;--ochre:#a06a00;
--sky:#2f8fc4;--grey:#6a6f76;--brown:#7b4a2e;
--serif:Charter,"Bitstream Charter","Sitka Text",Cambria,"Noto Serif","DejaVu Serif",serif;
--sans:"Helvetica Neue",Helvetica,Arial,"Liberation Sans","Noto Sans","DejaVu Sans",sans-serif}
@media (prefers-color-scheme:dark){:root{--ink:#e6e8eb;--soft:#a9b1ba;--faint:#3c434b;
--paper:#14171b;--cell:#1f5f9c;--blue:#5cb3f0;--orange:#ff9a4d;--green:#35c89a;--pink:#ec9ac8;
--ochre:#e5b143;--sky:#9bdcff;--grey:#a9b0b8;--brown:#d6a68a}}
@media print{:root{color-scheme:light;--ink:#000;--soft:#333;--faint:#ccc;--paper:#fff;
--cell:#3b95d6;--blue:#0067a6;--orange:#c85000;--green:#00795a;--pink:#b0508a;--ochre:#a06a00;
--sky:#2f8fc4;--grey:#6a6f76;--brown:#7b4a2e}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0 auto;padding:2.5rem 1.25rem 4rem;max-width:70rem;background:var(--paper);
color:var(--ink);font:1.0625rem/1.55 var(--serif);overflow-wrap:break-word}
header{border-bottom:3px double var(--ink);padding-bottom:1rem}
h1{font-size:2rem;line-height:1.2;margin:0 0 .5rem;font-weight:600}
h2{font-size:1.4rem;line-height:1.25;margin:3rem 0 .5rem;padding-top:.6rem;font-weight:600;
border-top:1px solid var(--ink)}
h3{font-size:1.0625rem;margin:1.75rem 0 .25rem;font-weight:600;font-style:italic}
p,li,figcaption{max-width:42rem}
p{margin:.5rem 0 .9rem;hyphens:auto;orphans:3;widows:3}
a{color:var(--blue)}
a:focus-visible,summary:focus-visible,.scroll:focus-visible{outline:2px solid var(--orange);
outline-offset:2px}
code{font:.86em/1.4 ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace;
overflow-wrap:anywhere}
nav ol{columns:2;column-gap:2rem;padding-left:1.5rem;margin:.25rem 0 0;max-width:42rem}
nav p{margin:1rem 0 0;font-style:italic}
figure{margin:1.5rem 0}
figure svg{max-width:100%;height:auto;display:block;font-family:var(--sans)}
.panels{display:flex;flex-wrap:wrap;gap:1.25rem 1.5rem;align-items:flex-start}
.panel{margin:0;max-width:100%;min-width:0}
.panel>p{font:600 .875rem/1.3 var(--sans);margin:0 0 .3rem}
figcaption{font-size:.9375rem;line-height:1.45;margin:.6rem 0 .3rem}
figcaption::before{counter-increment:figure;content:"Figure " counter(figure) ". ";
font-weight:600}
body{counter-reset:figure table}
.scroll{overflow-x:auto;max-width:100%;margin:1rem 0}
.tall{max-height:26rem;overflow-y:auto}
table{border-collapse:collapse;font:.875rem/1.4 var(--sans);font-variant-numeric:tabular-nums;
border-bottom:1.5px solid var(--ink)}
caption{text-align:left;font:.9375rem/1.45 var(--serif);padding-bottom:.35rem}
caption span{display:inline-block;position:sticky;left:0;max-width:min(42rem,calc(100vw - 2.5rem))}
.numbered caption span::before{counter-increment:table;content:"Table " counter(table) ". ";
font-weight:600}
th,td{padding:.22rem .9rem .22rem 0;text-align:left;vertical-align:top}
th:last-child,td:last-child{padding-right:.2rem}
thead th{border-top:1.5px solid var(--ink);border-bottom:1px solid var(--ink);font-weight:600;
vertical-align:bottom}
tbody th{font-weight:400;min-width:6.5rem}
td.n,th.n{text-align:right}
td.n{white-space:nowrap}
td.text{overflow-wrap:anywhere;min-width:9rem}
details{margin:.3rem 0 1rem}
summary{cursor:pointer;font:.875rem/1.4 var(--sans);color:var(--soft)}
footer{margin-top:3rem;border-top:1px solid var(--ink);font-size:.9375rem;color:var(--soft)}
.note{color:var(--soft)}
@media (max-width:40rem){body{font-size:1rem;padding:1.25rem 1rem 3rem}h1{font-size:1.6rem}
nav ol{columns:1}}
@media print{.panels{display:block;zoom:.85}.panel{display:inline-block;margin:0 1rem 1rem 0;
vertical-align:top}nav{display:none}
body{max-width:none;padding:0;font-size:10pt}
h2,h3,figcaption,caption{break-after:avoid}figure,.panel,tr{break-inside:avoid}
.scroll,.tall{overflow:visible;max-height:none}a{color:inherit;text-decoration:none}
details:not([open]){display:none}table{font-size:7.5pt}td.text{min-width:3.6rem}
tbody th{min-width:0}th,td{padding-right:.6rem}}
@page{margin:18mm}
""".strip()


def text(value: object) -> str:
    """Escapes a text for HTML, also inside quoted attributes."""
    return escape(printable(value))


def paragraph(sentence: str, note: bool = False) -> str:
    """Makes a paragraph of a text, in which backticks mark code."""
    return f"<p{' class=note' * note}>{_inline(sentence)}</p>\n"


def subheading(words: str) -> str:
    """Makes a heading within a section."""
    return f"<h3>{text(words)}</h3>\n"


def table(
    caption: str,
    head: Row,
    rows: Iterable[Row],
    numbered: bool = False,
    tall: bool = False,
    names: int = 1,
) -> str:
    """Makes a table that scrolls in a box of its own where it is too wide.

    Args:
        caption: what it shows.
        head: names of the columns.
        rows: the cells, of which the first names the row.
        numbered: whether it is one of the report's tables, instead of the numbers of a picture.
        tall: whether it scrolls downwards, too.
        names: how many columns, from the first, hold names, which are never set as numbers.
    """
    rows = [*rows]
    numeric = [i >= names and all(_NUMBER.match(row[i]) for row in rows) for i in range(len(head))]

    def cells(row: Row, tag: str) -> str:
        made = []
        for i, value in enumerate(row):
            kind = "th" if i == 0 else tag
            scope = f" scope={'col' if tag == 'th' else 'row'}" if kind == "th" else ""
            look = " class=n" if numeric[i] else "" if kind == "th" else " class=text"
            direction = "" if numeric[i] and tag == "td" else " dir=auto"
            made.append(f"<{kind}{scope}{look}{direction}>{text(value)}</{kind}>")
        return f"<tr>{''.join(made)}</tr>"

    classes = "scroll" + " numbered" * numbered + " tall" * tall
    return (
        f'<div class="{classes}" role=region tabindex=0 aria-label="{text(caption)}">'
        f"<table><caption><span>{text(caption)}</span></caption>\n"
        f"<thead>{cells(head, 'th')}</thead>\n"
        f"<tbody>{chr(10).join(cells(row, 'td') for row in rows)}</tbody></table></div>\n"
    )


def figure(panels: Iterable[Panel], caption: str, *numbers: str) -> str:
    """Makes a figure of pictures (heading, SVG), with its caption and the tables of its numbers."""
    made = "".join(
        f"<div class=panel>{f'<p dir=auto>{text(heading)}</p>' if heading else ''}{svg}</div>\n"
        for heading, svg in panels
    )
    return (
        f"<figure><div class=panels>{made}</div><figcaption>{text(caption)}</figcaption></figure>\n"
        + (details("The numbers of this figure", *numbers) if numbers else "")
    )


def details(summary: str, *parts: str) -> str:
    """Hides parts until they are asked for."""
    return f"<details><summary>{text(summary)}</summary>{''.join(parts)}</details>\n"


def percent(value: float | None) -> str:
    """Prints a share in %, or a dash where there is none."""
    return "–" if value is None or not math.isfinite(value) else f"{100 * value:.1f}"


def points(value: float) -> str:
    """Prints a difference of shares in percentage points, with its sign."""
    return f"{100 * value:+.1f}".replace("-", "−")


def number(value: float) -> str:
    """Prints a number with three decimals, or a dash where there is none."""
    return f"{value:.3f}" if math.isfinite(value) else "–"


def setting(value: Any) -> str:
    """Prints the value of a setting."""
    return value if isinstance(value, str) else json.dumps(value)


def several(count: int, what: str) -> str:
    """Prints a count of things: `1 fold`, `5 classes`."""
    ending = "" if count == 1 else "es" if what.endswith("s") else "s"
    return f"{count:,} {what}{ending}"


def row_name(row: str) -> str:
    """Names a row of the results in words."""
    return {"meta_teacher": "meta-teacher"}.get(row, row.replace("_", " "))


def page(title: str, introduction: str, sections: Sequence[tuple[str, str]]) -> str:
    """Makes a page of sections (heading, HTML), with a list of contents.

    Args:
        title: the page's name.
        introduction: HTML, above the contents.
        sections: heading and HTML of each.
    """
    contents = "".join(
        f'<li><a href="#s{i}">{text(heading)}</a></li>'
        for i, (heading, _) in enumerate(sections, 1)
    )
    body = "".join(
        f"<section aria-labelledby=s{i}><h2 id=s{i}>{i}. {text(heading)}</h2>\n{html}</section>\n"
        for i, (heading, html) in enumerate(sections, 1)
    )
    return (
        "<!DOCTYPE html>\n<html lang=en><head><meta charset=utf-8>\n"
        f'<meta http-equiv=Content-Security-Policy content="{POLICY}">\n'
        '<meta name=viewport content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>\n{CSS}\n</style></head>\n<body>\n"
        f"<header><h1 dir=auto>{text(title)}</h1>\n{introduction}</header>\n"
        f"<nav aria-label=Contents><p>Contents</p><ol>{contents}</ol></nav>\n"
        f"<main>\n{body}</main>\n</body></html>\n"
    )


def markdown(source: str) -> str:
    """Renders the Markdown of our own reports: paragraphs, tables, lists and code, no HTML."""
    return "".join(_block(block) for block in re.split(r"\n\s*\n", source.strip()) if block.strip())


def _block(block: str) -> str:
    lines = block.splitlines()
    if lines[0].startswith("|") and len(lines) > 1:
        head, _, *rows = [
            [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            for line in lines
        ]
        return table("Utterances by class", head, rows, numbered=True)
    if all(line.startswith("- ") for line in lines):
        return f"<ul>{''.join(f'<li>{_inline(line[2:])}</li>' for line in lines)}</ul>\n"
    if lines[0].startswith("#"):
        return f"<h3>{_inline(lines[0].lstrip('# '))}</h3>\n"
    return f"<p>{_inline(' '.join(lines))}</p>\n"


def _inline(source: str) -> str:
    """Escapes a text, and sets what is between backticks as code."""
    parts = re.split(r"`([^`]+)`", source)
    return "".join(
        f"<code><bdi>{text(part)}</bdi></code>" if i % 2 else text(part)
        for i, part in enumerate(parts)
    )

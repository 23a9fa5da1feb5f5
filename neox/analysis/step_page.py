"""HTML page of a step without scripts: the text of each row, by document, with its provenance."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path

from neox.analysis.sample_inspector import Passage, Row
from neox.system.files import write_atomic
from neox.system.pictures import html_page

STYLE = """
section { border-top: 1px solid var(--line); padding: .5rem 0 1rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .1rem 0 .6rem; padding: .4rem .6rem; border-radius: 4px;
      font: 13px/1.45 var(--mono); border-left: 4px solid var(--colour); background: var(--card); }
pre:nth-of-type(3n + 1) { --colour: var(--c2); }
pre:nth-of-type(3n + 2) { --colour: var(--c3); }
pre:nth-of-type(3n) { --colour: var(--c0); }
"""


def write_step_page(path: Path, rows: Iterable[Row], title: str) -> None:
    """Write the page of these rows of a step atomically."""
    body = "\n".join(_row(row) for row in rows)
    write_atomic(path, html_page(title, body, STYLE).encode("utf-8", "replace"))


def _row(row: Row) -> str:
    passages = "\n".join(_passage(passage) for passage in row.passages)
    head = f"<h2><a href=#row-{row.row}>row {row.row}</a>, sample {row.sample:,}</h2>"
    return f"<section id=row-{row.row}>{head}{passages}</section>"


def _passage(passage: Passage) -> str:
    span = passage.span
    where = f"{passage.name}, tokens {span.offset} to {span.offset + span.tokens - 1}"
    # Browsers drop a line break right after <pre>: add one.
    return f"<small>{escape(' · '.join([*passage.origin.known, where]))}</small><pre>\n{escape(passage.text)}</pre>"

"""HTML page of a step without scripts: the text of each row, by document, with its provenance."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path

from neox.analysis.sample_inspector import Passage, Row
from neox.system.files import write_atomic

STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }
section { border-top: 1px solid #8886; padding: .5rem 0 1rem; }
h2 { font-size: 1rem; margin: .5rem 0; }
small { color: #777; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .1rem 0 .6rem; padding: .4rem .6rem; border-radius: 4px;
      font: 13px/1.45 ui-monospace, monospace; border-left: 4px solid; }
pre:nth-of-type(3n + 1) { background: #3b82f61a; border-color: #3b82f6; }
pre:nth-of-type(3n + 2) { background: #f59e0b1a; border-color: #f59e0b; }
pre:nth-of-type(3n) { background: #10b9811a; border-color: #10b981; }
"""


def write_step_page(path: Path, rows: Iterable[Row], title: str) -> None:
    """Write the page of these rows of a step atomically."""
    body = "\n".join(_row(row) for row in rows)
    head = f"<!doctype html><meta charset=utf-8><title>{escape(title)}</title><style>{STYLE}</style>"
    write_atomic(path, f"{head}<h1>{escape(title)}</h1>\n{body}\n".encode("utf-8", "replace"))


def _row(row: Row) -> str:
    passages = "\n".join(_passage(passage) for passage in row.passages)
    head = f"<h2><a href=#row-{row.row}>row {row.row}</a>, sample {row.sample:,}</h2>"
    return f"<section id=row-{row.row}>{head}{passages}</section>"


def _passage(passage: Passage) -> str:
    span = passage.span
    where = f"{passage.name}, tokens {span.offset} to {span.offset + span.tokens - 1}"
    # Browsers drop a line break right after <pre>: add one.
    return f"<small>{escape(' · '.join([*passage.origin.known, where]))}</small><pre>\n{escape(passage.text)}</pre>"

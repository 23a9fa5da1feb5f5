"""A step's rows as one HTML page without scripts: the text of each row, document by document, and where it is from."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path

from neox.analysis.sample_inspector import Row, Stretch
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
    """Write the page of these rows of a step; the file is the old one or the new one, never a half."""
    body = "\n".join(_row(row) for row in rows)
    head = f"<!doctype html><meta charset=utf-8><title>{escape(title)}</title><style>{STYLE}</style>"
    write_atomic(path, f"{head}<h1>{escape(title)}</h1>\n{body}\n".encode("utf-8", "replace"))


def _row(row: Row) -> str:
    stretches = "\n".join(_stretch(stretch) for stretch in row.stretches)
    head = f"<h2><a href=#row-{row.row}>row {row.row}</a>, sample {row.sample:,}</h2>"
    return f"<section id=row-{row.row}>{head}{stretches}</section>"


def _stretch(stretch: Stretch) -> str:
    piece = stretch.piece
    where = f"{stretch.name}, tokens {piece.offset} to {piece.offset + piece.tokens - 1}"
    # A line break right behind <pre> is dropped by browsers: hence one of our own.
    return f"<small>{escape(' · '.join([*stretch.origin.known, where]))}</small><pre>\n{escape(stretch.text)}</pre>"

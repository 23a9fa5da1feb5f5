"""What is read by itself: a file, a stretch of one, or a part of a data set; and the documents that come out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

PIECE_BYTES = 64 << 20
"""Where a format allows it, a larger file is read in pieces of about this many bytes."""


class Document(NamedTuple):
    """One document as its source holds it."""

    text: str
    taken: float = 0.0
    """Its share of the bytes that the progress bar counts: of the file, compressed where that is."""
    meta: Any = None
    """What stands beside the text under `meta_key`, such as the Pile's `{"pile_set_name": ...}`; None without one."""
    source: str = ""
    """The file or data set that it is from, as `Piece.name`; said where several pieces are read as one."""


@dataclass(frozen=True)
class Piece:
    """A stretch of a file or of a data set, read by itself. The pieces of a file hold each of its documents once."""

    name: str
    """Path, URL, or name on the hub (at a commit)."""
    kind: str
    """Which reader: a suffix of `FORMATS`, "saved" or "hub"."""
    start: int = 0
    """Bytes of the file, row groups, rows or shards, as the kind goes."""
    end: int | None = None
    """Where the next piece starts; None is the end of the file."""
    size: int = 0
    """Bytes that the progress bar counts; 0 where nothing says."""

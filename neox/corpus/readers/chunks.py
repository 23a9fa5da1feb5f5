"""Chunks, the units that are read by themselves, and the documents in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

CHUNK_BYTES = 64 << 20
"""Size of a chunk of a larger file, about, where the format can be cut."""


class Document(NamedTuple):
    """One document as its source holds it."""

    text: str
    taken: float = 0.0
    """Its share of the bytes that the progress bar counts: of the file, compressed where that is."""
    meta: Any = None
    """Value of `meta_key` beside the text, such as the Pile's `{"pile_set_name": ...}`; None without one."""
    source: str = ""
    """The file or data set that it is from, as `Chunk.name`; set where several chunks are read as one."""


@dataclass(frozen=True)
class Chunk:
    """A range of a file or of a data set that is read by itself.

    The chunks of a file hold each of its documents once.
    """

    name: str
    """Path, URL, or name on the hub (at a commit)."""
    kind: str
    """Key of its reader in `FORMATS`: a suffix, "saved" or "hub"."""
    start: int = 0
    """Bytes of the file, row groups, rows or shards, as the kind goes."""
    end: int | None = None
    """Where the next chunk starts; None is the end of the file."""
    size: int = 0
    """Bytes that the progress bar counts; 0 where nothing says."""

"""Corpora cut into shards, each the work of one process, and documents into batches, each the work of one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Any, TypeVar

from neox.corpus.readers import Document, Faults, Piece, Source, read_piece
from neox.corpus.readers.chunks import PIECE_BYTES

T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """Pieces that lie one after another in the order of the sources; shards in a row hold each document once."""

    number: int
    """Its place among the shards, from 0."""
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """Bytes that the progress bar counts, compressed ones as they are."""
        return sum(piece.size for piece in self.pieces)


def shards(sources: Sequence[Source]) -> list[Shard]:
    """The sources as shards of about 64 MiB: large files cut, small ones together; what cannot be cut is one shard.

    A function of the sources alone: the number of workers plays no part. For the documents of a name that a user gave:
    `documents(shard)` of each of `shards(find_sources(names))`.
    """
    found: list[Shard] = []
    together: list[Piece] = []
    size = 0
    for piece in (piece for source in sources for piece in source.pieces()):
        # A data set on the hub that does not state its size counts as large.
        weight = piece.size if piece.size or piece.kind != "hub" else PIECE_BYTES
        if together and size + weight > PIECE_BYTES:
            found.append(Shard(len(found), tuple(together)))
            together, size = [], 0
        together.append(piece)
        size += weight
    return [*found, Shard(len(found), tuple(together))]


def shard_rows(given: Iterable[Shard]) -> list[Any]:
    """Shards as JSON holds them: a list of pieces for each."""
    return [[astuple(piece) for piece in shard.pieces] for shard in given]


def shards_of(rows: Iterable[Any]) -> list[Shard]:
    """The shards that `shard_rows` was given."""
    return [Shard(number, tuple(Piece(*piece) for piece in pieces)) for number, pieces in enumerate(rows)]


def documents(
    shard: Shard, text_key: str = "text", faults: Faults | None = None, meta_key: str | None = None
) -> Iterator[Document]:
    """Each document of a shard, in order, empty ones too; a document's name is the shard's number and its place here.

    `meta_key` names what is wanted beside the text as `Document.meta`: "meta" gives the Pile's
    `{"pile_set_name": ...}`. Raises Fault on what cannot be read, unless `faults` skips it.
    """
    faults = faults or Faults("fail")
    for piece in shard.pieces:
        for document in read_piece(piece, text_key, faults, meta_key):
            yield document._replace(source=piece.name)


def batches(items: Iterable[T], size: Callable[[T], int], characters: int, documents: int) -> Iterator[list[T]]:
    """Group items in order: large enough for all cores, small enough for memory.

    A batch has at most `documents` items of `characters` in all; an item that is longer comes alone.
    """
    batch: list[T] = []
    total = 0
    for item in items:
        more = size(item)
        if batch and (total + more > characters or len(batch) == documents):
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += more
    if batch:
        yield batch

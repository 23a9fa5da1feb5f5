"""Shards of a corpus, for processes, and batches of documents, for calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Any, TypeVar

from neox.corpus.readers import Chunk, Document, ErrorPolicy, Source, read_chunk
from neox.corpus.readers.chunks import CHUNK_BYTES

T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """Consecutive chunks of the sources; the shards hold each document once."""

    number: int
    """Index among the shards, from 0."""
    chunks: tuple[Chunk, ...]

    @property
    def size(self) -> int:
        """Bytes that the progress bar counts, compressed ones as they are."""
        return sum(chunk.size for chunk in self.chunks)


def shards(sources: Sequence[Source]) -> list[Shard]:
    """Cut the sources into shards of about 64 MiB.

    Large files are cut where their format allows it, small ones put together.

    A function of the sources alone: the number of workers plays no part. For the documents of a name that a user gave:
    `documents(shard)` of each of `shards(find_sources(names))`.
    """
    result: list[Shard] = []
    together: list[Chunk] = []
    size = 0
    for chunk in (chunk for source in sources for chunk in source.chunks()):
        # A data set on the hub that does not state its size counts as large.
        weight = chunk.size if chunk.size or chunk.kind != "hub" else CHUNK_BYTES
        if together and size + weight > CHUNK_BYTES:
            result.append(Shard(len(result), tuple(together)))
            together, size = [], 0
        together.append(chunk)
        size += weight
    return [*result, Shard(len(result), tuple(together))]


def shard_rows(given: Iterable[Shard]) -> list[Any]:
    """Shards as JSON holds them: a list of chunks for each."""
    return [[astuple(chunk) for chunk in shard.chunks] for shard in given]


def shards_of(rows: Iterable[Any]) -> list[Shard]:
    """Inverse of `shard_rows`."""
    return [Shard(number, tuple(Chunk(*chunk) for chunk in chunks)) for number, chunks in enumerate(rows)]


def documents(
    shard: Shard, text_key: str = "text", policy: ErrorPolicy | None = None, meta_key: str | None = None
) -> Iterator[Document]:
    """Read each document of a shard, in order, empty ones too.

    The name of a document is the number of its shard and its number there.

    `meta_key` names the member or column beside the text that becomes `Document.meta`: "meta" gives the Pile's
    `{"pile_set_name": ...}`. Raises ReadError on a document that cannot be read, unless the policy skips
    errors.
    """
    policy = policy or ErrorPolicy("fail")
    for chunk in shard.chunks:
        for document in read_chunk(chunk, text_key, policy, meta_key):
            yield document._replace(source=chunk.name)


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

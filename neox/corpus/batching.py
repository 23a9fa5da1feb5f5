"""Groups of documents that one call takes: large enough for all cores, small enough for memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def batches(items: Iterable[T], size: Callable[[T], int], characters: int, documents: int) -> Iterator[list[T]]:
    """Items in a row, at most `documents` of them and of `characters` in all; one that is longer comes alone."""
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

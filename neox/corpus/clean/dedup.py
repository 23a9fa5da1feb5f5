"""Duplicates of earlier documents: of the same text (exact), or near-duplicates (minhash).

`write_keys` turns the documents of a shard into sorted files of keys; documents with an equal key are alike.
`find_duplicates` then walks through the keys of all shards, a range at a time, clusters matches transitively (connected
components) and keeps the first of each. Memory is about 140 MB a process, below 400 MB where documents are very short
and words ever new, and 4 bytes a document, whatever the text's size.

MinHash with banding: Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", chapter 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from neox.corpus.clean.shingles import Numbers, folded, shingles, words
from neox.corpus.shards import batches
from neox.system.files import write_whole
from neox.system.optional import optional

Method = Literal["exact", "minhash"]
SHINGLE = 5  # words
BANDS, ROWS = 14, 8
SEED = 1
PARAMETERS = [SHINGLE, BANDS, ROWS, SEED]
"""Everything that keys depend on besides the text."""
BATCH_CHARACTERS, BATCH_DOCUMENTS = 1 << 22, 4096  # hashed in one call
KEPT_KEYS = 1 << 18  # documents whose keys are sorted together and make one file
RANGE_KEYS = 1 << 21  # keys of all shards that are compared together


def likelihood(similarity: float, bands: int = BANDS, rows: int = ROWS) -> float:
    """Probability that MinHash finds two documents of this Jaccard similarity: 1 - (1 - s^r)^b.

    The similarity s is that of their sets of 5-word shingles.
    """
    return float(1 - (1 - similarity**rows) ** bands)


def exact_keys(texts: Sequence[str]) -> tuple[Numbers, npt.NDArray[np.bool_]]:
    """Keys of equal texts: uint64 [1, 2, texts], 128 bits of BLAKE2b.

    The second array says which texts have keys: all of them.
    """
    digests = b"".join(blake2b(text.encode(), digest_size=16).digest() for text in texts)
    return np.frombuffer(digests, "<u8").reshape(1, len(texts), 2).transpose(0, 2, 1), np.ones(len(texts), bool)


def minhash_keys(texts: Sequence[str]) -> tuple[Numbers, npt.NDArray[np.bool_]]:
    """MinHash keys of near-duplicates: uint64 [bands, 1, n] of the n texts with a word.

    The second array says which texts those are.

    Texts of fewer than 5 words are alike where all their words are equal, in order.
    """
    rensa = optional("rensa", "dedup=minhash", "data")
    numbers, ends = [], []
    for text in texts:
        spelled = words(text)
        numbers.append(shingles(spelled, min(SHINGLE, max(1, len(spelled)))))
        ends.append(len(numbers[-1]))
    wordy = np.array(ends, np.int64) > 0
    if not wordy.any():
        return np.empty((BANDS, 1, 0), np.uint64), wordy
    bounds = np.concatenate(([0], np.cumsum(np.array(ends)[wordy]))).astype(np.uint64)
    flat = np.concatenate(numbers)
    digests = rensa.RMinHash.digest_matrix_from_flat_token_hashes(flat, bounds, BANDS * ROWS, SEED).to_rows()
    rows = np.array(digests, np.uint64).reshape(-1, BANDS, ROWS)
    return np.stack([folded(list(rows[:, band].T)) for band in range(BANDS)])[:, None], wordy


KEYS: dict[Method, Callable[[Sequence[str]], tuple[Numbers, npt.NDArray[np.bool_]]]] = {
    "exact": exact_keys,
    "minhash": minhash_keys,
}


def write_keys(texts: Iterable[str], method: Method, stem: Path) -> tuple[int, list[Path]]:
    """Write the keys of a shard's documents as `<stem>-0.npy` and on.

    Returns the number of documents, and the files.

    Each file is uint64 [bands, columns, n]: keys, sorted by the first of them, and in the last column each document's
    number in the shard. Empty texts count but have no keys. Raises OSError naming a file that cannot be written.
    """
    files: list[Path] = []
    waiting: list[Numbers] = []
    count = 0

    def flush() -> None:
        table = np.concatenate(waiting, axis=2)
        waiting.clear()
        for band in table:
            band[:] = band[:, np.argsort(band[0], kind="stable")]
        files.append(stem.with_name(f"{stem.name}-{len(files)}.npy"))
        write_whole(files[-1], lambda file: np.save(file, table))

    for batch in batches(texts, len, BATCH_CHARACTERS, BATCH_DOCUMENTS):
        numbers = np.array([count + place for place, text in enumerate(batch) if text], np.uint64)
        keys, having = KEYS[method]([text for text in batch if text])
        column = np.broadcast_to(numbers[having], (len(keys), 1, having.sum()))
        count += len(batch)
        if column.size:
            waiting.append(np.concatenate((keys, column), axis=1))
        if sum(table.shape[2] for table in waiting) >= KEPT_KEYS:
            flush()
    if waiting:
        flush()
    return count, files


@dataclass(frozen=True)
class Duplicates:
    """Documents of one shard that repeat an earlier document."""

    numbers: npt.NDArray[np.int64]
    """Their numbers in the shard, ascending."""
    shards: npt.NDArray[np.int64]
    """Shard of the document that is kept for each: the first of its component."""
    kept: npt.NDArray[np.int64]
    """Number of that document in its shard."""


def find_duplicates(
    shards: Sequence[tuple[int, Sequence[Path]]], advance: Callable[[float], object] = lambda share: None
) -> Iterator[Duplicates]:
    """Find the duplicates in each shard, as connected components of equal keys.

    `shards` holds the results of `write_keys`, in the shards' order. The first document of a component is kept.

    `advance` is told the share of the work that each part was; the shares add up to 1.
    """
    bases = np.cumsum([0, *(count for count, _ in shards)])
    components = UnionFind(int(bases[-1]))
    tables = [
        (np.load(path, mmap_mode="r"), base) for (_, files), base in zip(shards, bases, strict=False) for path in files
    ]
    for earlier, later, share in _matching_pairs(tables):
        components.join(earlier, later)
        advance(share)
    for base, end in pairwise(bases):
        first = components.first(np.arange(base, end))
        numbers = np.flatnonzero(first != np.arange(base, end))
        homes = np.searchsorted(bases, first[numbers], side="right") - 1
        yield Duplicates(numbers, homes, first[numbers] - bases[homes])


class UnionFind:
    """Connected components of the numbers 0 to size - 1, many pairs at once.

    Memory: 4 bytes a number below four billion.
    """

    def __init__(self, size: int) -> None:
        self._parents = np.arange(size, dtype=np.uint32 if size <= 2**32 else np.int64)

    def join(self, left: npt.NDArray[np.int64], right: npt.NDArray[np.int64]) -> None:
        """Put left[i] and right[i] into one component, for each i."""
        while len(left):
            left, right = self.first(left), self.first(right)
            apart = left != right
            low, high = np.minimum(left, right)[apart], np.maximum(left, right)[apart]
            # Of several pairs with one `high`, the least `low` counts; the others are joined to it in the next round.
            np.minimum.at(self._parents, high, low.astype(self._parents.dtype))
            left, right = low, high

    def first(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Least number in the component of each."""
        found: npt.NDArray[Any] = numbers
        while ((above := self._parents[found]) != found).any():
            found = above
        self._parents[numbers] = found
        return found.astype(np.int64)


def _matching_pairs(
    tables: Sequence[tuple[Numbers, int]],
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], float]]:
    """Pairs of documents that share a key, as two arrays, and the share of the work done.

    A range of keys is read at a time, from every table: a key's documents all lie in one range.
    """
    bands = len(tables[0][0]) if tables else 0
    parts = sum(table.shape[2] for table, _ in tables) // RANGE_KEYS + 1
    limits = np.array([part * 2**64 // parts for part in range(1, parts)], np.uint64)
    for band in range(bands):
        bounds = [(0, *np.searchsorted(table[band, 0], limits), table.shape[2]) for table, _ in tables]
        for part in range(parts):
            ranges = [slice(*bound[part : part + 2]) for bound in bounds]
            keys = np.concatenate(
                [table[band, :-1, rows] for (table, _), rows in zip(tables, ranges, strict=True)], axis=1
            )
            numbers = np.concatenate(
                [
                    table[band, -1, rows].astype(np.int64) + base
                    for (table, base), rows in zip(tables, ranges, strict=True)
                ]
            )
            order = np.lexsort((numbers, *keys[::-1]))
            keys, numbers = keys[:, order], numbers[order]
            same = (keys[:, 1:] == keys[:, :-1]).all(axis=0)
            yield numbers[:-1][same], numbers[1:][same], 1 / (bands * parts)

"""Ranges of a token file's documents, and gpt-neox's split into train, valid and test."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from neox.data.token_file import TokenFile


class Documents:
    """Documents first .. last - 1 of a token file, all by default.

    `tokens`: their tokens, flat; `sizes` [len] int32; both views of the file. `name` says in messages what it is.
    """

    def __init__(self, file: TokenFile, first: int = 0, last: int | None = None) -> None:
        last = len(file) if last is None else last
        assert 0 <= first <= last <= len(file), "a range of the file's documents"
        self.file, self.first, self.last = file, first, last
        self.name = str(file.bin) + (f", documents {first} to {last - 1}," if last - first < len(file) else "")
        self.sizes: npt.NDArray[np.int32] = file.sizes[first:last]
        self._start, stop = self._token(first), self._token(last)
        self.tokens: npt.NDArray[Any] = file.tokens[self._start : stop]

    def __len__(self) -> int:
        """Documents."""
        return self.last - self.first

    def numbers(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Document number of each of tokens[start:stop], counted from 0 at tokens[start]."""
        size, base = self.file.dtype.itemsize, self._start
        # Bisection touches a few entries; numpy's searchsorted would copy the whole array, which is not aligned.
        low = bisect_right(self.file.pointers, (base + start) * size)
        high = bisect_left(self.file.pointers, (base + stop) * size, lo=low)
        begins = np.zeros(stop - start, np.int64)
        begins[self.file.pointers[low:high] // size - base - start] = 1  # an empty document begins where the next does
        return np.cumsum(begins)

    def spans(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Spans of tokens[start:stop]: (document in the file, offset in it, tokens).

        Empty documents are left out.
        """
        pointers, size = self.file.pointers, self.file.dtype.itemsize
        # Of documents that begin at one place only the last has tokens.
        document = bisect_right(pointers, (self._start + start) * size) - 1
        found = []
        while start < stop:
            offset = self._start + start - int(pointers[document]) // size
            count = min(int(self.file.sizes[document]) - offset, stop - start)
            if count > 0:
                found.append((document, offset, count))
                start += count
            document += 1
        return found

    def place(self, document: int) -> int:
        """Index in `tokens` where a document of the file begins."""
        return self._token(document) - self._start

    def _token(self, document: int) -> int:
        """First token of a document in the file; the end of the file for the one after the last."""
        if document == len(self.file):
            return len(self.file.tokens)
        return int(self.file.pointers[document]) // self.file.dtype.itemsize


def whole(prefixes: Sequence[str | Path | Documents]) -> list[Documents]:
    """Open each token file with all of its documents; ranges stay as they are."""
    return [prefix if isinstance(prefix, Documents) else Documents(TokenFile(prefix)) for prefix in prefixes]


def bounds(fractions: Sequence[float], count: int) -> tuple[int, int, int, int]:
    """Bounds of train, valid and test among `count` documents, by gpt-neox's rule.

    Each part gets its fraction of `count`, rounded half to even; the surplus or the lack of the sum is taken from the
    first part. `fractions` add up to 1. Source: EleutherAI/gpt-neox, megatron/data/data_utils.py.
    """
    ends = [0]
    for fraction in fractions:
        ends.append(ends[-1] + round(fraction * float(count)))
    surplus = ends[-1] - count
    train, valid, test = (end - surplus for end in ends[1:])
    return 0, train, valid, test


def split(
    prefixes: Sequence[str | Path], text: str, fractions: Sequence[float]
) -> tuple[list[Documents], list[Documents]]:
    """Training and validation documents of each file; none for a fraction of 0.

    Raises ValueError that cites `text`, the value of data.split, where a file has too few documents for it.
    """
    train: list[Documents] = []
    valid: list[Documents] = []
    for prefix in prefixes:
        file = TokenFile(prefix)
        start, middle, stop, _ = bounds(fractions, len(file))
        for first, last, fraction, found, kind in (
            (start, middle, 1.0, train, "training"),
            (middle, stop, fractions[1], valid, "validation"),
        ):
            if fraction and last <= first:
                raise ValueError(
                    f"{file.bin}: data.split = {text} leaves none of its {len(file)} documents for {kind}: "
                    "change data.split, or name held-out text in data.valid instead"
                )
            if fraction:
                found.append(Documents(file, first, last))
    return train, valid

"""A string in the training data: where it stands, and the steps that read it; what was read of each component."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from neox.analysis.sample_inspector import Reading
from neox.data.windows import Dataset, Piece

CHUNK = 1 << 20  # tokens whose text is in memory at once
FEW = 1 << 20  # samples that are searched one by one rather than all text
BLOCK = 1024  # samples that are traced at once
Range = tuple[int, int, int]
"""Part, first and behind the last of its tokens."""


@dataclass(frozen=True)
class Hit:
    """An occurrence of the string that was read."""

    piece: Piece  # the tokens that hold it
    places: list[tuple[int, int, int]]  # step, row, epoch: of each time that any of it was read


class Search:
    """Where `text` stands in documents, of what steps 1 to `until` read any part of.

    Raises ValueError without a byte-level tokenizer, and where there is nothing to look for.
    """

    def __init__(self, reading: Reading, text: str, until: int) -> None:
        tokenizer = reading.tokenizer
        if tokenizer is None:
            raise ValueError("find needs a tokenizer, and there is none beside the data: give tokenizer=tokenizer.json")
        self.reading, self.until, self.table = reading, until, tokenizer.bytes_of_tokens
        # As the tokenizer composes characters: so stands the text in the data.
        self.wanted = b"".join(self.table[token] for token in tokenizer.encode(text, specials=False))
        if not self.wanted:
            raise ValueError("find: nothing to look for")
        # What is read up to the middle of the string has its other end at most as many tokens away.
        self.ranges = ranges(reading.dataset, reading.samples_before(until), margin=len(self.wanted))

    @property
    def size(self) -> int:
        """Bytes of the token files to look through."""
        parts = self.reading.dataset.parts
        return sum((stop - start) * parts[part].file.dtype.itemsize for part, start, stop in self.ranges)

    def hits(self, advance: Callable[[int], object] = int) -> Iterator[Hit]:
        """In the order of the text, not of the steps. Memory does not grow with the text; `advance` gets the bytes that
        were looked through."""
        for part, start, stop in self.ranges:
            for piece in self._found(part, start, stop, advance):
                if places := self.reading.places(piece, self.until):
                    yield Hit(piece, places)

    def _found(self, number: int, start: int, stop: int, advance: Callable[[int], object]) -> Iterator[Piece]:
        """The pieces of documents that hold the string and begin among tokens start .. stop - 1 of a part."""
        part, wanted = self.reading.dataset.parts[number], self.wanted
        for first in range(start, stop, CHUNK):
            # A token is at least a byte: what begins in this chunk ends within as many more tokens.
            texts = self._texts(part.tokens[first : min(first + CHUNK + len(wanted), stop)])
            text = b"".join(texts)
            at, ends = text.find(wanted), None
            while at >= 0:
                if ends is None:
                    ends = np.cumsum([len(own) for own in texts])
                low = int(np.searchsorted(ends, at, side="right"))
                high = int(np.searchsorted(ends, at + len(wanted) - 1, side="right"))
                if low >= CHUNK:
                    break
                pieces = part.pieces(first + low, first + high + 1)
                if len(pieces) == 1:  # not over the end of a document
                    yield Piece(number, *pieces[0])
                at = text.find(wanted, at + 1)
            advance((min(first + CHUNK, stop) - first) * part.file.dtype.itemsize)

    def _texts(self, tokens: npt.NDArray[Any]) -> list[bytes]:
        table = self.table
        try:
            return [table[token] for token in tokens.tolist()]
        except IndexError:  # rows of padding that no token has
            return [table[token] if token < len(table) else b"" for token in tokens.tolist()]


def ranges(dataset: Dataset, samples: int, margin: int = 0) -> list[Range]:
    """What has to be looked through for the samples before number `samples`: what they hold and `margin` tokens around
    it where they are few, else all text."""
    whole = [(number, 0, len(part.tokens)) for number, part in enumerate(dataset.parts)]
    if samples > FEW or samples * (dataset.seq_length + 1 + 2 * margin) >= sum(stop for _, _, stop in whole):
        return whole
    read = []
    for start in range(0, samples, BLOCK):
        traced = dataset.trace(np.arange(start, min(start + BLOCK, samples)))
        for piece in (piece for pieces in traced for piece in pieces):
            first = dataset.parts[piece.part].place(piece.document) + piece.offset
            stop = min(first + piece.tokens + margin, whole[piece.part][2])
            read.append((piece.part, max(0, first - margin), stop))
    merged: list[Range] = []
    for part, start, stop in sorted(read):
        if merged and merged[-1][0] == part and start <= merged[-1][2]:
            merged[-1] = part, merged[-1][1], max(stop, merged[-1][2])
        else:
            merged.append((part, start, stop))
    return merged


@dataclass(frozen=True)
class Portion:
    """What steps 1 to N read of one component of one file."""

    file: str
    component: str | None
    tokens: int  # read, over all epochs
    whole: int  # tokens of it that there are

    @property
    def epochs(self) -> float:
        return self.tokens / self.whole if self.whole else 0.0


def portions(reading: Reading, until: int, advance: Callable[[int], object] = int) -> list[Portion]:
    """What the steps up to `until` read of each component, counted in labels: each token once a reading.

    `advance` gets the steps that were counted.
    """
    read: dict[tuple[int, str | None], int] = {}
    for step in range(until):
        for pieces in reading.dataset.trace(reading.loader.samples(step)):
            for n, piece in enumerate(pieces):
                key = piece.part, reading.sources[piece.part][piece.document].component
                # The first token of a row is no label; where samples overlap it was the last one of another.
                read[key] = read.get(key, 0) + piece.tokens - (n == 0)
        advance(1)
    found = []
    for number, part in enumerate(reading.dataset.parts):
        whole = reading.sources[number].tokens(part.sizes, part.first)
        found += [Portion(part.file.bin.stem, name, read.get((number, name), 0), whole[name]) for name in whole]
    return found

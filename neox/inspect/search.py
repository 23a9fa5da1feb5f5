"""A string in the training data: where it stands, and the steps that read it; what was read of each component."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from neox.data.dataset import Dataset, Piece
from neox.inspect.reading import Reading

CHUNK = 1 << 20  # tokens whose text is in memory at once
FEW = 1 << 20  # samples that are searched one by one rather than all text
Range = tuple[int, int, int]
"""Part, first and behind the last of its tokens."""


@dataclass(frozen=True)
class Hit:
    """An occurrence of the string that was read."""

    piece: Piece  # the tokens that hold it
    places: list[tuple[int, int, int]]  # step, row, epoch: of each time that any of it was read


def search(reading: Reading, text: str, until: int, advance: Callable[[int], object] = int) -> Iterator[Hit]:
    """Where `text` stands in documents that steps 1 to `until` read, in the order of the text, not of the steps.

    `advance` gets the bytes of the token files that were looked through. Memory does not grow with the text.
    Raises ValueError without a byte-level tokenizer, and where there is nothing to look for.
    """
    tokenizer = reading.tokenizer
    if tokenizer is None:
        raise ValueError("find needs a tokenizer, and there is none beside the data: give tokenizer=tokenizer.json")
    # As the tokenizer composes characters: so stands the text in the data.
    wanted = b"".join(tokenizer.bytes_of_tokens[token] for token in tokenizer.encode(text, specials=False))
    if not wanted:
        raise ValueError("find: nothing to look for")
    samples = reading.samples_before(until)
    for part, start, stop in ranges(reading.dataset, samples):
        for piece in _found(reading, part, start, stop, wanted, advance):
            if places := reading.places(piece, until):
                yield Hit(piece, places)


def ranges(dataset: Dataset, samples: int) -> list[Range]:
    """What has to be looked through for the samples before number `samples`: what they hold where they are few, else
    all text."""
    whole = [(number, 0, len(part.tokens)) for number, part in enumerate(dataset.parts)]
    if samples > FEW or samples * (dataset.seq_length + 1) >= sum(stop for _, _, stop in whole):
        return whole
    read = sorted(
        (piece.part, first := dataset.parts[piece.part].place(piece.document) + piece.offset, first + piece.tokens)
        for sample in range(samples)
        for piece in dataset.trace([sample])[0]
    )
    merged: list[Range] = []
    for part, start, stop in read:
        if merged and merged[-1][0] == part and start <= merged[-1][2]:
            merged[-1] = part, merged[-1][1], max(stop, merged[-1][2])
        else:
            merged.append((part, start, stop))
    return merged


def _found(
    reading: Reading, number: int, start: int, stop: int, wanted: bytes, advance: Callable[[int], object]
) -> Iterator[Piece]:
    """The pieces of documents among tokens start .. stop - 1 of a part that hold `wanted`."""
    assert reading.tokenizer is not None
    part, table = reading.dataset.parts[number], reading.tokenizer.bytes_of_tokens
    for first in range(start, stop, CHUNK):
        # A token is at least a byte: what begins in this chunk ends within as many more tokens.
        tokens = part.tokens[first : min(first + CHUNK + len(wanted), stop)]
        texts = _texts(tokens, table)
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


def _texts(tokens: npt.NDArray[Any], table: list[bytes]) -> list[bytes]:
    try:
        return [table[token] for token in tokens.tolist()]
    except IndexError:  # rows of padding that no token has
        return [table[token] if token < len(table) else b"" for token in tokens.tolist()]


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
        whole = _sizes(reading, number)
        found += [Portion(part.file.bin.stem, name, read.get((number, name), 0), whole[name]) for name in whole]
    return found


def _sizes(reading: Reading, number: int) -> dict[str | None, int]:
    """Tokens of each component of a part."""
    part, sources = reading.dataset.parts[number], reading.sources[number]
    found: dict[str | None, int] = {}
    for first, last, origin in sources.runs(part.first, part.last):
        found[origin.component] = found.get(origin.component, 0) + part.place(last) - part.place(first)
    return found

"""Search for a string in the training data and the steps that read it; tokens read of each component."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from neox.analysis.sample_inspector import SampleInspector
from neox.data.windows import Dataset, DocumentSpan

CHUNK = 1 << 20  # tokens whose text is in memory at once
FEW = 1 << 20  # up to so many samples, only their text is searched, not all of it
BLOCK = 1024  # samples that are traced at once
Range = tuple[int, int, int]
"""(token file, first token, end)."""


@dataclass(frozen=True)
class Hit:
    """Occurrence of the string in text that was read."""

    span: DocumentSpan  # the tokens that hold it
    reads: list[tuple[int, int, int]]  # (step, row, epoch) of each sample that holds any of these tokens


class Search:
    """Search for the occurrences of `text` of which steps 1 to `until` read any token.

    Raises ValueError without a byte-level tokenizer, and for an empty text.
    """

    def __init__(self, inspector: SampleInspector, text: str, until: int) -> None:
        tokenizer = inspector.tokenizer
        if tokenizer is None:
            raise ValueError("find needs a tokenizer, and there is none beside the data: give tokenizer=tokenizer.json")
        self.inspector, self.until, self.table = inspector, until, tokenizer.bytes_of_tokens
        # Encoded and decoded, because the tokenizer normalised the text of the data too.
        self.pattern = b"".join(self.table[token] for token in tokenizer.encode(text, specials=False))
        if not self.pattern:
            raise ValueError("find: nothing to look for")
        # A match cut by a sample boundary extends at most len(pattern) tokens beyond it: a token has at least a byte.
        self.ranges = ranges(inspector.dataset, inspector.samples_before(until), margin=len(self.pattern))

    @property
    def size(self) -> int:
        """Bytes of the token files to search."""
        parts = self.inspector.dataset.sources
        return sum((stop - start) * parts[part].file.dtype.itemsize for part, start, stop in self.ranges)

    def hits(self, advance: Callable[[int], object] = int) -> Iterator[Hit]:
        """Yield hits in the order of the text, not of the steps, in constant memory.

        `advance` is called with the number of bytes searched since the last call.
        """
        for part, start, stop in self.ranges:
            for span in self._matches(part, start, stop, advance):
                if reads := self.inspector.reads(span, self.until):
                    yield Hit(span, reads)

    def _matches(self, number: int, start: int, stop: int, advance: Callable[[int], object]) -> Iterator[DocumentSpan]:
        """Yield the spans that hold the string and begin among tokens start .. stop - 1 of a token file."""
        part, pattern = self.inspector.dataset.sources[number], self.pattern
        for first in range(start, stop, CHUNK):
            # A match that begins in this chunk ends at most len(pattern) tokens behind it.
            texts = self._texts(part.tokens[first : min(first + CHUNK + len(pattern), stop)])
            text = b"".join(texts)
            at, ends = text.find(pattern), None
            while at >= 0:
                if ends is None:
                    ends = np.cumsum([len(token) for token in texts])
                low = int(np.searchsorted(ends, at, side="right"))
                high = int(np.searchsorted(ends, at + len(pattern) - 1, side="right"))
                if low >= CHUNK:
                    break
                spans = part.spans(first + low, first + high + 1)
                if len(spans) == 1:  # not across the end of a document
                    yield DocumentSpan(number, *spans[0])
                at = text.find(pattern, at + 1)
            advance((min(first + CHUNK, stop) - first) * part.file.dtype.itemsize)

    def _texts(self, tokens: npt.NDArray[Any]) -> list[bytes]:
        table = self.table
        try:
            return [table[token] for token in tokens.tolist()]
        except IndexError:  # ids of padding rows
            return [table[token] if token < len(table) else b"" for token in tokens.tolist()]


def ranges(dataset: Dataset, samples: int, margin: int = 0) -> list[Range]:
    """Ranges of tokens to search for the first `samples` samples.

    For few samples, their own tokens with `margin` tokens on either side; else all tokens.
    """
    whole = [(number, 0, len(part.tokens)) for number, part in enumerate(dataset.sources)]
    if samples > FEW or samples * (dataset.seq_length + 1 + 2 * margin) >= sum(stop for _, _, stop in whole):
        return whole
    read = []
    for start in range(0, samples, BLOCK):
        traced = dataset.trace(np.arange(start, min(start + BLOCK, samples)))
        for span in (span for spans in traced for span in spans):
            first = dataset.sources[span.source].place(span.document) + span.offset
            stop = min(first + span.tokens + margin, whole[span.source][2])
            read.append((span.source, max(0, first - margin), stop))
    merged: list[Range] = []
    for part, start, stop in sorted(read):
        if merged and merged[-1][0] == part and start <= merged[-1][2]:
            merged[-1] = part, merged[-1][1], max(stop, merged[-1][2])
        else:
            merged.append((part, start, stop))
    return merged


@dataclass(frozen=True)
class ComponentTokens:
    """Tokens that steps 1 to N read of one component of one token file."""

    file: str
    component: str | None
    tokens: int  # read, over all epochs
    whole: int  # tokens that the file has of it

    @property
    def epochs(self) -> float:
        """Times that the component was read on average."""
        return self.tokens / self.whole if self.whole else 0.0


def component_tokens(
    inspector: SampleInspector, until: int, advance: Callable[[int], object] = int
) -> list[ComponentTokens]:
    """Count the tokens that steps 1 to `until` read of each component, as labels: each once per epoch.

    `advance` is called with 1 after each step.
    """
    read: dict[tuple[int, str | None], int] = {}
    for step in range(until):
        for spans in inspector.dataset.trace(inspector.loader.samples(step)):
            for n, span in enumerate(spans):
                key = span.source, inspector.sources[span.source][span.document].component
                # The first token of a row is not a label; where samples overlap it is the last label of another.
                read[key] = read.get(key, 0) + span.tokens - (n == 0)
        advance(1)
    result = []
    for number, part in enumerate(inspector.dataset.sources):
        whole = inspector.sources[number].tokens(part.sizes, part.first)
        result += [
            ComponentTokens(part.file.bin.stem, name, read.get((number, name), 0), whole[name]) for name in whole
        ]
    return result

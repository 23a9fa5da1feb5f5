"""Token files cut into windows of seq_length + 1 tokens, fetched by sample number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from neox.data.order import PermutedOrder, SequentialOrder
from neox.data.split import Documents, whole

ORDERS = ("permuted", "sequential", "preshuffled")


class DocumentSpan(NamedTuple):
    """A range of tokens of one document."""

    source: int
    """Index of the source in the dataset."""
    document: int
    """Number in the source's file."""
    offset: int
    """Its first token, counted in the document."""
    tokens: int


Seen = npt.NDArray[np.int64]
"""[n, 2]: sample numbers, rising, and the epoch of the text (0 the first) that each belongs to."""


class Dataset(Protocol):
    """Samples by number, the input of a Loader."""

    seq_length: int
    segments: bool
    """True where the documents of a sample must not attend to each other."""

    def sample(self, samples: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Tokens [n, seq_length + 1] of n sample numbers."""
        ...

    def documents(self, samples: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """For each token of `sample(samples)` the number of its document, counted from 0 in each row."""
        ...

    @property
    def sources(self) -> Sequence[Documents]:
        """Documents of each entry of data.train."""
        ...

    def owners(self, samples: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Index of the source of each of n samples, [n]."""
        ...

    def trace(self, samples: npt.ArrayLike) -> list[list[DocumentSpan]]:
        """Document spans of each of n samples, in order; seq_length + 1 tokens each."""
        ...

    def seen(self, span: DocumentSpan, samples: int) -> Seen:
        """Find the samples before number `samples` that hold any token of the span."""
        ...

    def per_epoch(self) -> list[float]:
        """Samples that read all of a source once, for each source."""
        ...


class TokenDataset:
    """Windows over one or more token files, or ranges of their documents.

    In each file window w is tokens [w*T, w*T + T] with T = seq_length: T + 1 tokens, sharing one with the next window,
    so that each token is a label once. A file has (tokens - 1) // T windows and no window crosses into another file;
    a tail shorter than T, and a file too short for one window, is left out.
    `order` is "permuted" (reshuffled each epoch, see `PermutedOrder`) or "sequential". With "preshuffled" windows share
    no token and each is a document: sample s is document s, as Pythia's data was published.
    Raises ValueError on files that are not whole, an unknown order, and when there is not one window in all.
    """

    def __init__(
        self,
        prefixes: Sequence[str | Path | Documents],
        seq_length: int,
        seed: int,
        order: str = "permuted",
        segments: bool = False,
    ) -> None:
        if isinstance(prefixes, str | Path):
            prefixes = [prefixes]
        if not prefixes:
            raise ValueError("no token files given: set data.train to at least one prefix")
        if seq_length < 1:
            raise ValueError(f"data.seq_length = {seq_length}: must be at least 1")
        if order not in ORDERS:
            raise ValueError(f'data.order = "{order}": must be one of {", ".join(ORDERS)}')
        self.sources = whole(prefixes)
        self.seq_length, self.segments = seq_length, segments
        self._stride, self.preshuffled = seq_length, order == "preshuffled"
        if self.preshuffled:
            self._stride = seq_length + 1
            for source in self.sources:
                _check_rows(source, seq_length + 1)
        # The first window takes one token more than those after it, unless none share a token.
        shared = seq_length + 1 - self._stride
        windows = [max(0, len(source.tokens) - shared) // self._stride for source in self.sources]
        self._ends = np.cumsum(windows, dtype=np.int64)
        self._starts = self._ends - windows
        self.num_windows = int(self._ends[-1])
        if not self.num_windows:
            longest = max(self.sources, key=lambda source: len(source.tokens))
            raise ValueError(
                f"{longest.name} has {len(longest.tokens)} tokens; seq_length {seq_length} needs at least "
                f"{seq_length + 1}: lower data.seq_length or add text"
            )
        self.order = PermutedOrder(self.num_windows, seed) if order == "permuted" else SequentialOrder(self.num_windows)

    def sample(self, samples: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Tokens [n, seq_length + 1] of n sample numbers, which count on over epochs without end."""
        return self.sequential(self.order(np.asarray(samples, dtype=np.int64)))

    def documents(self, samples: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """For each token of `sample(samples)` the number of its document, counted from 0 in each row."""
        windows = np.atleast_1d(self.order(np.asarray(samples, dtype=np.int64)))
        out = np.empty((len(windows), self.seq_length + 1), dtype=np.int64)
        for row, (source, at) in enumerate(self._places(windows)):
            out[row] = source.numbers(at, at + self.seq_length + 1)
        return out

    def sequential(self, windows: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Tokens [n, seq_length + 1] of n window numbers, whatever the order.

        Each is in 0 .. num_windows - 1.
        """
        numbers = np.atleast_1d(np.asarray(windows, dtype=np.int64))
        if numbers.size and not (numbers.min() >= 0 and numbers.max() < self.num_windows):
            raise IndexError(f"windows are 0 to {self.num_windows - 1}; asked for {numbers.min()} to {numbers.max()}")
        out = np.empty((len(numbers), self.seq_length + 1), dtype=np.int64)
        for row, (source, at) in enumerate(self._places(numbers)):
            out[row] = source.tokens[at : at + self.seq_length + 1]
        return out

    def owners(self, samples: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Index of the source of each of n samples, [n]."""
        if len(self.sources) == 1:
            return np.zeros(np.size(samples), np.int64)
        windows = np.atleast_1d(self.order(np.asarray(samples, dtype=np.int64)))
        return np.searchsorted(self._ends, windows, side="right").astype(np.int64)

    def trace(self, samples: npt.ArrayLike) -> list[list[DocumentSpan]]:
        """Document spans of each of n samples, in order."""
        windows = np.atleast_1d(self.order(np.asarray(samples, dtype=np.int64)))
        owners = np.searchsorted(self._ends, windows, side="right")
        return [
            [DocumentSpan(int(owner), *span) for span in source.spans(at, at + self.seq_length + 1)]
            for owner, (source, at) in zip(owners, self._places(windows), strict=True)
        ]

    def seen(self, span: DocumentSpan, samples: int) -> Seen:
        """Find the samples before number `samples` that hold any token of the span."""
        first = self.sources[span.source].place(span.document) + span.offset
        low = max(0, -(-(first - self.seq_length) // self._stride)) + int(self._starts[span.source])
        high = (first + span.tokens - 1) // self._stride + 1 + int(self._starts[span.source])
        windows = np.arange(low, min(high, int(self._ends[span.source])))
        found = [np.empty((0, 2), np.int64)]
        for epoch in range(-(-samples // self.num_windows) if span.tokens else 0):
            numbers = np.sort(self.order.inverse(windows, epoch))
            numbers = numbers[numbers < samples]
            found.append(np.stack((numbers, np.full_like(numbers, epoch)), axis=1))
        return np.concatenate(found)

    def per_epoch(self) -> list[float]:
        """Samples that read all of a source once, for each source."""
        return (self._ends - self._starts).astype(float).tolist()

    def _places(self, windows: npt.NDArray[np.int64]) -> Iterator[tuple[Documents, int]]:
        """Documents and first token of each window."""
        owners = np.searchsorted(self._ends, windows, side="right")
        for number, owner in zip(windows.tolist(), owners.tolist(), strict=True):
            yield self.sources[owner], (number - int(self._starts[owner])) * self._stride


def _check_rows(source: Documents, length: int) -> None:
    """Check that the documents are rows of that many tokens. Raises ValueError."""
    wrong = np.flatnonzero(source.sizes != length)
    if wrong.size:
        raise ValueError(
            f"{source.name}: document {source.first + int(wrong[0])} has {source.sizes[wrong[0]]} tokens; data.order = "
            f'"preshuffled" reads documents of data.seq_length + 1 = {length}: set data.seq_length, or another order'
        )

"""gpt-neox's order of samples, bit for bit: its packed GPT2Dataset.

All epochs' documents are shuffled together into one stream of tokens; sample k of it is tokens [k*T, k*T + T] with
T = seq_length, and the samples are shuffled once more. Both shuffles draw from one RandomState(seed), the documents
first. How many epochs there are follows from the number of samples asked for, so the whole order depends on it.
Source: EleutherAI/gpt-neox, megatron/data/gpt2_dataset.py and helpers.cpp, as of v1.0 and since.

Memory: 4 bytes a document and epoch, 4 bytes a sample, 8 bytes every GROUP documents; while it is built another 4 bytes
a document. gpt-neox's third array, where each sample begins (8 bytes a sample), is not stored: it follows from the
sizes of a group of documents.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from neox.data.arrays import Arrays, cached_arrays, content_key
from neox.data.split import Documents
from neox.data.windows import DocumentSpan, Seen

GROUP = 64
"""Documents whose sizes are added up to find where a sample begins."""
BLOCK = GROUP << 14  # documents whose sizes are held in int64 at once while building
ARRAYS = ("doc_idx", "shuffle_idx", "before")
SMALL = 1_000_000  # documents and samples whose shuffle takes less than reading a file
SHOWN = 10_000_000  # documents and samples whose shuffle takes seconds
Numbers = npt.NDArray[np.int64]


class MegatronDataset:
    """Samples of one token file, or of a range of its documents, in gpt-neox's order.

    `doc_idx` int32 [epochs * documents]: the documents of all epochs, shuffled. `shuffle_idx` uint32 (int64 where that
    is too small) [n]: the samples of that stream, shuffled. There are n = (epochs * tokens - 1) // seq_length of them,
    with the fewest epochs that give num_samples. `len` is n - 1, as in gpt-neox, whose loader never asks for the last;
    here it can be asked for, and from n on sample s is sample s % (n - 1), which is gpt-neox's fallback.
    Samples cross the ends of documents; empty documents add nothing.
    With a folder `cache` the arrays are kept there, under a hash of the documents' sizes and of all else that they
    depend on: built once, and mapped by every process of a host instead of held by each.
    Raises ValueError for fewer than 2 tokens, a seed that numpy's RandomState does not take, and an order of 2**31
    documents or more, which gpt-neox's int32 cannot number.
    """

    def __init__(
        self,
        documents: Documents,
        seq_length: int,
        seed: int,
        num_samples: int,
        segments: bool = False,
        progress: bool = False,
        cache: Path | None = None,
    ) -> None:
        assert num_samples >= 1, "an order is made for at least one sample"
        if seq_length < 1:
            raise ValueError(f"data.seq_length = {seq_length}: must be at least 1")
        if not 0 <= seed < 2**32:
            raise ValueError(f'train.seed = {seed}: data.order = "megatron" takes 0 to 2**32 - 1')
        tokens = len(documents.tokens)
        if tokens < 2:
            raise ValueError(f"{documents.name} has {tokens} tokens; a sample needs at least 2: add text")
        self.source, self.sources = documents, [documents]
        self.seq_length, self.segments = seq_length, segments
        self.epochs = -(-(num_samples * seq_length + 1) // tokens)
        if self.epochs * len(documents) >= 2**31:
            raise ValueError(
                f"{documents.name} has {tokens} tokens; {num_samples} samples of {seq_length} would repeat its "
                f"{len(documents)} documents {self.epochs} times, 2**31 or more in all: add text or ask for fewer"
            )
        self.count = (self.epochs * tokens - 1) // seq_length
        self.seed, self.num_samples, self.progress = seed, num_samples, progress
        if cache and self.epochs * len(documents) + self.count > SMALL:
            depends_on = {
                "version": 1,
                "documents": [documents.first, documents.last],
                "epochs": self.epochs,
                "samples": self.count,
                "seed": seed,
            }
            arrays = cached_arrays(cache, content_key(depends_on, documents.sizes), ARRAYS, self._build)
        else:
            arrays = self._build()
        self.doc_idx, self.shuffle_idx, self._before = (arrays[name] for name in ARRAYS)

    def _build(self) -> Arrays:
        documents, total = self.source, self.epochs * len(self.source)
        if self.progress and total + self.count > SHOWN:
            print(
                f"{documents.name}: shuffling {total:,} documents and {self.count:,} samples",
                file=sys.stderr,
                flush=True,
            )
        rng = np.random.RandomState(self.seed)
        doc_idx = np.tile(np.arange(documents.first, documents.last, dtype=np.int32), self.epochs)
        rng.shuffle(doc_idx)
        shuffle_idx = np.arange(self.count, dtype=np.uint32 if self.count < 2**32 - 2 else np.int64)
        rng.shuffle(shuffle_idx)
        return {"doc_idx": doc_idx, "shuffle_idx": shuffle_idx, "before": self._tokens_before_groups(doc_idx)}

    def __len__(self) -> int:
        """Samples that gpt-neox's dataset counts: one fewer than there are."""
        return len(self.shuffle_idx) - 1

    def sample(self, samples: npt.ArrayLike) -> Numbers:
        """Tokens [n, seq_length + 1] of n sample numbers."""
        return self._rows(samples, numbers=False)

    def documents(self, samples: npt.ArrayLike) -> Numbers:
        """For each token of `sample(samples)` the number of its document, counted from 0 in each row."""
        return self._rows(samples, numbers=True)

    def sample_idx(self, numbers: npt.ArrayLike) -> Numbers:
        """Rows of gpt-neox's sample_idx: places in doc_idx and offsets where samples begin, [n, 2].

        `numbers` (0 .. count) are those of the stream, before the second shuffle.
        """
        first = np.asarray(numbers, dtype=np.int64) * self.seq_length
        groups = np.searchsorted(self._before, first, side="right") - 1
        places = groups[:, None] * GROUP + np.arange(GROUP)
        sizes = self._sizes(self.doc_idx[np.minimum(places, len(self.doc_idx) - 1)])
        ends = self._before[groups][:, None] + np.cumsum(sizes, axis=1)
        # The first document that ends behind the token; gpt-neox starts sample 0 at document 0 even if that is empty.
        inside = np.where(first > 0, (ends <= first[:, None]).sum(axis=1), 0)
        rows = np.arange(len(first))
        offsets = np.where(first > 0, first - ends[rows, inside] + sizes[rows, inside], 0)
        return np.stack((np.where(first > 0, groups * GROUP + inside, 0), offsets), axis=1)

    def whole_sample_idx(self) -> Iterator[Numbers]:
        """Yield gpt-neox's sample_idx [count + 1, 2], some rows at a time.

        Takes one pass over the documents.
        """
        yield np.zeros((1, 2), np.int64)
        place = tokens = 0
        for sizes in self._sizes_along(self.doc_idx):
            ends = tokens + np.cumsum(sizes)
            # The samples that begin in these documents, but for the first one, which was told.
            numbers = np.arange(max(1, -(-tokens // self.seq_length)), -(-int(ends[-1]) // self.seq_length))
            begins = numbers[numbers <= self.count] * self.seq_length
            inside = np.searchsorted(ends, begins, side="right")
            yield np.stack((place + inside, begins - (ends - sizes)[inside]), axis=1)
            place, tokens = place + len(sizes), int(ends[-1])

    def owners(self, samples: npt.ArrayLike) -> Numbers:
        """Index of the source of each of n samples, [n]: always 0."""
        return np.zeros(np.atleast_1d(np.asarray(samples)).shape, np.int64)

    def trace(self, samples: npt.ArrayLike) -> list[list[DocumentSpan]]:
        """Document spans of each of n samples, in order."""
        return [
            [DocumentSpan(0, document, offset, len(tokens)) for document, offset, tokens in self._spans(place, offset)]
            for place, offset in self._begins(samples)
        ]

    def seen(self, span: DocumentSpan, samples: int) -> Seen:
        """Find the samples before number `samples` that hold any token of the span.

        Epochs are shuffled into one stream, so what is told of each is which copy of the document it belongs to, in
        the order in which the samples come to them.
        """
        count, copies = len(self.shuffle_idx), []
        for place in np.flatnonzero(self.doc_idx == span.document).tolist() if span.tokens else []:
            group = place // GROUP
            first = int(self._before[group] + self._sizes(self.doc_idx[group * GROUP : place]).sum()) + span.offset
            low = max(0, -(-(first - self.seq_length) // self.seq_length))
            high = min((first + span.tokens - 1) // self.seq_length + 1, count)
            numbers = self._shuffled[low:high].astype(np.int64)
            # From `count` on the order repeats itself, without its last sample.
            again = np.arange(count - 1, max(count, samples), max(1, count - 1))
            more = (numbers[numbers < max(1, count - 1)] + again[:, None]).ravel()
            numbers = np.concatenate((numbers, more[more >= count]))
            copies.append(np.sort(numbers[numbers < samples]))
        copies = sorted((numbers for numbers in copies if len(numbers)), key=lambda numbers: int(numbers[0]))
        found = [np.stack((numbers, np.full_like(numbers, copy)), axis=1) for copy, numbers in enumerate(copies)]
        rows = np.concatenate([np.empty((0, 2), np.int64), *found])
        return rows[np.argsort(rows[:, 0], kind="stable")]

    def per_epoch(self) -> list[float]:
        """Samples that read all of a source once, for each source."""
        return [len(self.source.tokens) / self.seq_length]

    @cached_property
    def _shuffled(self) -> npt.NDArray[Any]:
        """Inverse of the second shuffle, as large as it: for `seen` alone."""
        inverse = np.empty_like(self.shuffle_idx)
        inverse[self.shuffle_idx] = np.arange(len(inverse), dtype=inverse.dtype)
        return inverse

    def _begins(self, samples: npt.ArrayLike) -> list[list[int]]:
        """First document (its place in doc_idx) and offset of each sample."""
        wanted = np.atleast_1d(np.asarray(samples, dtype=np.int64))
        assert not wanted.size or wanted.min() >= 0, "sample numbers start at 0"
        count = len(self.shuffle_idx)
        wanted = np.where(wanted < count, wanted, wanted % max(1, count - 1))
        begins: list[list[int]] = self.sample_idx(self.shuffle_idx[wanted]).tolist()
        return begins

    def _rows(self, samples: npt.ArrayLike, numbers: bool) -> Numbers:
        begins = self._begins(samples)
        out = np.empty((len(begins), self.seq_length + 1), dtype=np.int64)
        for row, (place, offset) in zip(out, begins, strict=True):
            at = 0
            for number, (_, _, span) in enumerate(self._spans(place, offset)):
                row[at : at + len(span)] = number if numbers else span
                at += len(span)
        return out

    def _spans(self, place: int, offset: int) -> Iterator[tuple[int, int, npt.NDArray[Any]]]:
        """Yield the seq_length + 1 tokens that begin there, document by document.

        Empty documents are left out.
        """
        left = self.seq_length + 1
        while left:
            document = int(self.doc_idx[place])
            span = self.source.file.document(document)[offset : offset + left]
            if len(span):
                yield document, offset, span
            left -= len(span)
            place, offset = place + 1, 0

    def _sizes(self, documents: npt.NDArray[np.int32]) -> Numbers:
        return self.source.file.sizes[documents].astype(np.int64)

    def _tokens_before_groups(self, doc_idx: npt.NDArray[np.int32]) -> Numbers:
        """Tokens of the stream before each group of documents, [groups]."""
        sums = [np.add.reduceat(sizes, np.arange(0, len(sizes), GROUP)) for sizes in self._sizes_along(doc_idx)]
        groups = np.concatenate(sums)
        return np.cumsum(groups) - groups

    def _sizes_along(self, doc_idx: npt.NDArray[np.int32]) -> Iterator[Numbers]:
        """Sizes of the stream's documents, BLOCK of them at a time."""
        sizes = np.array(self.source.sizes)  # in the file they are not aligned, which makes a gather four times slower
        for first in range(0, len(doc_idx), BLOCK):
            yield sizes.take(doc_idx[first : first + BLOCK] - self.source.first).astype(np.int64)

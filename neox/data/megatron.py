"""gpt-neox's order of samples, bit for bit: its packed GPT2Dataset without index files on the disk.

All epochs' documents are shuffled together into one stream of tokens; sample k of it is tokens [k*T, k*T + T] with
T = seq_length, and the samples are shuffled once more. Both shuffles draw from one RandomState(seed), the documents
first. How many epochs there are follows from the number of samples asked for, so the whole order depends on it.
Source: EleutherAI/gpt-neox, megatron/data/gpt2_dataset.py and helpers.cpp, as of v1.0 and since.

Memory: 4 bytes a document and epoch, 4 bytes a sample, and 8 bytes every GROUP documents. gpt-neox's third array, where
each sample begins (8 bytes a sample), is not stored: it follows from the sizes of a group of documents.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from neox.data.split import Documents

GROUP = 64
"""Documents whose sizes are added up to find where a sample begins."""
BLOCK = GROUP << 14  # documents whose sizes are held in int64 at once while building
SHOWN = 10_000_000  # documents and samples whose shuffle takes seconds
Numbers = npt.NDArray[np.int64]


class MegatronDataset:
    """Samples of one token file, or of a range of its documents, in gpt-neox's order.

    `doc_idx` int32 [epochs * documents]: the documents of all epochs, shuffled. `shuffle_idx` uint32 (int64 where that
    is too small) [n]: the samples of that stream, shuffled. There are n = (epochs * tokens - 1) // seq_length of them,
    with the fewest epochs that give num_samples. `len` is n - 1, as in gpt-neox, whose loader never asks for the last;
    here it can be asked for, and from n on sample s is sample s % (n - 1), which is gpt-neox's fallback.
    Samples cross the ends of documents; empty documents add nothing.
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
    ) -> None:
        assert num_samples >= 1, "an order is made for at least one sample"
        if seq_length < 1:
            raise ValueError(f"data.seq_length = {seq_length}: must be at least 1")
        if not 0 <= seed < 2**32:
            raise ValueError(f'train.seed = {seed}: data.order = "megatron" takes 0 to 2**32 - 1')
        tokens = len(documents.tokens)
        if tokens < 2:
            raise ValueError(f"{documents.name} has {tokens} tokens; a sample needs at least 2: add text")
        self.part, self.seq_length, self.segments = documents, seq_length, segments
        self.epochs = -(-(num_samples * seq_length + 1) // tokens)
        if self.epochs * len(documents) >= 2**31:
            raise ValueError(
                f"{documents.name} has {tokens} tokens; {num_samples} samples of {seq_length} would repeat its "
                f"{len(documents)} documents {self.epochs} times, 2**31 or more in all: add text or ask for fewer"
            )
        count = (self.epochs * tokens - 1) // seq_length
        if progress and self.epochs * len(documents) + count > SHOWN:
            print(
                f"{documents.name}: shuffling {self.epochs * len(documents):,} documents and {count:,} samples",
                file=sys.stderr,
                flush=True,
            )
        rng = np.random.RandomState(seed)
        self.doc_idx = np.tile(np.arange(documents.first, documents.last, dtype=np.int32), self.epochs)
        rng.shuffle(self.doc_idx)
        self.shuffle_idx: npt.NDArray[Any] = np.arange(count, dtype=np.uint32 if count < 2**32 - 2 else np.int64)
        rng.shuffle(self.shuffle_idx)
        self._before = self._tokens_before_groups()

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
        """Rows of gpt-neox's sample_idx [n, 2]: the place in doc_idx and the offset in that document where samples
        begin, by their numbers 0 .. count in the stream, before the second shuffle."""
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

    def _rows(self, samples: npt.ArrayLike, numbers: bool) -> Numbers:
        wanted = np.atleast_1d(np.asarray(samples, dtype=np.int64))
        assert not wanted.size or wanted.min() >= 0, "sample numbers start at 0"
        count = len(self.shuffle_idx)
        wanted = np.where(wanted < count, wanted, wanted % max(1, count - 1))
        out = np.empty((len(wanted), self.seq_length + 1), dtype=np.int64)
        begins = self.sample_idx(self.shuffle_idx[wanted])
        for row, (place, offset) in zip(out, begins.tolist(), strict=True):
            at = 0
            for number, piece in enumerate(self._pieces(place, offset)):
                row[at : at + len(piece)] = number if numbers else piece
                at += len(piece)
        return out

    def _pieces(self, place: int, offset: int) -> Iterator[npt.NDArray[Any]]:
        """The seq_length + 1 tokens that begin there, document by document, without the empty ones."""
        left = self.seq_length + 1
        while left:
            piece = self.part.file.document(int(self.doc_idx[place]))[offset : offset + left]
            if len(piece):
                yield piece
            left -= len(piece)
            place, offset = place + 1, 0

    def _sizes(self, documents: npt.NDArray[np.int32]) -> Numbers:
        return self.part.file.sizes[documents].astype(np.int64)

    def _tokens_before_groups(self) -> Numbers:
        """Tokens of the stream before each group of documents, [groups]."""
        sums = []
        for first in range(0, len(self.doc_idx), BLOCK):
            sizes = self._sizes(self.doc_idx[first : first + BLOCK])
            sums.append(np.add.reduceat(sizes, np.arange(0, len(sizes), GROUP)))
        groups = np.concatenate(sums)
        return np.cumsum(groups) - groups

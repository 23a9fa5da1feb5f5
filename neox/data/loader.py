"""Batches by step number: step t is samples [t*B, (t+1)*B), however they are cut into microbatches.

Ranges of samples may be stepped over; step t is then the t-th batch of those that are left.

Shapes: B sequences, T tokens a sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from neox.data.windows import Dataset
from neox.model import IGNORED


@dataclass(frozen=True)
class Batch:
    """Sequences to learn from; the label of a position is the token that follows it.

    With segments, positions count from 0 in each document (in the row: one that began before it starts at 0 too), and
    the label of a document's last token is IGNORED. Its end-of-document token is learned like any other.
    """

    tokens: torch.Tensor  # [B, T] int64
    labels: torch.Tensor  # [B, T] int64, IGNORED where masked
    positions: torch.Tensor  # [B, T] int64
    segments: torch.Tensor | None = None  # [B, T] int64 where attention must not cross documents
    first: int = 0  # number of the first sequence, counted over the run

    def to(self, device: torch.device) -> Batch:
        """Move the batch to `device`.

        CUDA copies it from pinned memory: the host goes on, and no kernel waits for it.
        """
        cuda = device.type == "cuda"

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            return (tensor.pin_memory() if cuda else tensor).to(device, non_blocking=cuda)

        return replace(
            self,
            tokens=moved(self.tokens),
            labels=moved(self.labels),
            positions=moved(self.positions),
            segments=None if self.segments is None else moved(self.segments),
        )

    def filled(self, rows: int) -> Batch:
        """Append `rows` rows without loss, each one document of token 0."""
        T = self.tokens.shape[1]
        zeros = self.tokens.new_zeros(rows, T)
        return replace(
            self,
            tokens=torch.cat((self.tokens, zeros)),
            labels=torch.cat((self.labels, torch.full_like(zeros, IGNORED))),
            positions=torch.cat((self.positions, torch.arange(T, device=zeros.device).repeat(rows, 1))),
            segments=None if self.segments is None else torch.cat((self.segments, zeros)),
        )


Range = tuple[int, int]
"""[first, last): sample numbers."""


class Loader:
    """Batches of `global_batch_size` sequences, by step number; it holds no state."""

    def __init__(self, dataset: Dataset, global_batch_size: int, stepped_over: Iterable[Range] = ()) -> None:
        if global_batch_size < 1:
            raise ValueError(f"train.global_batch_size = {global_batch_size}: must be at least 1")
        self.dataset = dataset
        self.global_batch_size = global_batch_size
        self.stepped_over = _merged(stepped_over)

    def step_over(self, first_step: int, last_step: int) -> Loader:
        """Make a loader that skips the samples of the steps first_step to last_step - 1.

        Earlier steps keep their samples.
        """
        assert first_step < last_step, "no step at all"
        more = int(self.samples(first_step)[0]), int(self.samples(last_step - 1)[-1]) + 1
        return Loader(self.dataset, self.global_batch_size, [*self.stepped_over, more])

    def position(self, step: int) -> int:
        """Samples read or stepped over before step `step`."""
        return int(self.samples(step)[0])

    def batch(self, step: int) -> Batch:
        """All sequences of step `step`, which counts from 0."""
        return self._rows(self.samples(step))

    def microbatches(self, step: int, micro_batch_size: int, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
        """Yield this rank's sequences of a step, in order, `micro_batch_size` at a time.

        Rank r has the r-th block of ceil(global_batch_size / ranks). All yield as many microbatches, of the same
        shapes, since their collectives must meet: where the sequences end early, rows are filler, whose labels are all
        IGNORED.
        """
        if micro_batch_size < 1:
            raise ValueError(f"train.micro_batch_size = {micro_batch_size}: must be at least 1")
        assert 0 <= rank < ranks, "ranks count from 0"
        share = -(-self.global_batch_size // ranks)
        own = self.samples(step)[rank * share : (rank + 1) * share]
        for start in range(0, share, micro_batch_size):
            part = own[start : start + micro_batch_size]
            yield self._rows(part, filler=min(micro_batch_size, share - start) - len(part))

    def samples(self, step: int) -> npt.NDArray[np.int64]:
        """Sample numbers of a step: the one place that maps steps to samples."""
        assert step >= 0, "steps count from 0"
        numbers = np.arange(step * self.global_batch_size, (step + 1) * self.global_batch_size)
        for first, last in self.stepped_over:  # in this order
            numbers = np.where(numbers < first, numbers, numbers + (last - first))
        return numbers

    def steps(self, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Step and row of each of these samples [n]: [n, 2]; step -1 if it is skipped."""
        out, over = samples.copy(), np.zeros(len(samples), bool)
        for first, last in self.stepped_over:
            over |= (samples >= first) & (samples < last)
            out -= np.where(samples >= last, last - first, 0)
        steps, rows = np.divmod(out, self.global_batch_size)
        return np.stack((np.where(over, -1, steps), rows), axis=1)

    def _rows(self, samples: npt.NDArray[np.int64], filler: int = 0) -> Batch:
        rows = torch.from_numpy(self.dataset.sample(samples))
        # A copy even of one row, whose slices are contiguous as they are: writing to labels must not change tokens.
        tokens, labels = rows[:, :-1].contiguous(), rows[:, 1:].clone(memory_format=torch.contiguous_format)
        positions = torch.arange(self.dataset.seq_length).repeat(len(rows), 1)
        segments = None
        if self.dataset.segments:
            documents = torch.from_numpy(self.dataset.documents(samples))
            segments = documents[:, :-1].contiguous()
            # The last token of a document has no label: the next token belongs to another document.
            labels[documents[:, 1:] != segments] = IGNORED
            begins = F.pad(segments.diff(dim=1) != 0, (1, 0), value=True)
            positions = positions - torch.where(begins, positions, 0).cummax(dim=1).values
        batch = Batch(tokens, labels, positions, segments, first=int(samples[0]) if len(samples) else 0)
        return batch.filled(filler) if filler else batch


def _merged(ranges: Iterable[Range]) -> list[Range]:
    """Merge ranges that overlap or touch; sorted."""
    merged: list[Range] = []
    for first, last in sorted(ranges):
        if merged and first <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(last, merged[-1][1])
        else:
            merged.append((first, last))
    return merged

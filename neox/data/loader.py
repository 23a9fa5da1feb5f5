"""Batches by step number: step t is samples [t*B, (t+1)*B), however they are cut into microbatches.

Where the batch size B changes over the run, samples count on: a step begins where the one before it ends.

Ranges of samples may be stepped over; step t is then the t-th batch of those that are left.

Shapes: B sequences, T tokens a sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from neox.config import TrainConfig
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


Sizes = Sequence[Sequence[int]]
"""[(first step, sequences of each step from it on)], the first from step 0 on."""


def batch_sizes(config: TrainConfig, past: Sizes = (), step: int = 0) -> list[tuple[int, int]]:
    """Sizes of a run's batches by its config; those of `past` count before step `step`.

    Raises ValueError where the steps of `train.batch_warmup` do not ascend.
    """
    ends = [0, *(end for _, end in config.batch_warmup)]
    if ends != sorted(set(ends)):
        raise ValueError("train.batch_warmup: its steps must ascend, as in [[256, 1000], [512, 2000]]")
    asked = list(zip(ends, [*(size for size, _ in config.batch_warmup), config.global_batch_size], strict=True))
    now = [size for first, size in asked if first <= step][-1]
    sizes = [(int(first), int(size)) for first, size in past if first < step]
    if not sizes or sizes[-1][1] != now:
        sizes.append((step, now))
    return [*sizes, *((first, size) for first, size in asked if first > step)]


class Loader:
    """Batches of sequences, by step number; it holds no state."""

    def __init__(self, dataset: Dataset, sizes: int | Sizes, stepped_over: Iterable[Range] = ()) -> None:
        """`sizes`: sequences of every step, or those from each of several steps on."""
        self.sizes = [(0, sizes)] if isinstance(sizes, int) else [(int(first), int(size)) for first, size in sizes]
        if (least := min(size for _, size in self.sizes)) < 1:
            raise ValueError(f"train.global_batch_size = {least}: must be at least 1")
        self.dataset = dataset
        self._firsts = np.array([first for first, _ in self.sizes], np.int64)
        self._sizes = np.array([size for _, size in self.sizes], np.int64)
        read = np.diff(self._firsts) * self._sizes[:-1]
        self._read = np.concatenate(([0], np.cumsum(read)))  # sequences before each of them
        self.stepped_over = _merged(stepped_over)

    def size(self, step: int) -> int:
        """Sequences of step `step`."""
        return int(self._sizes[np.searchsorted(self._firsts, step, side="right") - 1])

    def read(self, step: int) -> int:
        """Sequences read before step `step`; those that are stepped over do not count."""
        phase = np.searchsorted(self._firsts, step, side="right") - 1
        return int(self._read[phase] + (step - self._firsts[phase]) * self._sizes[phase])

    def step_over(self, first_step: int, last_step: int) -> Loader:
        """Make a loader that skips the samples of the steps first_step to last_step - 1.

        Earlier steps keep their samples.
        """
        assert first_step < last_step, "no step at all"
        more = int(self.samples(first_step)[0]), int(self.samples(last_step - 1)[-1]) + 1
        return Loader(self.dataset, self.sizes, [*self.stepped_over, more])

    def position(self, step: int) -> int:
        """Samples read or stepped over before step `step`."""
        return int(self.samples(step)[0])

    def batch(self, step: int) -> Batch:
        """All sequences of step `step`, which counts from 0."""
        return self._rows(self.samples(step))

    def microbatches(self, step: int, micro_batch_size: int, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
        """Yield this rank's sequences of a step, in order, `micro_batch_size` at a time.

        Rank r has the r-th block of ceil(B / ranks). All yield as many microbatches, of the same
        shapes, since their collectives must meet: where the sequences end early, rows are filler, whose labels are all
        IGNORED.
        """
        if micro_batch_size < 1:
            raise ValueError(f"train.micro_batch_size = {micro_batch_size}: must be at least 1")
        assert 0 <= rank < ranks, "ranks count from 0"
        share = -(-self.size(step) // ranks)
        own = self.samples(step)[rank * share : (rank + 1) * share]
        for start in range(0, share, micro_batch_size):
            part = own[start : start + micro_batch_size]
            yield self._rows(part, filler=min(micro_batch_size, share - start) - len(part))

    def samples(self, step: int) -> npt.NDArray[np.int64]:
        """Sample numbers of a step: the one place that maps steps to samples."""
        assert step >= 0, "steps count from 0"
        numbers = np.arange(self.read(step), self.read(step + 1))
        for first, last in self.stepped_over:  # in this order
            numbers = np.where(numbers < first, numbers, numbers + (last - first))
        return numbers

    def steps(self, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Step and row of each of these samples [n]: [n, 2]; step -1 if it is skipped."""
        out, over = samples.copy(), np.zeros(len(samples), bool)
        for first, last in self.stepped_over:
            over |= (samples >= first) & (samples < last)
            out -= np.where(samples >= last, last - first, 0)
        phases = np.searchsorted(self._read, out, side="right") - 1
        steps, rows = np.divmod(out - self._read[phases], self._sizes[phases])
        return np.stack((np.where(over, -1, steps + self._firsts[phases]), rows), axis=1)

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

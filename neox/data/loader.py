"""Batches by step number: step t is samples [t*B, (t+1)*B), however they are cut into microbatches.

Shapes: B sequences, T tokens a sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from neox.data.dataset import TokenDataset

IGNORED = -100
"""The label of a position that takes no part in the loss (torch's cross_entropy leaves it out by default)."""


@dataclass(frozen=True)
class Batch:
    """Sequences to learn from; the label of a position is the token that follows it."""

    tokens: torch.Tensor  # [B, T] int64
    labels: torch.Tensor  # [B, T] int64, IGNORED where masked
    positions: torch.Tensor  # [B, T] int64
    segments: torch.Tensor | None = None  # [B, T] int64 where attention must not cross documents
    first: int = 0  # number of the first sequence, counted over the run


class Loader:
    """Batches of `global_batch_size` sequences; it holds no state: where a run stands is its step number."""

    def __init__(self, dataset: TokenDataset, global_batch_size: int) -> None:
        if global_batch_size < 1:
            raise ValueError(f"train.global_batch_size = {global_batch_size}: must be at least 1")
        self.dataset = dataset
        self.global_batch_size = global_batch_size

    def batch(self, step: int) -> Batch:
        """All sequences of step `step`, which counts from 0."""
        return self._samples(step, 0, self.global_batch_size)

    def microbatches(self, step: int, micro_batch_size: int, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
        """The sequences of step `step` in order, at most `micro_batch_size` at a time; the last may hold fewer."""
        if micro_batch_size < 1:
            raise ValueError(f"train.micro_batch_size = {micro_batch_size}: must be at least 1")
        share = -(-self.global_batch_size // ranks)
        first, last = rank * share, min((rank + 1) * share, self.global_batch_size)
        for start in range(first, first + share, micro_batch_size):
            batch = self._samples(
                step,
                min(start, self.global_batch_size - 1),
                max(start + 1, min(start + micro_batch_size, last)) if start < last else self.global_batch_size,
            )
            if start >= last:
                batch.labels.fill_(IGNORED)
            yield batch

    def _samples(self, step: int, start: int, stop: int) -> Batch:
        assert step >= 0, "steps count from 0"
        first, last = step * self.global_batch_size + start, step * self.global_batch_size + stop
        rows = torch.from_numpy(self.dataset.sample(np.arange(first, last)))
        positions = torch.arange(self.dataset.seq_length).repeat(len(rows), 1)
        return Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), positions, first=first)

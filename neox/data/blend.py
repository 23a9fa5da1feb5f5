"""Several datasets blended by weight: gpt-neox's rule, bit for bit, for as many samples as are asked for.

Sample i comes from the dataset d that is furthest behind its share: the largest weight_d * max(i, 1) - count_d in
float64, the first of equals, where count_d is what it has given so far; it gives its sample number count_d.
Source: EleutherAI/gpt-neox, megatron/data/blendable_dataset.py and helpers.cpp.

The rule goes sample by sample. Here many segments of samples advance side by side, each from counts that are guessed;
a segment is right when its counts are those that the one before it ended with, and is computed again from these until
all are. The rule forgets a wrong guess quickly, so that twice is nearly always enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import track

from neox.data.dataset import Dataset

SEGMENT = 1024  # samples
SIDE_BY_SIDE = 1024  # segments, at most
SHOWN = 20  # rounds of that many segments: seconds
MARGIN = 1.005  # more than its share that each dataset is made for, so that a blend does not run out of one
Numbers = npt.NDArray[np.int64]
Counts = npt.NDArray[np.float64]  # whole numbers


def shares(weights: Sequence[float], num_samples: int) -> list[int]:
    """Samples that each dataset of a megatron blend is made for: its share and half a percent, rounded up."""
    total = sum(weights)
    return [math.ceil(num_samples * (weight / total) * MARGIN) for weight in weights]


class Blend:
    """Which dataset gives a sample, and which of its own: a pure function of the weights and the sample number.

    What has been asked for is kept, 1 byte a sample and 8 bytes a dataset and SEGMENT samples.
    """

    def __init__(self, weights: Sequence[float], progress: bool = False) -> None:
        if len(weights) > 254:
            raise ValueError(f"data.weights: {len(weights)} entries; at most 254 can be blended")
        assert min(weights) > 0, "weights are above 0"
        self.progress = progress
        # Divided twice, as there: the last bit decides ties.
        total = sum(weights)
        self.weights = np.array([weight / total for weight in weights], dtype=np.float64)
        self.weights /= np.sum(self.weights)
        self._choices: list[npt.NDArray[np.uint8]] = []  # of each segment, [SEGMENT]
        self._counts = [np.zeros(len(weights))]  # before each segment, and behind the last

    def __call__(self, samples: npt.ArrayLike) -> tuple[npt.NDArray[np.uint8], Numbers]:
        """Dataset [n] and sample number in it [n] of n sample numbers."""
        numbers = np.atleast_1d(np.asarray(samples, dtype=np.int64))
        assert not numbers.size or numbers.min() >= 0, "sample numbers start at 0"
        datasets, indices = np.empty(len(numbers), np.uint8), np.empty(len(numbers), np.int64)
        if not numbers.size:
            return datasets, indices
        segments = numbers // SEGMENT
        self._extend(int(segments.max()) + 1)
        by_segment = np.argsort(segments, kind="stable")
        for rows in np.split(by_segment, np.flatnonzero(np.diff(segments[by_segment])) + 1):
            segment = int(segments[rows[0]])
            choices, places = self._choices[segment], numbers[rows] % SEGMENT
            datasets[rows] = chosen = choices[places]
            for dataset in np.unique(chosen):
                own = chosen == dataset
                given = np.searchsorted(np.flatnonzero(choices == dataset), places[own])
                indices[rows[own]] = int(self._counts[segment][dataset]) + given
        return datasets, indices

    def _extend(self, segments: int) -> None:
        """Have at least that many segments."""
        rounds = []
        have = len(self._choices)
        while have < segments:
            # Twice as many as before, so that a run that asks step by step is served in few rounds.
            rounds.append(min(SIDE_BY_SIDE, max(segments - have, have)))
            have += rounds[-1]
        show = self.progress and len(rounds) > SHOWN
        for count in track(rounds, "blend", console=Console(stderr=True), disable=not show):
            self._compute(count)

    def _compute(self, count: int) -> None:
        first = np.arange(len(self._choices), len(self._choices) + count, dtype=np.float64) * SEGMENT
        before = self._guess(first)
        before[:, 0] = self._counts[-1]
        choices, after = np.empty((count, SEGMENT), np.uint8), np.empty_like(before)
        wrong = np.arange(count)
        while wrong.size:
            choices[wrong], after[:, wrong] = self._follow(first[wrong], before[:, wrong])
            wrong = 1 + np.flatnonzero((after[:, :-1] != before[:, 1:]).any(axis=0))
            before[:, wrong] = after[:, wrong - 1]
        self._choices += list(choices)
        self._counts += list(after.T)

    def _guess(self, samples: Counts) -> Counts:
        """About what each dataset has given before these samples, [datasets, n]: shares, by largest remainder."""
        exact = self.weights[:, None] * samples
        counts = np.floor(exact)
        rank = (counts - exact).argsort(axis=0).argsort(axis=0)
        return counts + (rank < samples - counts.sum(axis=0))

    def _follow(self, first: Counts, before: Counts) -> tuple[npt.NDArray[np.uint8], Counts]:
        """The rule over a segment each, from samples `first` [n] and counts `before` [datasets, n]: choices
        [n, SEGMENT] and the counts behind."""
        counts, columns = before.copy(), np.arange(len(first))
        choices = np.empty((SEGMENT, len(first)), np.uint8)
        for step in range(SEGMENT):
            behind = self.weights[:, None] * np.maximum(first + step, 1.0) - counts
            choices[step] = chosen = behind.argmax(axis=0)
            counts[chosen, columns] += 1.0
        return choices.T.copy(), counts


class BlendedDataset:
    """Samples of several datasets, mixed by weight. With `size`, sample s is sample s % size."""

    def __init__(
        self, datasets: Sequence[Dataset], weights: Sequence[float], size: int | None = None, progress: bool = False
    ) -> None:
        assert len(datasets) == len(weights), "one weight a dataset"
        self.datasets, self.size = datasets, size
        self.blend = Blend(weights, progress)
        self.seq_length, self.segments = datasets[0].seq_length, datasets[0].segments

    def sample(self, samples: npt.ArrayLike) -> Numbers:
        """Tokens [n, seq_length + 1] of n sample numbers."""
        return self._rows(samples, [dataset.sample for dataset in self.datasets])

    def documents(self, samples: npt.ArrayLike) -> Numbers:
        """For each token of `sample(samples)` the number of its document, counted from 0 in each row."""
        return self._rows(samples, [dataset.documents for dataset in self.datasets])

    def _rows(self, samples: npt.ArrayLike, read: Sequence[Callable[[npt.ArrayLike], Numbers]]) -> Numbers:
        numbers = np.atleast_1d(np.asarray(samples, dtype=np.int64))
        owners, indices = self.blend(numbers % self.size if self.size else numbers)
        out = np.empty((len(numbers), self.seq_length + 1), dtype=np.int64)
        for owner in np.unique(owners):
            rows = owners == owner
            out[rows] = read[owner](indices[rows])
        return out

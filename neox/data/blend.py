"""Datasets blended by weight: gpt-neox's rule, bit for bit, without end.

Sample i comes from the dataset d that is furthest behind its share: the largest weight_d * max(i, 1) - count_d in
float64, the first of equals, where count_d is what it has given so far; it gives its sample number count_d.
Source: EleutherAI/gpt-neox, megatron/data/blendable_dataset.py and helpers.cpp.

The rule goes sample by sample. Here many segments of samples advance side by side, each from counts that are guessed;
a segment is right when its counts are those that the one before it ended with, and is computed again from these until
all are. The rule forgets a wrong guess quickly, so that twice is nearly always enough.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from neox.data.split import Documents
from neox.data.windows import Dataset, DocumentSpan, Seen
from neox.system.console import progress_bar

SEGMENT = 1024  # samples
SIDE_BY_SIDE = 1024  # segments, at most
SHOWN = 20  # rounds of that many segments: seconds
MARGIN = 1.005  # more than its share that each dataset is made for, so that a blend does not run out of one
Numbers = npt.NDArray[np.int64]
Phase = tuple[int, Sequence[float]]
"""(first sample, weights): the weights hold from that sample on."""
SampleCounts = npt.NDArray[np.float64]  # whole numbers


def shares(weights: Sequence[float], num_samples: int) -> list[int]:
    """Samples that each dataset of a megatron blend is made for.

    It is the dataset's share and half a percent, rounded up.
    """
    total = sum(weights)
    return [math.ceil(num_samples * (weight / total) * MARGIN) for weight in weights]


class Blend:
    """Choice of a dataset for each sample, and of the sample in that dataset.

    A pure function of the weights and the sample number.

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
        self._growing = threading.Lock()  # one thread makes batches ahead, another counts what was read

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

    def given(self, samples: int) -> Numbers:
        """Count the samples that each dataset gives before number `samples`, [datasets]."""
        segment, rest = divmod(samples, SEGMENT)
        self._extend(segment + 1)
        more = np.bincount(self._choices[segment][:rest], minlength=len(self.weights))
        return self._counts[segment].astype(np.int64) + more

    def numbers(self, dataset: int, indices: Numbers) -> Numbers:
        """Sample numbers that give these samples [n] of a dataset: the inverse of a call."""
        if not indices.size:
            return indices
        while self._counts[-1][dataset] <= indices.max():
            self._extend(2 * len(self._choices) + 1)
        segments = np.searchsorted([counts[dataset] for counts in self._counts], indices, side="right") - 1
        places = [
            np.flatnonzero(self._choices[segment] == dataset)[index - int(self._counts[segment][dataset])]
            for segment, index in zip(segments.tolist(), indices.tolist(), strict=True)
        ]
        return segments * SEGMENT + np.array(places, np.int64)

    def _extend(self, segments: int) -> None:
        """Have at least that many segments."""
        with self._growing:
            self._grow(segments)

    def _grow(self, segments: int) -> None:
        rounds = []
        have = len(self._choices)
        while have < segments:
            # Twice as many as before, so that a run that asks step by step is served in few rounds.
            rounds.append(min(SIDE_BY_SIDE, max(segments - have, have)))
            have += rounds[-1]
        show = self.progress and len(rounds) > SHOWN
        with progress_bar("count", show=show) as bar:
            for count in bar.track(rounds, description="blend"):
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

    def _guess(self, samples: SampleCounts) -> SampleCounts:
        """Estimate the counts before these samples, [datasets, n]: shares, by largest remainder."""
        exact = self.weights[:, None] * samples
        counts = np.floor(exact)
        rank = (counts - exact).argsort(axis=0).argsort(axis=0)
        return counts + (rank < samples - counts.sum(axis=0))

    def _follow(self, first: SampleCounts, before: SampleCounts) -> tuple[npt.NDArray[np.uint8], SampleCounts]:
        """Apply the rule to one segment each, from samples `first` [n] and counts `before`.

        Returns the choices [n, SEGMENT] and the counts after them [datasets, n].
        """
        counts, columns = before.copy(), np.arange(len(first))
        choices = np.empty((SEGMENT, len(first)), np.uint8)
        for step in range(SEGMENT):
            behind = self.weights[:, None] * np.maximum(first + step, 1.0) - counts
            choices[step] = chosen = behind.argmax(axis=0)
            counts[chosen, columns] += 1.0
        return choices.T.copy(), counts


class BlendSchedule:
    """A blend whose weights change at given samples.

    From each change on the rule begins anew, and each dataset goes on with its own next sample. A pure function of the
    changes and the sample number.

    `phases`: (first sample, weights), the first of them from sample 0 on.
    """

    def __init__(self, phases: Sequence[Phase], progress: bool = False) -> None:
        self.phases = [(int(first), tuple(map(float, weights))) for first, weights in phases]
        self.starts = np.array([first for first, _ in self.phases], np.int64)
        assert (np.diff(self.starts, prepend=0) >= 0).all(), "phases follow each other, from 0 on"
        self.blends = [Blend(weights, progress) for _, weights in self.phases]
        before = [np.zeros(len(self.phases[0][1]), np.int64)]
        for blend, samples in zip(self.blends, np.diff(self.starts).tolist(), strict=False):
            before.append(before[-1] + blend.given(samples))
        self._before = np.stack(before)  # [phases, datasets] samples given before each phase

    def __call__(self, samples: npt.ArrayLike) -> tuple[npt.NDArray[np.uint8], Numbers]:
        """Dataset [n] and sample number in it [n] of n sample numbers."""
        numbers = np.atleast_1d(np.asarray(samples, dtype=np.int64))
        datasets, indices = np.empty(len(numbers), np.uint8), np.empty(len(numbers), np.int64)
        phases = np.searchsorted(self.starts, numbers, side="right") - 1
        for phase in np.unique(phases):
            own = phases == phase
            datasets[own], since = self.blends[phase](numbers[own] - self.starts[phase])
            indices[own] = since + self._before[phase][datasets[own]]
        return datasets, indices

    def given(self, samples: int) -> Numbers:
        """Count the samples that each dataset gives before number `samples`, [datasets]."""
        phase = int(np.searchsorted(self.starts, samples, side="right")) - 1
        return self._before[phase] + self.blends[phase].given(samples - int(self.starts[phase]))

    def numbers(self, dataset: int, indices: Numbers) -> Numbers:
        """Sample numbers that give these samples [n] of a dataset: the inverse of a call."""
        phases = np.searchsorted(self._before[:, dataset], indices, side="right") - 1
        out = np.empty_like(indices)
        for phase in np.unique(phases):
            own = phases == phase
            since = indices[own] - self._before[phase, dataset]
            out[own] = self.starts[phase] + self.blends[phase].numbers(dataset, since)
        return out


class BlendedDataset:
    """Samples of several datasets of one source each, mixed by weight.

    With `size`, sample s is sample s % size, unless the weights were changed: then each dataset begins anew by itself.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        phases: Sequence[Phase],
        size: int | None = None,
        progress: bool = False,
    ) -> None:
        assert all(len(datasets) == len(weights) for _, weights in phases), "one weight a dataset"
        assert size is None or len(phases) == 1 or phases[1][0] <= size, "a change comes before the end"
        self.datasets, self.progress = datasets, progress
        self.size = size if len(phases) == 1 else None
        self.sources: list[Documents] = [dataset.sources[0] for dataset in datasets]
        self.schedule = BlendSchedule(phases, progress)
        self.seq_length, self.segments = datasets[0].seq_length, datasets[0].segments

    def with_phases(self, phases: Sequence[Phase]) -> BlendedDataset:
        """Blend the same datasets by other phases."""
        return BlendedDataset(self.datasets, phases, self.size, self.progress)

    def sample(self, samples: npt.ArrayLike) -> Numbers:
        """Tokens [n, seq_length + 1] of n sample numbers."""
        return self._rows(samples, [dataset.sample for dataset in self.datasets])

    def documents(self, samples: npt.ArrayLike) -> Numbers:
        """For each token of `sample(samples)` the number of its document, counted from 0 in each row."""
        return self._rows(samples, [dataset.documents for dataset in self.datasets])

    def owners(self, samples: npt.ArrayLike) -> Numbers:
        """Index of the source of each of n samples, [n]."""
        return self.schedule(self._wrapped(samples))[0].astype(np.int64)

    def trace(self, samples: npt.ArrayLike) -> list[list[DocumentSpan]]:
        """Document spans of each of n samples, in order."""
        found: list[list[DocumentSpan]] = [[]] * np.size(samples)
        for owner, rows, indices in self._by_owner(samples):
            for row, spans in zip(rows.tolist(), self.datasets[owner].trace(indices), strict=True):
                found[row] = [span._replace(source=owner) for span in spans]
        return found

    def seen(self, span: DocumentSpan, samples: int) -> Seen:
        """Find the samples before number `samples` that hold any token of the span."""
        size = self.size or max(1, samples)
        given = int(self.schedule.given(min(samples, size))[span.source])
        once = self.datasets[span.source].seen(span._replace(source=0), given)
        numbers = self.schedule.numbers(span.source, once[:, 0])
        turns = [np.stack((numbers + first, once[:, 1]), axis=1) for first in range(0, max(1, samples), size)]
        rows = np.concatenate(turns)
        rows = rows[rows[:, 0] < samples]
        return rows[np.argsort(rows[:, 0], kind="stable")]

    def per_epoch(self) -> list[float]:
        """Samples that read all of a source once, for each source."""
        return [dataset.per_epoch()[0] for dataset in self.datasets]

    def _wrapped(self, samples: npt.ArrayLike) -> Numbers:
        numbers = np.atleast_1d(np.asarray(samples, dtype=np.int64))
        return numbers % self.size if self.size else numbers

    def _by_owner(self, samples: npt.ArrayLike) -> Iterator[tuple[int, Numbers, Numbers]]:
        """Group n samples by dataset: its index, the rows, and the sample numbers in it."""
        owners, indices = self.schedule(self._wrapped(samples))
        for owner in np.unique(owners).tolist():
            rows = np.flatnonzero(owners == owner)
            yield owner, rows, indices[rows]

    def _rows(self, samples: npt.ArrayLike, read: Sequence[Callable[[npt.ArrayLike], Numbers]]) -> Numbers:
        out = np.empty((np.size(samples), self.seq_length + 1), dtype=np.int64)
        for owner, rows, indices in self._by_owner(samples):
            out[rows] = read[owner](indices)
        return out

"""How a run blends its texts and what it has read of each: a few numbers that its checkpoints carry."""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from neox.data import Loader
from neox.data.blend import BlendedDataset, Phase
from neox.data.provenance import Sources
from neox.data.windows import Dataset


def phases(noted: Sequence[Sequence[Any]], wanted: Sequence[float], samples: int) -> list[Phase]:
    """The phases of a blend whose checkpoint noted these, after `samples` samples, and that goes on with the weights
    `wanted`. Raises TypeError or ValueError where what was noted is no such list."""
    known: list[Phase] = [(int(first), tuple(map(float, weights))) for first, weights in noted]
    if known[-1][1] == tuple(wanted):
        return known
    before = [phase for phase in known[1:] if phase[0] < samples]  # the first one made the order of each text
    last = (before or known[:1])[-1]
    return [known[0], *before, *([] if last[1] == tuple(wanted) else [(samples, tuple(wanted))])]


def blended(dataset: Dataset, noted: Sequence[Sequence[Any]], wanted: Sequence[float], samples: int) -> Dataset:
    """`dataset` with the `phases` of a run; as it is where none were noted or no weights are wanted, as of megatron's
    order without weights, whose blend never changes."""
    if noted and wanted and isinstance(dataset, BlendedDataset):
        return dataset.with_phases(phases(noted, wanted, samples))
    return dataset


def began_with(steps: Sequence[Path]) -> tuple[float, ...]:
    """The weights that a run began with, from its newest checkpoint that tells them: all of them tell the same."""
    for folder in reversed(steps):
        with suppress(OSError, ValueError, KeyError, TypeError, IndexError):
            return tuple(map(float, json.loads((folder / "state.json").read_bytes())["blend"][0][1]))
    return ()


def names(dataset: Dataset) -> list[str]:
    """What the entries of data.train are called: their component where they hold one, else their file; no two alike."""
    found: list[str] = []
    for part in dataset.parts:
        components = Sources.of(part.file).components(part.first, len(part))
        name = (components[0] if len(components) == 1 else None) or part.file.bin.stem
        found.append(f"{name} ({len(found)})" if name in found else name)
    return found


class Account:
    """Samples that were read of each entry of data.train, up to a step."""

    def __init__(self, step: int = 0, read: Sequence[int] = (), names: Sequence[str] = ()) -> None:
        """`read`: samples after `step` steps, empty at the beginning. `names` of the entries, where they are known."""
        self.step, self.read, self.names = step, list(map(int, read)), names

    def up_to(self, step: int, loader: Loader) -> list[int]:
        """After `step` steps, as `loader` reads them."""
        parts = len(loader.dataset.parts)
        read = np.array(self.read or [0] * parts, np.int64)
        for before in range(self.step, step):
            read += np.bincount(loader.dataset.owners(loader.samples(before)), minlength=parts)
        self.step, self.read = step, read.tolist()
        return self.read

    def epochs(self, step: int, loader: Loader) -> dict[str, float]:
        """How often each entry has been read after `step` steps, by its name."""
        self.names = self.names or names(loader.dataset)
        counts = zip(self.names, self.up_to(step, loader), loader.dataset.per_epoch(), strict=True)
        return {name: count / whole if whole else 0.0 for name, count, whole in counts}

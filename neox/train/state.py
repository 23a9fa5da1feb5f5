"""The train state: all that a resumed run needs besides weights and optimizer state, as state.json holds it.

It has the loss scaler, the spike detector, how the entries of data.train are blended, and how many samples of each
entry were consumed.
"""

import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from neox.config import Config
from neox.config.structured import read_json
from neox.data.blend import BlendedDataset, Phase
from neox.data.loader import Loader, batch_sizes
from neox.data.provenance import Provenance
from neox.data.windows import Dataset
from neox.system.processes import Processes
from neox.train.goodput import Goodput
from neox.train.spikes import SpikeDetector

if TYPE_CHECKING:
    from neox.train.scaler import LossScaler


class TrainState:
    """The numbers that a resumed run goes on with, and the objects that hold them."""

    def __init__(
        self, config: Config, dataset: Dataset, order: str, goodput: Goodput, weights: tuple[float, ...] = ()
    ) -> None:
        """State before the first step.

        Args:
            order: fingerprint of the order of `dataset`.
            weights: blend weights from where the run stands on, empty where the config names none.
        """
        self.config, self.order, self.goodput, self.weights = config, order, goodput, weights
        self.step = 0  # steps done
        self.updates = 0  # of them applied
        self.scaler = _loss_scaler(config, {})
        self.spikes = SpikeDetector(config.train)
        self.loader = Loader(dataset, batch_sizes(config.train))
        self.consumed = ConsumedSamples()

    def epochs(self) -> dict[str, float]:
        """Epochs read of each entry of data.train, by its name."""
        return self.consumed.epochs(self.step, self.loader)

    def save(self) -> dict[str, Any]:
        """Content of state.json."""
        return {
            "step": self.step,
            "samples": self.loader.position(self.step),
            "stepped_over": self.loader.stepped_over,
            "batch_sizes": [phase for phase in self.loader.sizes if phase[0] < max(1, self.step)],
            "updates": self.updates,
            "loss_scaler": self.scaler.state() if self.scaler else {},
            "spikes": self.spikes.state(),
            "seconds": self.goodput.state(),
            "order": self.order,
            "read": self.consumed.up_to(self.step, self.loader),
            "blend": data.schedule.phases if isinstance(data := self.loader.dataset, BlendedDataset) else [],
        }

    def load(self, folder: Path, state: dict[str, Any]) -> None:
        """Go to where the checkpoint `folder` stands, whose state.json holds `state`.

        Raises ValueError where it cannot be read, and where the run would not go on as it began.
        """
        run = folder.parent
        step, samples = state["step"], state["samples"]
        try:
            updates = int(state["updates"])
            scaler = _loss_scaler(self.config, state["loss_scaler"])
            spikes = SpikeDetector(self.config.train, state["spikes"])
            sizes = batch_sizes(self.config.train, state["batch_sizes"], step)
            over = [(int(first), int(last)) for first, last in state["stepped_over"]]
            seconds = dict(state["seconds"])
            dataset = with_blend_schedule(self.loader.dataset, state["blend"], self.weights, samples)
            consumed = ConsumedSamples(step, state["read"], self.consumed.names)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{folder / 'state.json'}: cannot be read ({error}): remove the folder, and the run resumes at the "
                "step before it"
            ) from None
        loader = Loader(dataset, sizes, over)
        if loader.position(step) != samples:
            raise ValueError(
                f"{folder / 'state.json'}: cannot be read (batch_sizes give {loader.position(step)} samples, not "
                f"{samples}): remove the folder, and the run resumes at the step before it"
            )
        if state["order"] not in ("", self.order):
            raise ValueError(
                f"{run}: its data would be read in another order than before step {step}: a run keeps "
                "train.seed, its text, and data.order, seq_length, split and num_samples, and whether it has weights"
            )
        self.step, self.updates = step, updates
        self.scaler, self.spikes, self.loader, self.consumed = scaler, spikes, loader, consumed
        self.goodput.move(seconds)

    def rewind(self, folder: Path, state: dict[str, Any], first: int) -> None:
        """Go back to the checkpoint `folder` as by `load`, and skip the data of the steps from step `first` on."""
        left, loader, rewinds = self.step, self.loader.step_over(first, self.step), self.spikes.rewinds
        self.load(folder, state)
        # All that stays of the steps that are rewound.
        self.loader, self.spikes.rewinds = loader, [*rewinds, (left, self.step)]

    def check(
        self, loss: Tensor, norm: Tensor, processes: Processes, tokens: int
    ) -> tuple[float | Tensor, float | Tensor, str | None]:
        """Loss and gradient norm of a step, and the reason to skip its update, if any; `tokens`: labels that count.

        With `train.guard` the one place where a step waits for the device: the update depends on it, and is soon
        launched. A step without a label has no loss (NaN), and its update is skipped.
        """
        if not tokens:
            self.spikes.record(math.nan, math.nan, skipped=True)
            return math.nan, 0.0, "none of its labels counts"
        if not self.config.train.guard:
            return loss, norm, None
        mean, total = torch.stack((loss.float(), norm.float())).tolist()
        reason = self.spikes.check(mean, total, scaled=self.scaler is not None)
        # Rounding may differ from one process to the next, and they must all do the same.
        if processes.all_reduce_max(reason is not None):
            reason = reason or "another process found the step bad"
        self.spikes.record(mean, total, reason is not None)
        return mean, total, reason


def _loss_scaler(config: Config, state: dict[str, Any]) -> "LossScaler | None":
    """Loss scaler of an fp16 run, None for other precisions."""
    if config.train.dtype != "fp16":
        return None
    from neox.train.scaler import build_scaler

    return build_scaler(config.optim, state)


class ConsumedSamples:
    """Samples that were read of each entry of data.train, up to a step."""

    def __init__(self, step: int = 0, read: Sequence[int] = (), names: Sequence[str] = ()) -> None:
        """`read`: counts after `step` steps, empty at the beginning; `names` of the entries, if known."""
        self.step, self.read, self.names = step, list(map(int, read)), names

    def up_to(self, step: int, loader: Loader) -> list[int]:
        """Counts after `step` steps, as `loader` reads them."""
        entries = len(loader.dataset.sources)
        read = np.array(self.read or [0] * entries, np.int64)
        for before in range(self.step, step):
            read += np.bincount(loader.dataset.owners(loader.samples(before)), minlength=entries)
        self.step, self.read = step, read.tolist()
        return self.read

    def epochs(self, step: int, loader: Loader) -> dict[str, float]:
        """Epochs of each entry after `step` steps, by its name."""
        self.names = self.names or entry_names(loader.dataset)
        counts = zip(self.names, self.up_to(step, loader), loader.dataset.per_epoch(), strict=True)
        return {name: count / epoch if epoch else 0.0 for name, count, epoch in counts}


def entry_names(dataset: Dataset) -> list[str]:
    """Names of the entries of data.train, all different: their component where they hold one, else their file."""
    names: list[str] = []
    for source in dataset.sources:
        components = Provenance.of(source.file).components(source.first, len(source))
        name = (components[0] if len(components) == 1 else None) or source.file.bin.stem
        names.append(f"{name} ({len(names)})" if name in names else name)
    return names


def blend_schedule(stored: Sequence[Sequence[Any]], weights: Sequence[float], samples: int) -> list[Phase]:
    """Phases of a blend that goes on with `weights` after `samples` samples, given the `stored` ones of its checkpoint.

    Raises TypeError or ValueError where `stored` is no list of phases.
    """
    known: list[Phase] = [(int(first), tuple(map(float, shares))) for first, shares in stored]
    if known[-1][1] == tuple(weights):
        return known
    before = [phase for phase in known[1:] if phase[0] < samples]  # the first one made the order of each text
    last = (before or known[:1])[-1]
    return [known[0], *before, *([] if last[1] == tuple(weights) else [(samples, tuple(weights))])]


def with_blend_schedule(
    dataset: Dataset, stored: Sequence[Sequence[Any]], weights: Sequence[float], samples: int
) -> Dataset:
    """`dataset` with the `blend_schedule` of a run; unchanged where nothing is stored or no weights are given.

    (Megatron's order without weights is a blend too, whose schedule never changes.)
    """
    if stored and weights and isinstance(dataset, BlendedDataset):
        return dataset.with_phases(blend_schedule(stored, weights, samples))
    return dataset


def frozen_samples(config: Config, steps: Sequence[Path]) -> tuple[Config, int]:
    """Samples that a run takes, and its config with the number that its order was made for.

    `steps` are its complete checkpoints: sizes of batches that it has taken count as they were.
    """
    sizes, step = batch_sizes(config.train), 0
    for folder in reversed(steps):
        with suppress(OSError, ValueError, KeyError, TypeError, IndexError):
            state = read_json(folder / "state.json")
            sizes, step = batch_sizes(config.train, state["batch_sizes"], state["step"]), state["step"]
            break
    ends = [*(first for first, _ in sizes[1:]), max(config.train.steps, step)]
    samples = sum(max(0, min(end, ends[-1]) - first) * size for (first, size), end in zip(sizes, ends, strict=True))
    if config.data.order == "megatron" and not config.data.num_samples:
        # The order depends on it: a run that is made longer keeps the one it began with.
        config = config.replace(data=config.data.replace(num_samples=samples))
    return config, samples


def initial_weights(steps: Sequence[Path]) -> tuple[float, ...]:
    """Initial blend weights of a run, read from its newest readable checkpoint; empty without one."""
    for folder in reversed(steps):
        with suppress(OSError, ValueError, KeyError, TypeError, IndexError):
            return tuple(map(float, read_json(folder / "state.json")["blend"][0][1]))
    return ()

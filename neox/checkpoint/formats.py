"""Formats that weights are read from: one line each, tried in this order."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from neox.checkpoint.hub import local_folder
from neox.checkpoint.huggingface import HuggingFaceFolder
from neox.checkpoint.step_weights import StepWeights
from neox.checkpoint.steps import ALONE, all_ranks_or_raise, latest_valid
from neox.checkpoint.weight_source import WeightSource
from neox.system.processes import Processes

FORMATS: tuple[type[WeightSource], ...] = (
    HuggingFaceFolder,
    StepWeights,
)
Result = TypeVar("Result")


def use_weights(
    source: str | Path, use: Callable[[WeightSource], Result], processes: Processes = ALONE, warn: bool = True
) -> Result:
    """Open the weights of `source`, and return use(weights).

    `source` is a folder of any format, a hub id, or a run directory: its latest valid step. A step is passed over where
    opening or using it raises DamagedCheckpoint, with a line on stderr if `warn`. All processes call this together;
    `use` makes no collective calls. Raises CheckpointError.
    """
    with processes.rank_zero_first():  # it may have to be fetched
        folder = local_folder(source)
    for source_type in FORMATS:
        if source_type.matches(folder):
            return _opened(source_type, folder, use, processes)
    return latest_valid(folder, lambda step: _opened(StepWeights, step, use, processes), processes, warn)


def _opened(
    source_type: type[WeightSource], folder: Path, use: Callable[[WeightSource], Result], processes: Processes
) -> Result:
    open_source: Callable[[Path], WeightSource] = source_type
    return all_ranks_or_raise(lambda: use(open_source(folder)), processes)

"""Load and save: Hugging Face folders, a run's own checkpoints, models by hub id."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from neox.checkpoint.checksums import DamagedCheckpoint
from neox.checkpoint.step_weights import load_latest, load_tensors
from neox.checkpoint.steps import (
    complete_steps,
    expired,
    invalidate_after,
    is_due,
    is_valid,
    latest_valid,
    prune,
    read_step,
    step_folder,
    step_number,
)
from neox.checkpoint.weight_source import CheckpointError, Transform, WeightSource
from neox.checkpoint.writer import Saver, save_step
from neox.model.decoder import GPTNeoX

if TYPE_CHECKING:
    from neox.checkpoint.export import convert, save
    from neox.checkpoint.formats import use_weights
    from neox.checkpoint.initial import load_initial
    from neox.tokenizer import Tokenizer

__all__ = [
    "CheckpointError",
    "DamagedCheckpoint",
    "Saver",
    "WeightSource",
    "complete_steps",
    "convert",
    "expired",
    "invalidate_after",
    "is_due",
    "is_valid",
    "latest_valid",
    "load",
    "load_initial",
    "load_latest",
    "load_tensors",
    "prune",
    "read_step",
    "save",
    "save_step",
    "step_folder",
    "step_number",
    "use_weights",
    "weights_dtype",
]


_HOME = {
    "convert": "neox.checkpoint.export",
    "load_initial": "neox.checkpoint.initial",
    "save": "neox.checkpoint.export",
    "use_weights": "neox.checkpoint.formats",
}


def __getattr__(name: str) -> Any:
    """Import readers and writers of other formats on first use: training needs a run's own alone."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def weights_dtype(source: str | Path) -> torch.dtype:
    """Type that the weights of `source`, all that `load` takes, are stored in. Raises CheckpointError."""
    from neox.checkpoint.formats import use_weights

    # No warning for a damaged step: `load` of the same source gives it.
    return use_weights(source, lambda weights: weights.dtype, warn=False)


def load(
    source: str | Path,
    device: str = "cpu",
    dtype: str | torch.dtype | None = None,
    transform: Transform | None = None,
) -> "tuple[GPTNeoX, Tokenizer | None]":
    """Load a model and its tokenizer.

    `source` is a Hugging Face folder, a hub id (OWNER/MODEL or OWNER/MODEL@REVISION), a run directory (its latest step)
    or a step folder. `transform(name, layer)` returns the replacement of each linear layer and embedding, and is called
    while the next ones are still on the disk. The tokenizer is None where the folder has none. dtype None: float32 on a
    CPU, the stored type elsewhere. Damaged steps of a run are passed over, each with a line on stderr. Raises
    CheckpointError (a ValueError) that names the file and its fault.
    """
    from neox.checkpoint.formats import use_weights
    from neox.checkpoint.model_loader import load_model

    def use(weights: WeightSource) -> "tuple[GPTNeoX, Tokenizer | None]":
        return load_model(weights, device, dtype, transform), weights.tokenizer()

    return use_weights(source, use)

"""Load and save: Hugging Face folders, a run's own checkpoints, models by hub id."""

from pathlib import Path

import torch

from neox.checkpoint.checksums import DamagedCheckpoint
from neox.checkpoint.export import convert
from neox.checkpoint.huggingface import (
    CheckpointError,
    Transform,
    find,
    load_huggingface,
    save_huggingface,
    stored_dtype,
)
from neox.checkpoint.initial import load_initial
from neox.checkpoint.retention import expired, is_due, prune
from neox.checkpoint.steps import (
    complete_steps,
    fill_state,
    is_sound,
    is_step,
    load_native,
    load_newest,
    load_tensors,
    newest_sound,
    read_step,
    set_aside_after,
    step_folder,
    step_number,
    step_tokenizer,
)
from neox.checkpoint.writer import Saver, save_step
from neox.model.decoder import GPTNeoX
from neox.system.runtime import resolve_device, resolve_dtype
from neox.tokenizer import Tokenizer

__all__ = [
    "CheckpointError",
    "DamagedCheckpoint",
    "Saver",
    "complete_steps",
    "convert",
    "expired",
    "fill_state",
    "is_due",
    "is_sound",
    "load",
    "load_initial",
    "load_newest",
    "load_tensors",
    "newest_sound",
    "prune",
    "read_step",
    "save",
    "save_step",
    "set_aside_after",
    "step_folder",
    "step_number",
    "weights_dtype",
]

save = save_huggingface


def weights_dtype(source: str | Path) -> torch.dtype:
    """The type that the weights of what `load` reads are stored in; a run's own are float32."""
    folder = find(source)
    return stored_dtype(folder) if (folder / "config.json").exists() else torch.float32


def load(
    source: str | Path,
    device: str = "cpu",
    dtype: str | torch.dtype | None = None,
    transform: Transform | None = None,
) -> tuple[GPTNeoX, Tokenizer | None]:
    """Model and tokenizer from a Hugging Face folder, a run directory (its newest step), a step folder or a hub id.

    `source` may end in @REVISION for a hub id. `transform(name, layer)` gives what takes the place of each linear
    layer and embedding; it is called while the next ones are still on the disk. The tokenizer is None where the folder
    has none. dtype None: float32 on a CPU, the stored type elsewhere. A run's damaged steps are passed over, each with
    a line on stderr. Raises CheckpointError (a ValueError) that says what is wrong with which file.
    """
    folder = find(source)
    if (folder / "config.json").exists():
        model = load_huggingface(folder, device, dtype, transform)
        there = (folder / "tokenizer.json").exists()
        return model, Tokenizer.from_file(folder / "tokenizer.json") if there else None

    def use(step: Path) -> tuple[GPTNeoX, Tokenizer | None]:
        model = load_native(step, resolve_device(device), resolve_dtype(dtype or torch.float32), transform)
        return model, step_tokenizer(step)

    return use(folder) if is_step(folder) else newest_sound(folder, use)

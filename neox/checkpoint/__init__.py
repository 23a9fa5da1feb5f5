"""Load and save: Hugging Face folders, a run's own checkpoints, models by hub id."""

import os
from pathlib import Path

import torch

from neox.checkpoint.huggingface import CheckpointError, load_huggingface, save_huggingface
from neox.checkpoint.native import (
    complete_steps,
    fill_state,
    load_native,
    load_tensors,
    read_step,
    save_step,
    step_folder,
)
from neox.checkpoint.retention import expired, is_due, prune
from neox.model import GPTNeoX
from neox.runtime import resolve_device, resolve_dtype
from neox.tokenizer import Tokenizer

__all__ = [
    "CheckpointError",
    "complete_steps",
    "expired",
    "fill_state",
    "is_due",
    "load",
    "load_tensors",
    "prune",
    "read_step",
    "save",
    "save_step",
    "step_folder",
]

save = save_huggingface


def load(
    source: str | Path, device: str = "cpu", dtype: str | torch.dtype | None = None
) -> tuple[GPTNeoX, Tokenizer | None]:
    """Model and tokenizer from a Hugging Face folder, a run directory (its newest step), a step folder or a hub id.

    `source` may end in @REVISION for a hub id. The tokenizer is None where the folder has none. dtype None: float32 on
    a CPU, the stored type elsewhere. Raises CheckpointError (a ValueError) that says what is wrong with which file.
    """
    folder = Path(source)
    if not folder.exists():
        folder = _fetch(str(source))
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: is a file; give the folder that holds config.json, or a run directory")
    if (folder / "config.json").exists():
        model = load_huggingface(folder, device, dtype)
        there = (folder / "tokenizer.json").exists()
        return model, Tokenizer.from_file(folder / "tokenizer.json") if there else None
    if not (folder / ".metadata").exists() and not folder.name.startswith("step_"):
        steps = complete_steps(folder)
        if not steps:
            raise CheckpointError(
                f"{folder}: neither a Hugging Face folder (config.json) nor a run with a complete step"
            )
        folder = steps[-1]
    model = load_native(folder, resolve_device(device), resolve_dtype(dtype or torch.float32))
    stored = folder / "tokenizer.json"
    if not stored.exists():
        stored = folder.parent / "tokenizer.json"
    return model, Tokenizer.from_file(stored) if stored.exists() else None


def _fetch(source: str) -> Path:
    """The hub's folder for an id such as EleutherAI/pythia-160m@step3000."""
    name, _, revision = source.partition("@")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"{source}: no such folder, and no hub id of the form OWNER/MODEL")
    from huggingface_hub import snapshot_download

    wanted = ["config.json", "tokenizer.json", "*.safetensors", "*.safetensors.index.json"]
    try:
        found = Path(snapshot_download(name, revision=revision or None, allow_patterns=wanted))
        if not any(found.glob("*.safetensors")):
            found = Path(snapshot_download(name, revision=revision or None, allow_patterns=[*wanted, "*.bin*"]))
    except Exception as error:  # the hub's library lets those of its transport, of several libraries, through
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(
            f"{source}: cannot be fetched from the hub ({reason}); is {os.path.curdir}/{source} meant?"
        ) from None
    return found

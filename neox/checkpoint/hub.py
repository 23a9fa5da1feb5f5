"""Local folder of a model, downloaded from the Hugging Face hub where needed."""

import os
from pathlib import Path

from neox.checkpoint.weight_source import CheckpointError


def local_folder(source: str | Path) -> Path:
    """Return the folder of a path, or of a hub id such as EleutherAI/pythia-160m@step3000.

    Raises CheckpointError where there is neither.
    """
    folder = Path(source)
    if not folder.exists():
        folder = _fetch(str(source))
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: is a file; give the folder that holds config.json, or a run directory")
    return folder


def _fetch(source: str) -> Path:
    name, _, revision = source.partition("@")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"{source}: no such folder, and no hub id of the form OWNER/MODEL")
    from huggingface_hub import snapshot_download

    patterns = ["config.json", "tokenizer.json", "*.safetensors", "*.safetensors.index.json"]
    try:
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=[*patterns, "*.bin*"]))
    except Exception as error:  # the hub's library lets those of its transport, of several libraries, through
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(
            f"{source}: cannot be fetched from the hub ({reason}); is {os.path.curdir}/{source} meant?"
        ) from None
    return folder

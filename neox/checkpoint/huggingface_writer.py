"""Writer of Hugging Face folders, whole or not at all, shard by shard from a `WeightSource`."""

import errno
import json
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neox.checkpoint import families
from neox.checkpoint.weight_source import NO_HEAD, CheckpointError, WeightSource
from neox.config import ModelConfig
from neox.system.console import progress_bar
from neox.system.files import sync_folder, write_error
from neox.tokenizer import END_OF_TEXT, Tokenizer

SHARD_BYTES = 5 * 10**9
SHOWN = 10**9
"""From this many bytes there is a progress bar."""
_OUR_FILES = (
    *("config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
)


def write_huggingface(
    weights: WeightSource, path: str | Path, dtype: torch.dtype | None = None, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write config, safetensors shards and tokenizer as a folder that `transformers` loads.

    Memory holds one shard. dtype None keeps the stored one. The folder appears whole or not at all. An older checkpoint
    under that name is replaced; a folder that holds anything else is left alone with a ValueError. A failed write (full
    disk) leaves no trace and raises OSError.
    """
    path = Path(path).resolve()  # a link stays one, and "." has a name
    if path.exists():
        unrecognized = [] if path.is_dir() else [path.name]
        if path.is_dir():
            unrecognized = [p.name for p in path.iterdir() if p.name not in _OUR_FILES and not _is_shard(p.name)]
        if unrecognized:
            raise ValueError(
                f"{path}: holds {sorted(unrecognized)[0]!r}, which is no part of a checkpoint: choose another"
            )
    if weights.headless:
        raise CheckpointError(f"{weights.config_file}: {NO_HEAD}")
    tokenizer = weights.tokenizer()
    eos = tokenizer.eod_id if tokenizer else 0
    config_json = families.write_config(weights.config, dtype or weights.dtype, eos)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        fresh.mkdir()
        _write_weights(weights, dtype, fresh, shard_bytes)
        _write_json(fresh / "config.json", config_json)
        _write_json(fresh / "generation_config.json", {"bos_token_id": eos, "eos_token_id": eos})
        if tokenizer:
            tokenizer.save(fresh / "tokenizer.json")
            _write_json(fresh / "tokenizer_config.json", _tokenizer_config(weights.config, tokenizer))
        _sync_files(fresh)
    except BaseException as error:
        shutil.rmtree(fresh, ignore_errors=True)
        if isinstance(error, OSError):
            raise write_error(error, path) from None
        raise
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    if path.exists():
        path.rename(old)
    fresh.rename(path)
    try:
        sync_folder(path.parent)
    finally:  # the next save of this process uses the name again
        shutil.rmtree(old, ignore_errors=True)


def _is_shard(name: str) -> bool:
    return name.startswith("model-") and name.endswith(".safetensors")


def _tokenizer_config(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    # Naming a token that tokenizer.json lacks would make transformers add it, with an id beyond the embedding.
    special = {} if tokenizer.eod_id is None else dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.max_position_embeddings,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_weights(weights: WeightSource, dtype: torch.dtype | None, folder: Path, shard_bytes: int) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    shards: list[list[str]] = [[]]
    sizes = [0]
    itemsize = (dtype or weights.dtype).itemsize
    for name, shape in weights.shapes.items():
        size = shape.numel() * itemsize
        if sizes[-1] and sizes[-1] + size > shard_bytes:
            shards.append([])
            sizes.append(0)
        sizes[-1] += size
        shards[-1].append(name)
    weight_map = {}
    with progress_bar("bytes", show=sum(sizes) > SHOWN) as bar:
        task = bar.add_task("writing weights", total=sum(sizes))
        for number, (shard, size) in enumerate(zip(shards, sizes, strict=True), 1):
            file = "model.safetensors"
            if len(shards) > 1:
                file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            try:
                stored = dict(pair for name in shard for pair in _stored_tensors(weights, name, dtype))
                save_file(stored, folder / file, metadata={"format": "pt"})
            except SafetensorError as error:
                # safetensors reports a full disk under its own name; users and the CLI know OSError.
                raise OSError(errno.EIO, str(error)) from None
            weight_map.update(dict.fromkeys(stored, file))
            del stored  # before the next shard is read
            bar.advance(task, size)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)


def _stored_tensors(weights: WeightSource, name: str, dtype: torch.dtype | None) -> Iterable[tuple[str, Tensor]]:
    """Stored names and tensors of our parameter `name`: one, or q, k and v."""
    theirs, value = families.their_names(weights.config, name), weights.read(name).to("cpu", dtype).contiguous()
    return zip(theirs, families.unfuse(weights.config, value) if len(theirs) > 1 else [value], strict=True)


def _sync_files(folder: Path) -> None:
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    with suppress(OSError):
        sync_folder(folder)

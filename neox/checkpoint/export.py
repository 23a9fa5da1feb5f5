"""A model from wherever it lies into a Hugging Face folder; a run's checkpoint without ever being whole in memory."""

import re
from pathlib import Path

import torch
from torch import Tensor

from neox.checkpoint.huggingface import SHARD_BYTES, find, load_huggingface, save_huggingface, write_huggingface
from neox.checkpoint.steps import fitting_reader, is_step, newest_sound, read_step, step_tokenizer
from neox.model.decoder import GPTNeoX
from neox.system.runtime import resolve_dtype
from neox.tokenizer import Tokenizer


def convert(source: str | Path, out: str | Path, dtype: str | None = None, shard_bytes: int = SHARD_BYTES) -> int:
    """Write the model of `source` (as `load` takes it) as a Hugging Face folder, and return its number of parameters.

    A run's checkpoint goes tensor by tensor: memory holds one shard. Raises CheckpointError and OSError as `load` and
    `save` do; what is under `out` is replaced only by a whole folder.
    """
    folder = find(source)
    if (folder / "config.json").exists():
        model = load_huggingface(folder, "cpu", dtype)
        there = folder / "tokenizer.json"
        save_huggingface(model, out, Tokenizer.from_file(there) if there.exists() else None, shard_bytes)
        return sum(parameter.numel() for parameter in model.parameters())

    def use(step: Path) -> int:
        return _convert_step(step, out, resolve_dtype(dtype or torch.float32), shard_bytes)

    return use(folder) if is_step(folder) else newest_sound(folder, use)


def _convert_step(folder: Path, out: str | Path, dtype: torch.dtype, shard_bytes: int) -> int:
    config, _ = read_step(folder)
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in GPTNeoX(config.model).named_parameters()}
    reader = fitting_reader(folder, config.model, {}, False)

    def read(name: str) -> Tensor:
        tensor = torch.empty(shapes[name])
        reader.read({f"model.{name}": tensor})
        return tensor.to(dtype)

    write_huggingface(config.model, dtype, shapes, read, out, step_tokenizer(folder), shard_bytes)
    return sum(shape.numel() for shape in shapes.values())


def parse_bytes(text: str) -> int:
    """5GB, 500MB, 2.5e9: the number of bytes. Raises ValueError."""
    found = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*([kMGT]?)B?", text.strip())
    try:
        size = int(float(found[1]) * 1000 ** " kMGT".index(found[2] or " ")) if found else 0
    except ValueError:
        size = 0
    if size < 1:
        raise ValueError(f"{text}: is no size; write it as 5GB or 500MB")
    return size

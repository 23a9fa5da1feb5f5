"""Export to Hugging Face folders, of a model in memory or of one in any format, shard by shard."""

import re
from pathlib import Path

import torch

from neox.checkpoint.formats import use_weights
from neox.checkpoint.huggingface_writer import SHARD_BYTES, write_huggingface
from neox.checkpoint.weight_source import ModelWeights, WeightSource
from neox.model.decoder import GPTNeoX
from neox.system.device import resolve_dtype
from neox.tokenizer import Tokenizer


def save(model: GPTNeoX, path: str | Path, tokenizer: Tokenizer | None = None, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a model as a Hugging Face folder, whole or not at all: see `write_huggingface`.

    Raises ValueError where the folder holds anything else, where the family's format cannot express the config, and for
    a quantized model; OSError for a failed write.
    """
    write_huggingface(ModelWeights(model, tokenizer), path, shard_bytes=shard_bytes)


def convert(source: str | Path, out: str | Path, dtype: str | None = None, shard_bytes: int = SHARD_BYTES) -> int:
    """Write the model of `source` as a Hugging Face folder, and return its number of parameters.

    `source` is all that `load` takes. Tensors are copied one by one: memory holds one shard. dtype None writes float32.
    Raises CheckpointError and OSError as `load` and `save` do; what is under `out` is replaced only by a whole folder.
    """

    def use(weights: WeightSource) -> int:
        write_huggingface(weights, out, resolve_dtype(dtype or torch.float32), shard_bytes)
        return sum(shape.numel() for shape in weights.shapes.values())

    return use_weights(source, use)


def parse_bytes(text: str) -> int:
    """Parse a size such as 5GB, 500MB or 2.5e9 into bytes. Raises ValueError."""
    match = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*([kMGT]?)B?", text.strip())
    try:
        size = int(float(match[1]) * 1000 ** " kMGT".index(match[2] or " ")) if match else 0
    except ValueError:
        size = 0
    if size < 1:
        raise ValueError(f"{text}: is no size; write it as 5GB or 500MB")
    return size

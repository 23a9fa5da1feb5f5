"""A model from anywhere in an engine: on which device, and in how many bits its weights are held."""

from pathlib import Path
from typing import Any, Literal, get_args

import torch

from neox.checkpoint import load, weights_dtype
from neox.generate.engine import Engine
from neox.generate.speculate import DraftModel, prompt_lookup
from neox.kernels import Kind
from neox.quantize import lossless, packing, quantize
from neox.runtime import resolve_device

Weights = Literal["auto", "plain", "fp32", "fp16", "bf16", "int8", "int4"]
"""plain leaves the layers to torch; the others are kinds of `neox.kernels`."""


def load_engine(
    source: str | Path,
    device: str = "auto",
    dtype: str | None = None,
    weights: str = "auto",
    speculate: str = "none",
    draft: str | None = None,
    **options: Any,
) -> Engine:
    """An engine with the model of `source` (all that `checkpoint.load` takes); `options` are the engine's.

    weights: on a CPU, `auto` holds them in the type they are stored in, which loses nothing, where there are compiled
    kernels for it; elsewhere, and where a `dtype` is asked for, it leaves them to torch. Packed weights are made layer
    by layer, while the next ones are still on the disk. speculate: `prompt` guesses from the text so far; `draft` is
    the source of a smaller model that guesses. Raises ValueError for a word that is none of these.
    """
    if weights not in get_args(Weights):
        raise ValueError(f"weights={weights}: must be one of {', '.join(get_args(Weights))}")
    if speculate not in ("none", "prompt"):
        raise ValueError(f"speculate={speculate}: must be none or prompt")
    if draft and speculate != "none":
        raise ValueError("give speculate= or draft=, not both")
    place = resolve_device(device)
    kind = _kind(source, place, dtype, weights)
    if kind and (place.type != "cpu" or dtype):
        raise ValueError(f"weights={weights}: packed weights are for a CPU, and take no dtype")
    model, tokenizer = load(source, str(place), dtype, packing(kind) if kind else None)
    if kind:
        quantize(model, kind)
    guess = prompt_lookup if speculate == "prompt" else None
    if draft:
        smaller = load_engine(draft, device, dtype, weights)
        if smaller.tokenizer and tokenizer and smaller.tokenizer.sha256 != tokenizer.sha256:
            raise ValueError(f"draft={draft}: has another tokenizer than {source}: its guesses would be other tokens")
        return Engine(model, tokenizer, guess=DraftModel(smaller.model), **options)
    return Engine(model, tokenizer, guess=guess, **options)


def _kind(source: str | Path, place: torch.device, dtype: str | None, weights: str) -> Kind | None:
    """How weights are packed; None: not at all."""
    if weights == "auto":
        return None if place.type != "cpu" or dtype else lossless(weights_dtype(source))
    return None if weights == "plain" else weights  # type: ignore[return-value]

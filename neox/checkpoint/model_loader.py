"""Loader of a model from a `WeightSource`; each layer is transformed before the next is read."""

import torch

from neox.checkpoint.weight_source import NO_HEAD, Transform, WeightSource
from neox.model.decoder import GPTNeoX
from neox.system.console import human_count, progress_bar
from neox.system.device import check_fits, resolve_device, resolve_dtype
from neox.system.machine import return_freed_memory

SHOWN = 10**9
"""From this many parameters there is a progress bar."""


def load_model(
    weights: WeightSource,
    device: str = "cpu",
    dtype: str | torch.dtype | None = None,
    transform: Transform | None = None,
) -> GPTNeoX:
    """Load a model in evaluation mode; peak memory is the model plus one tensor.

    With `transform` memory holds the transformed layers and one layer as it was stored. dtype None keeps the stored one
    on an accelerator and takes float32 on a CPU, where 16-bit products are slow. Raises CheckpointError, and ValueError
    for an unknown device or dtype.
    """
    target = resolve_device(device)
    dtype = resolve_dtype(dtype or (torch.float32 if target.type == "cpu" else weights.dtype))
    count = sum(shape.numel() for shape in weights.shapes.values())
    size = dtype.itemsize if transform is None else 0.5  # a layer may be packed in 4 bits
    check_fits(count * size, target, f"{weights.config_file.parent}: the model of {human_count(count)} parameters")
    with torch.device("meta"):
        model = GPTNeoX(weights.config)
    with progress_bar("bytes", show=count > SHOWN) as bar:
        task = bar.add_task("loading weights", total=count * dtype.itemsize)
        for name in weights.names():
            # A copy, so that no parameter keeps a whole memory-mapped file alive.
            value = weights.read(name).to(target, dtype, copy=weights.shares_memory)
            bar.advance(task, value.nbytes)
            module = _assign(model, name, value)
            del value
            if transform:
                _transform_layer(model, module, transform)
    if weights.headless:
        model.set_submodule("embed_out", NoHead())
    model.tie()
    return model.eval()


class NoHead(torch.nn.Module):
    """Stand-in for the head of a model that was saved without one."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        raise ValueError(NO_HEAD)


def _assign(model: GPTNeoX, name: str, value: torch.Tensor) -> str:
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, torch.nn.Parameter(value))
    return module


def _transform_layer(model: GPTNeoX, name: str, transform: Transform) -> None:
    """Replace a complete linear layer or embedding by its transformed one."""
    module = model.get_submodule(name)
    tied = model.config.tie_word_embeddings and name in ("embed_in", "embed_out")
    replaceable = isinstance(module, torch.nn.Linear | torch.nn.Embedding) and not tied
    if replaceable and not any(parameter.is_meta for parameter in module.parameters()):
        model.set_submodule(name, transform(name, module))
        del module
        return_freed_memory()

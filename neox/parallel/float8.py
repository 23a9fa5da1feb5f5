"""The blocks' matrix products in 8-bit floating point, by torchao: on an H100 or H200 at twice the rate of bf16."""

from dataclasses import replace

import torch
from torch import nn

from neox.model.decoder import GPTNeoX


def float8_blocks(model: GPTNeoX, recipe: str, device: torch.device) -> None:
    """Swap the blocks' linear layers for torchao's, which keep weights and their names, and round what they multiply.

    `recipe` is "tensorwise" (one scale a tensor), "rowwise" (one a row: more exact, slower) or "none". Inputs, weights
    and the gradients of outputs are scaled and rounded for all three products of a layer; what is kept and what
    autograd returns stays as it was. Layers whose widths are no multiples of 16, which the kernels want, stay too, and
    so does the head. Off CUDA the rounding is emulated: the same results, no gain.

    Raises ValueError without torchao.
    """
    if recipe == "none":
        return
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError:
        raise ValueError(f"train.float8={recipe} needs torchao: pip install 'neox[gpu]'") from None
    config = replace(Float8LinearConfig.from_recipe_name(recipe), emulate=device.type != "cuda")

    def fits(module: nn.Module, name: str) -> bool:
        assert isinstance(module, nn.Linear)
        return module.in_features % 16 == 0 and module.out_features % 16 == 0

    convert_to_float8_training(model.layers, module_filter_fn=fits, config=config)

"""Changes of each block that keep its parameters' names: float8, activation checkpointing, compilation."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from neox.config import Config
from neox.model.decoder import MLP, Block, GPTNeoX
from neox.parallel.mesh import ParallelDims


# Subclasses, not wrapper modules, which would change the parameters' names, and not functions put on the instances,
# each of which a compiler takes for another program.
class CheckpointedMLP(MLP):
    recompute = False

    def forward(self, *args: Any) -> Tensor:
        result: Tensor = checkpoint(super().forward, *args, use_reentrant=False)
        return result


class CheckpointedBlock(Block):
    recompute = False

    def forward(self, *args: Any) -> Tensor:
        result: Tensor = checkpoint(super().forward, *args, use_reentrant=False)
        return result


def checkpoint_blocks(model: GPTNeoX, mode: str) -> None:
    """Recompute activations in the backward pass instead of keeping them; gradients stay the same, bit for bit.

    In widths of the residual stream a token keeps of each block: none 9 (the block's input 1, queries, keys and values
    3, attention's result 1, the MLP's inner values 4), selective 6 (the MLP's input in place of its inner values), full
    1. Selective repeats a third of a block's forward products, full all of them.
    """
    if mode == "none":
        return
    for block in model.layers:
        assert isinstance(block, Block)
        if mode == "full":
            block.__class__ = CheckpointedBlock
            block.mlp.recompute = False
        else:
            block.mlp.__class__ = CheckpointedMLP


def compiles(config: Config, dims: ParallelDims) -> bool:
    """True if the blocks are to be compiled; with "auto" on CUDA, if no axis splits them."""
    if config.train.compile != "auto":
        return config.train.compile
    return dims.device.type == "cuda" and all(dims.size(axis) == 1 for axis in ("tp", "cp", "pp"))


def compile_blocks(model: GPTNeoX) -> None:
    """Compile each block by itself: one graph serves all of them."""
    for block in model.layers:
        block.compile(fullgraph=True)


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
    from neox.system.optional import optional

    torchao = optional("torchao.float8", f"train.float8={recipe}", "gpu")
    config = replace(torchao.Float8LinearConfig.from_recipe_name(recipe), emulate=device.type != "cuda")

    def fits(module: nn.Module, name: str) -> bool:
        assert isinstance(module, nn.Linear)
        return module.in_features % 16 == 0 and module.out_features % 16 == 0

    torchao.convert_to_float8_training(model.layers, module_filter_fn=fits, config=config)

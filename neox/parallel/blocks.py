"""What is done to each block before it is laid out, its parameters' names kept: checkpointing and compilation."""

from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from neox.config import Config
from neox.model.decoder import MLP, Block, GPTNeoX
from neox.parallel.mesh import Layout


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
    """Make the backward pass compute again what was not kept; the gradients are the same, bit for bit.

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


def compiles(config: Config, layout: Layout) -> bool:
    """Whether the blocks are to be compiled: where it is left open, on CUDA, where each of them is whole."""
    if config.train.compile != "auto":
        return config.train.compile
    return layout.device.type == "cuda" and all(layout.size(axis) == 1 for axis in ("tp", "cp", "pp"))


def compile_blocks(model: GPTNeoX) -> None:
    """Compile each block by itself: one graph serves all of them."""
    for block in model.layers:
        block.compile(fullgraph=True)

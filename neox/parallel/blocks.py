"""What is done to each block before it is laid out, its parameters' names kept: checkpointing and compilation."""

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from neox.model import MLP, Block, GPTNeoX


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
        target: nn.Module = block if mode == "full" else block.mlp
        # Not a wrapper module: that would change the parameters' names.
        target.forward = partial(checkpoint, target.forward, use_reentrant=False)
        for module in target.modules():
            if isinstance(module, Block | MLP):
                module.recompute = False


def compile_blocks(model: GPTNeoX) -> None:
    """Compile each block by itself: one graph serves all of them."""
    for block in model.layers:
        block.compile(fullgraph=True)

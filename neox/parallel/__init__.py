"""How a model lies on the processes of a run, and how a step runs through it."""

from neox.parallel.blocks import checkpoint_blocks, compile_blocks, compiles
from neox.parallel.build import ForwardBackward, HeadLoss, build
from neox.parallel.mesh import Layout, layout
from neox.parallel.shard import whole_model

__all__ = [
    "ForwardBackward",
    "HeadLoss",
    "Layout",
    "build",
    "checkpoint_blocks",
    "compile_blocks",
    "compiles",
    "layout",
    "whole_model",
]

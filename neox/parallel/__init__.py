"""How a model lies on the processes of a run, and how a step runs through it."""

from neox.parallel.blocks import checkpoint_blocks, compile_blocks, compiles
from neox.parallel.build import ForwardBackward, build
from neox.parallel.fsdp import whole_model
from neox.parallel.mesh import ParallelDims, parallel_dims

__all__ = [
    "ForwardBackward",
    "ParallelDims",
    "build",
    "checkpoint_blocks",
    "compile_blocks",
    "compiles",
    "parallel_dims",
    "whole_model",
]

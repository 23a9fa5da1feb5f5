"""Parallelism: a model split over the processes of a run, and a step run through it."""

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

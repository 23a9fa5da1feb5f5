"""How a model lies on the processes of a run, and how a step runs through it."""

from neox.parallel.blocks import checkpoint_blocks, compile_blocks, compiles
from neox.parallel.build import ForwardBackward, build
from neox.parallel.fsdp import whole_model
from neox.parallel.mesh import Layout, layout
from neox.parallel.tp_plan import Plan

__all__ = [
    "ForwardBackward",
    "Layout",
    "Plan",
    "build",
    "checkpoint_blocks",
    "compile_blocks",
    "compiles",
    "layout",
    "whole_model",
]

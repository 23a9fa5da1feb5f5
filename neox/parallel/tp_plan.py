"""Tensor parallelism as a table: which module works in which style. Another table may stand in its place.

`parallel.plan="package:function"` names a function that is given the config and returns such a table: patterns of
module names, with * for one component, to torch's ParallelStyle: those of `neox.parallel.tensor`, or others.
"""

import importlib
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from neox.config import Config
from neox.model.decoder import GPTNeoX
from neox.parallel.tensor import (
    ColumnParallel,
    CopiedEmbedding,
    Norm,
    ParallelBranches,
    RowParallel,
    VocabularyEmbedding,
    VocabularyHead,
)

Plan = dict[str, ParallelStyle]


def plan(config: Config) -> Plan:
    """One forward and one backward all-reduce of [B, T, C] a block with a parallel residual, two with a serial one.

    With sequence parallelism reduce-scatter and gather in their place, around norms that see 1 / tp of the tokens.
    """
    split = config.parallel.sequence_parallel
    seam = config.model.use_parallel_residual
    learned: Plan = {"embed_positions": CopiedEmbedding(split)} if config.model.position_embedding == "learned" else {}
    norms = ["input_layernorm"] if config.model.shared_layer_norm else ["input_layernorm", "post_attention_layernorm"]
    return {
        "embed_in": VocabularyEmbedding(split),
        **learned,
        "layers.*": ParallelBranches(split),
        **{f"layers.*.{norm}": Norm(split) for norm in norms},
        "layers.*.attention.query_key_value": ColumnParallel(),  # rows [head, q|k|v, head_dim]: whole heads each
        "layers.*.attention.dense": RowParallel(split, seam),
        "layers.*.mlp.dense_h_to_4h": ColumnParallel(),
        "layers.*.mlp.dense_4h_to_h": RowParallel(split, seam),
        "final_layer_norm": Norm(split, copy=True),
        "embed_out": VocabularyHead(),
    }


def apply_plan(model: GPTNeoX, config: Config, mesh: DeviceMesh) -> None:
    """Lay out the modules of the model, or of a part of it, on a mesh of one axis as the plan says.

    Raises ValueError for a plan that cannot be had, names a module that no model of this config has, or leaves
    parameters out: an optimizer takes none that are not laid out on the mesh.
    """
    name = config.parallel.plan
    table = plan(config) if name is None else _named_plan(name, config)
    if name is not None:
        with torch.device("meta"):
            known = [module for module, _ in GPTNeoX(config.model).named_modules()]
        if unknown := next((p for p in table if not any(matches(module, p) for module in known)), None):
            raise ValueError(f"parallel.plan: {name}: {unknown!r} matches no module of the model")
    modules: list[tuple[str, nn.Module]] = list(model.named_modules())
    for pattern, style in table.items():
        for module_name, module in modules:
            if matches(module_name, pattern):
                parallelize_module(module, mesh, style, src_data_rank=None)
    model.tie()
    plain = next((key for key, value in model.named_parameters() if not isinstance(value, DTensor)), None)
    if plain:
        raise ValueError(f"parallel.plan: {name} leaves {plain} out: give the style of {plain.rpartition('.')[0]!r}")


def matches(name: str, pattern: str) -> bool:
    """Whether a module's name is of a plan's pattern."""
    parts, patterns = name.split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def _named_plan(name: str, config: Config) -> Plan:
    package, colon, attribute = name.partition(":")
    if not (package and colon and attribute):
        raise ValueError(f'parallel.plan: {name!r} must be "package:function"')
    try:
        found: Any = importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f"parallel.plan: {name}: {error}") from None
    function = getattr(found, attribute, None)
    if not callable(function):
        raise ValueError(f"parallel.plan: {package} has no function {attribute}")
    table = function(config)
    if not isinstance(table, dict) or not all(isinstance(style, ParallelStyle) for style in table.values()):
        raise ValueError(f"parallel.plan: {name} must return a dict from patterns to ParallelStyle")
    return table

"""Tensor parallelism as a table: patterns of module names, with * for one component, to styles.

To train by another table, edit the dict that `plan(config)` returns and give it to `neox.Trainer(tp_plan=)`. A style is
one of `neox.parallel.tensor`, or any other ParallelStyle of torch.
"""

from fnmatch import fnmatchcase

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


def apply_plan(model: GPTNeoX, config: Config, mesh: DeviceMesh, table: Plan | None = None) -> None:
    """Lay out the modules of the model, or of a part of it, on a mesh of one axis by `table`, or by `plan(config)`.

    Raises ValueError for a table that names a module that no model of this config has, or that leaves a parameter
    without a style: an optimizer takes none that are not laid out on the mesh.
    """
    if table is not None:
        with torch.device("meta"):
            known = [name for name, _ in GPTNeoX(config.model).named_modules()]
        if unknown := next((p for p in table if not any(matches(name, p) for name in known)), None):
            raise ValueError(f"tensor-parallel plan: {unknown!r} matches no module of the model")
    modules: list[tuple[str, nn.Module]] = list(model.named_modules())
    for pattern, style in (plan(config) if table is None else table).items():
        for name, module in modules:
            if matches(name, pattern):
                parallelize_module(module, mesh, style, src_data_rank=None)
    model.tie()
    plain = next((key for key, value in model.named_parameters() if not isinstance(value, DTensor)), None)
    if plain:
        raise ValueError(f"tensor-parallel plan: {plain} has no style: give one to {plain.rpartition('.')[0]!r}")


def matches(name: str, pattern: str) -> bool:
    """True if a module's name fits a pattern of a plan, in which * stands for one component."""
    parts, patterns = name.split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))

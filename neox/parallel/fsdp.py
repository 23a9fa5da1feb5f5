"""Data parallelism: parameters, gradients and optimizer state sharded over ranks that read different samples."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from neox.config import Config
from neox.model.decoder import GPTNeoX
from neox.parallel.mesh import ParallelDims
from neox.system.device import resolve_dtype


def shard(model: GPTNeoX, config: Config, dims: ParallelDims) -> None:
    """Apply ZeRO by fully_shard, a group per block; nothing where one rank reads all samples.

    Processes that share sequences hold gradients of their own parts, as those that read other samples do: both axes
    count as one here.

    The head is a group of its own. A tied head lies in the root group with the embedding, which stays gathered from
    the model's forward pass to the end of its backward pass. Gradients are added over ranks, not averaged.
    """
    if dims.mesh is None or dims.dp_size * dims.size("cp") == 1:
        return
    # That a norm over two axes takes two messages, torch would say on every process of every run.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    kind = config.train.dtype
    precision = MixedPrecisionPolicy() if kind == "fp32" else MixedPrecisionPolicy(resolve_dtype(kind), torch.float32)
    mesh = dims.mesh["dp_shard"]
    if dims.size("cp") > 1:
        mesh = dims.mesh["dp_shard", "cp"]._flatten("dp_shard_cp")
    if dims.size("dp_replicate") > 1:
        # On a mesh of two axes gradients are reduced twice, over shards and over copies.
        mesh = DeviceMesh._concatenate([dims.mesh["dp_replicate"], mesh])
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": precision,
        "reshard_after_forward": config.parallel.zero == 3,
    }
    groups: list[nn.Module] = [*model.layers]
    if model.embed_out is not None and not config.model.tie_word_embeddings:
        groups.append(model.embed_out)
    for module in groups:
        fully_shard(module, **options)
    fully_shard(model, **options | {"reshard_after_forward": False})
    if model.embed_out is not None:
        register_fsdp_forward_method(model.embed_out, "loss")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Both only reach the module they are called on. Gloo has no scaled sum: hence a plain one.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def reshard(model: GPTNeoX) -> None:
    """Reshard the parameters after a forward pass that no backward pass follows."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def whole_model(parts: Sequence[GPTNeoX], dims: ParallelDims) -> GPTNeoX | None:
    """Gather the whole model on rank 0, None elsewhere; all processes call it together.

    A single process gets its own model back.
    """
    if dims.mesh is None:
        return parts[0]
    for part in parts:
        reshard(part)
    own = {name: parameter for part in parts for name, parameter in part.named_parameters()}
    with torch.device("meta"):
        whole = GPTNeoX(parts[0].config)
    stages = dims.axis("pp")
    owners: list[Any] = [list(own)]
    if stages is not None:
        owners = [None] * dims.size("pp")
        dist.all_gather_object(owners, list(own), group=stages.get_group())
    weights = {}
    for name, blank in whole.named_parameters():
        if name in own:
            value = own[name].detach()
            value = value.full_tensor() if isinstance(value, DTensor) else value
        else:
            value = torch.empty(blank.shape, device=dims.device)
        if stages is not None:
            owner = next(rank for rank, names in enumerate(owners) if name in names)
            value = value.contiguous()
            dist.broadcast(value, group=stages.get_group(), group_src=owner)
        if not dims.processes.rank:
            weights[name] = value
    if dims.processes.rank:
        return None
    whole.load_state_dict(weights, assign=True, strict=not whole.config.tie_word_embeddings)
    whole.tie()
    return whole

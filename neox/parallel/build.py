"""From a config to a model that lies on its devices, and the callable that runs one step's microbatches through it."""

from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from neox.config import Config
from neox.model import GPTNeoX, initial_value
from neox.parallel.blocks import checkpoint_blocks, compile_blocks
from neox.parallel.mesh import Layout
from neox.runtime import resolve_dtype

MicrobatchLoss = Callable[[GPTNeoX, Any], Tensor]
"""(model, batch) -> the batch's loss, a scalar to be differentiated."""
ForwardBackward = Callable[[Sequence[Any]], Tensor]
"""Batches of one step -> the sum of their losses on this process; the gradients are added to the parameters'."""


def build(
    config: Config, layout: Layout, loss: MicrobatchLoss, head_loss: Callable[..., Tensor]
) -> tuple[list[GPTNeoX], ForwardBackward]:
    """The parts of the model that this process holds, initialised, and the callable that runs a step through them.

    `head_loss(head, hidden, ...)` becomes a method of the output head, `model.embed_out.loss(hidden, ...)`: what the
    loss does with the head's weight then counts as its forward pass, for which its shards are gathered.

    Losses are sums: a mean over all tokens is the caller's factor, and gradients are added over processes, not
    averaged.
    """
    with torch.device("meta"):
        model = GPTNeoX(config.model)
    checkpoint_blocks(model, config.train.activation_checkpointing)
    if config.train.compile:
        compile_blocks(model)
    setattr(model.embed_out, "loss", MethodType(head_loss, model.embed_out))  # noqa: B010 (mypy takes it for a tensor)
    if layout.mesh is not None:
        shard(model, config, layout)
    model.to_empty(device=layout.device)
    model.tie()
    _initialize(model, config.train.seed)
    last_only = config.parallel.zero == 1

    def forward_backward(batches: Sequence[Any]) -> Tensor:
        total = torch.zeros((), device=layout.device)
        for number, batch in enumerate(batches, start=1):
            if isinstance(model, FSDPModule) and last_only:
                # One gather and one reduction a step, however many microbatches it takes.
                model.set_requires_gradient_sync(number == len(batches))
                model.set_reshard_after_backward(number == len(batches))
            value = loss(model, batch)
            value.backward()
            total += value.detach()
        return total

    return [model], forward_backward


def shard(model: GPTNeoX, config: Config, layout: Layout) -> None:
    """Split parameters, gradients and optimizer state over the mesh: ZeRO by fully_shard, a group a block.

    The head is a group of its own. A tied head lies in the root group with the embedding, which stays gathered from
    the model's forward pass to the end of its backward pass.
    """
    kind = config.train.dtype
    precision = MixedPrecisionPolicy() if kind == "fp32" else MixedPrecisionPolicy(resolve_dtype(kind), torch.float32)
    assert layout.mesh is not None
    options: dict[str, Any] = {
        # On a mesh of two axes gradients are reduced twice, over shards and over copies.
        "mesh": layout.mesh if config.parallel.dp_replicate > 1 else layout.mesh["dp_shard"],
        "mp_policy": precision,
        "reshard_after_forward": config.parallel.zero == 3,
    }
    groups: list[nn.Module] = [*model.layers]
    if not config.model.tie_word_embeddings:
        groups.append(model.embed_out)
    for module in groups:
        fully_shard(module, **options)
    fully_shard(model, **options | {"reshard_after_forward": False})
    register_fsdp_forward_method(model.embed_out, "loss")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Both only reach the module they are called on. Gloo has no scaled sum: hence a plain one.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def reshard(model: GPTNeoX) -> None:
    """Put the parameters back to shards after a forward pass that no backward pass follows."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def _initialize(model: GPTNeoX, seed: int) -> None:
    """The weights that one process alone would start with. (Random operations on shards repeat on every rank.)"""
    for name, parameter in model.named_parameters():
        value = initial_value(model.config, seed, name, parameter.shape, parameter.device)
        if isinstance(parameter, DTensor):
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(value)

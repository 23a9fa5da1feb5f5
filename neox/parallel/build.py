"""From a config to a model that lies on its devices, and the callable that runs one step's microbatches through it."""

import hashlib
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from neox.config import Config
from neox.model import GPTNeoX, initial_value
from neox.parallel.blocks import checkpoint_blocks, compile_blocks
from neox.parallel.context import split_batch, split_sequences
from neox.parallel.mesh import Layout
from neox.parallel.plan import apply_plan
from neox.parallel.shard import reshard, shard
from neox.runtime import resolve_dtype

HeadLoss = Callable[..., Tensor]
"""(head, hidden [B, T, C], labels [B, T], scale) -> the sum of the tokens' losses times scale, a scalar."""


class ForwardBackward(Protocol):
    def __call__(self, batches: Sequence[Any], scale: float, backward: bool = True) -> Tensor:
        """The sum of the losses, times `scale`, of the batches of all data-parallel ranks, on every process.

        `batches` are this rank's microbatches: tokens, labels, positions [B, T], segments or None, first. With
        `backward` their gradients, summed over the ranks likewise, are added to the parameters'.
        """
        ...


def build(config: Config, layout: Layout, head_loss: HeadLoss) -> tuple[list[GPTNeoX], ForwardBackward]:
    """The parts of the model that this process holds, initialised, and the callable that runs a step through them.

    `head_loss` becomes a method of the output head, `model.embed_out.loss(hidden, labels, scale)`: what the loss does
    with the head's weight then counts as its forward pass, for which its shards are gathered.
    """
    with torch.device("meta"):
        model = GPTNeoX(config.model)
    checkpoint_blocks(model, config.train.activation_checkpointing)
    if config.train.compile:
        compile_blocks(model)
    setattr(model.embed_out, "loss", MethodType(head_loss, model.embed_out))  # noqa: B010 (mypy takes it for a tensor)
    split(model, config, layout)
    shard(model, config, layout)
    model.to_empty(device=layout.device)
    model.tie()
    _initialize(model, config.train.seed)
    return [model], _whole(model, config, layout)


def _whole(model: GPTNeoX, config: Config, layout: Layout) -> ForwardBackward:
    """Without a pipeline: microbatch after microbatch, forward and backward."""
    device, dtype = layout.device, config.train.dtype
    sharded = model if isinstance(model, FSDPModule) else None

    def forward_backward(batches: Sequence[Any], scale: float, backward: bool = True) -> Tensor:
        total = torch.zeros((), device=device)
        for number, batch in enumerate(batches, start=1):
            if sharded is not None and backward and config.parallel.zero == 1:
                # One gather and one reduction a step, however many microbatches it takes.
                sharded.set_requires_gradient_sync(number == len(batches))
                sharded.set_reshard_after_backward(number == len(batches))
            if model.training and any(config.model.dropout):
                seed_dropout(config.train.seed, batch.first)
            if layout.size("cp") > 1:
                batch = split_batch(batch, layout.rank("cp"), layout.size("cp"))
            segments = None if batch.segments is None else batch.segments.to(device)
            with torch.set_grad_enabled(backward):
                with torch.autocast(device.type, resolve_dtype(dtype), enabled=dtype != "fp32"):
                    hidden = model(batch.tokens.to(device), batch.positions.to(device), segments=segments, head=False)
                    loss = model.embed_out.loss(hidden, batch.labels.to(device), scale)  # type: ignore[operator]
                if backward:
                    loss.backward()
            total += loss.detach()
        if not backward:
            reshard(model)
        if layout.mesh is not None:
            # Processes of tensor parallelism have the same loss each: it counts once.
            total *= layout.rank("tp") == 0
            dist.all_reduce(total)
        return total

    return forward_backward


def split(model: GPTNeoX, config: Config, layout: Layout) -> None:
    """Tensor and context parallelism; before `shard`. ValueError where they could not do what one process does."""
    tensor, context = layout.axis("tp"), layout.axis("cp")
    if tensor is None and context is None:
        return
    key = "parallel.tp" if tensor is not None else "parallel.cp"
    if any(config.model.dropout):
        raise ValueError(f"{key}: processes would drop other values than one does: set model's dropouts to 0")
    if config.train.compile:
        raise ValueError(f"{key}: cannot be compiled yet: set train.compile=false")
    if tensor is not None:
        apply_plan(model, config, tensor)
    if context is not None:
        split_sequences(model, context.get_group())


def seed_dropout(seed: int, sample: int) -> None:
    """Set the random state that the microbatch beginning with `sample` drops by.

    Of the data alone: a resumed run drops what the uninterrupted one did, ranks drop apart from each other.
    """
    digest = hashlib.sha256(f"{seed}:dropout:{sample}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little"))


@torch.no_grad()
def _initialize(model: GPTNeoX, seed: int) -> None:
    """The weights that one process alone would start with. (Random operations on shards repeat on every rank.)"""
    for name, parameter in model.named_parameters():
        value = initial_value(model.config, seed, name, parameter.shape, parameter.device)
        if isinstance(parameter, DTensor):
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(value)

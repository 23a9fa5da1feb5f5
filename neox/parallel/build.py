"""Build a model on its devices from a config, and the callable that runs a step's microbatches through it."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from neox.config import Config
from neox.model.decoder import GPTNeoX, initial_value
from neox.parallel.blocks import checkpoint_blocks, compile_blocks, compiles, float8_blocks
from neox.parallel.forward import Forward
from neox.parallel.fsdp import reshard, shard
from neox.parallel.loss import take_loss_in_head
from neox.parallel.mesh import ParallelDims

if TYPE_CHECKING:
    from neox.parallel.tp_plan import Plan


class ForwardBackward(Protocol):
    def __call__(self, batches: Sequence[Any], scale: float, backward: bool = True) -> Tensor:
        """Sum of the losses, times `scale`, of the batches of all data-parallel ranks; the same on every process.

        `batches` are this rank's microbatches: tokens, labels, positions [B, T], segments or None, first. With
        `backward` their gradients, summed over the ranks likewise, are added to the parameters'.
        """
        ...


def build(config: Config, dims: ParallelDims, tp_plan: "Plan | None" = None) -> tuple[list[GPTNeoX], ForwardBackward]:
    """Build the parts of the model of this process, initialised, and the callable that runs a step through them.

    Without a pipeline the model is in one part. The part that has the output head takes the loss there
    (`part.embed_out.loss`). `tp_plan` stands in place of `neox.parallel.tp_plan.plan(config)`.
    """
    forward = Forward(config, dims.device)
    if dims.size("pp") == 1:
        part = _part(config, dims, tp_plan, range(config.model.num_hidden_layers))
        return [part], _summed(_whole(part, config, forward), dims)
    from neox.parallel.pipeline import check_pipeline, layers_of_stages, pipelined, stages_of_rank

    check_pipeline(config, dims)
    layers = layers_of_stages(config)
    stages = stages_of_rank(config.parallel, dims.rank("pp"))
    parts = {stage: _part(config, dims, tp_plan, layers[stage]) for stage in stages}
    return list(parts.values()), _summed(pipelined(parts, config, dims, forward), dims)


def _part(config: Config, dims: ParallelDims, tp_plan: "Plan | None", layers: range) -> GPTNeoX:
    """Build the part of the model that holds `layers`, split and initialised."""
    with torch.device("meta"):
        model = GPTNeoX(config.model)
    model.prune_to_stage(layers)
    float8_blocks(model, config.train.float8, dims.device)
    checkpoint_blocks(model, config.train.activation_checkpointing)
    if compiles(config, dims):
        compile_blocks(model)
    take_loss_in_head(model, config.train.loss_chunk)
    split(model, config, dims, tp_plan)
    shard(model, config, dims)
    model.to_empty(device=dims.device)
    model.tie()
    _initialize(model, config.train.seed)
    return model


def _summed(run_here: Callable[[Sequence[Any], float, bool], Tensor], dims: ParallelDims) -> ForwardBackward:
    """Wrap a local forward/backward so that it returns the loss summed over all processes."""

    def forward_backward(batches: Sequence[Any], scale: float, backward: bool = True) -> Tensor:
        if dims.size("cp") > 1:
            from neox.parallel.context import split_batch

            batches = [split_batch(batch, dims.rank("cp"), dims.size("cp")) for batch in batches]
        total = run_here(batches, scale, backward)
        if dims.rank("tp"):
            # Processes of tensor parallelism have the same loss each: it counts once.
            total = torch.zeros_like(total)
        if dims.processes.world > 1:
            dist.all_reduce(total)
        return total

    return forward_backward


def split(model: GPTNeoX, config: Config, dims: ParallelDims, tp_plan: "Plan | None" = None) -> None:
    """Apply tensor and context parallelism, before `shard`. Raises ValueError for options that they do not support."""
    tensor, context = dims.axis("tp"), dims.axis("cp")
    if tensor is None and context is None:
        return
    key = "parallel.tp" if tensor is not None else "parallel.cp"
    if any(config.model.dropout):
        raise ValueError(f"{key}: processes would drop other values than one does: set model's dropouts to 0")
    if config.train.compile is True:
        raise ValueError(f"{key}: cannot be compiled yet: set train.compile=false")
    if config.train.float8 != "none":
        raise ValueError(f"{key}: does not split float8 layers: set train.float8=none")
    if tensor is not None:
        from neox.parallel.tp_plan import apply_plan

        apply_plan(model, config, tensor, tp_plan)
    if context is not None:
        from neox.parallel.context import split_sequences

        split_sequences(model, context.get_group())


def _whole(model: GPTNeoX, config: Config, forward: Forward) -> Callable[[Sequence[Any], float, bool], Tensor]:
    """Run microbatch after microbatch, forward and backward, without a pipeline."""
    device = forward.device
    sharded = model if isinstance(model, FSDPModule) else None

    def forward_backward(batches: Sequence[Any], scale: float, backward: bool) -> Tensor:
        total = torch.zeros((), device=device)
        for number, batch in enumerate(batches, start=1):
            if sharded is not None and backward and config.parallel.zero == 1:
                # One gather and one reduction a step, however many microbatches it takes.
                sharded.set_requires_gradient_sync(number == len(batches))
                sharded.set_reshard_after_backward(number == len(batches))
            segments = None if batch.segments is None else batch.segments.to(device)
            with torch.set_grad_enabled(backward):
                hidden = forward(model, batch.tokens.to(device), batch.positions.to(device), batch.first, segments)
                loss = forward.loss(model, hidden, batch.labels.to(device), scale)
                if backward:
                    loss.backward()
            total += loss.detach()
        if not backward:
            reshard(model)
        return total

    return forward_backward


@torch.no_grad()
def _initialize(model: GPTNeoX, seed: int) -> None:
    """Fill the weights as one process alone would. (Random operations on shards repeat on every rank.)"""
    for name, parameter in model.named_parameters():
        value = initial_value(model.config, seed, name, parameter.shape, parameter.device)
        if isinstance(parameter, DTensor):
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(value)

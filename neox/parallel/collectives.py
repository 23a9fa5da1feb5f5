"""Differentiable collectives, by Megatron-LM's names: each one's backward pass is its conjugate.

    name                                forward          backward
    copy_to_tensor_region               nothing          all-reduce      a replicated tensor enters split work
    reduce_from_tensor_region           all-reduce       nothing         partial results become a replicated tensor
    gather_from_sequence_region         gather           reduce-scatter  a split sequence becomes whole for split work
    reduce_scatter_to_sequence_region   reduce-scatter   gather          partial results become a split sequence
    gather_from_tensor_region           gather           local slice     split results become a replicated tensor
    copy_parameters_to_tensor_region    nothing          all-reduce      replicated parameters enter split work

The first four are f, g and their sequence-parallel forms (arXiv 1909.08053, 2205.05198). Plain collectives on plain
tensors, because torch's differentiable ones are wrong on gloo or not public.
"""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def copy_to_tensor_region(x: Tensor, group: ProcessGroup) -> Tensor:
    """Return x; its gradient is summed over the processes."""
    return cast(Tensor, _Copy.apply(x, group))


def reduce_from_tensor_region(x: Tensor, group: ProcessGroup) -> Tensor:
    """Sum x over the processes."""
    return cast(Tensor, _Reduce.apply(x, group))


def gather_from_sequence_region(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """Concatenate the processes' x along `dim`; the gradient is summed, and each process takes its slice."""
    return cast(Tensor, _Gather.apply(x, dim, group))


def reduce_scatter_to_sequence_region(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """Slice along `dim`, of this process, of the sum of x over the processes."""
    return cast(Tensor, _ScatterSum.apply(x, dim, group))


def gather_from_tensor_region(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """Concatenate the processes' x along `dim`, for replicated work; each takes its slice of the gradient."""
    return cast(Tensor, _Join.apply(x, dim, group))


def copy_parameters_to_tensor_region(parameters: list[Tensor], group: ProcessGroup) -> tuple[Tensor, ...]:
    """Return the parameters; their gradients are summed over the processes, all in one message."""
    return cast(tuple[Tensor, ...], _Whole.apply(group, *parameters))


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        summed = grads[0].clone(memory_format=torch.contiguous_format)  # others may hold the same gradient
        dist.all_reduce(summed, group=ctx.group)
        return summed, None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        summed = x.clone(memory_format=torch.contiguous_format)  # where a hook looks on, x may not be written to
        dist.all_reduce(summed, group=group)
        return summed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _all_gather(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _reduce_scatter(grads[0], ctx.dim, ctx.group), None, None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _reduce_scatter(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _all_gather(grads[0], ctx.dim, ctx.group), None, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _all_gather(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].chunk(ctx.group.size(), ctx.dim)[ctx.group.rank()], None, None


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: ProcessGroup, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(parameter.view_as(parameter) for parameter in parameters)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        message = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(message, group=ctx.group)
        parts = message.split([grad.numel() for grad in grads])
        return None, *(part.view_as(grad) for part, grad in zip(parts, grads, strict=True))


# torch 2.11 knows only the names that 2.13 calls deprecated.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _all_gather(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    parts = x.new_empty(group.size(), *x.shape)
    _all_gather_single(parts.flatten(0, 1), x.contiguous(), group=group)
    return parts.movedim(0, dim).flatten(dim, dim + 1)


def _reduce_scatter(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    parts = x.unflatten(dim, (group.size(), -1)).movedim(dim, 0).contiguous()
    mine = torch.empty_like(parts[0])
    _reduce_scatter_single(mine, parts.flatten(0, 1), group=group)
    return mine

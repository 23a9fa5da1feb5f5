"""Tensor-parallel styles: forward passes of modules whose matrix is split, for `neox.parallel.tp_plan`.

Shapes: B batch, T time, C hidden, V vocab, n processes of tensor parallelism.

Parameters are distributed tensors, so that clipping, optimizers, fully_shard and checkpoints know the whole tensors.
The work is done on their local parts by plain operations, with one collective wherever a replicated tensor becomes a
split one or the other way round: nothing is left for a dispatcher to decide.
"""

from abc import abstractmethod
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.nn import functional as F

from neox.model.decoder import Block
from neox.parallel import collectives

TIME = 1
"""The dim of [B, T, C] that sequence parallelism splits."""


class Style(ParallelStyle):
    """Split the parameters of a module by `placements`, or replicate them, and replace its forward by `run`."""

    placements: ClassVar[dict[str, Placement]] = {}

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, parameter in list(module.named_parameters(recurse=False)):
            # On the meta device, where there is nothing to send; values come later.
            parts = distribute_tensor(
                parameter, device_mesh, [self.placements.get(name, Replicate())], src_data_rank=None
            )
            module.register_parameter(name, nn.Parameter(parts, parameter.requires_grad))
        module.forward = partial(self.run, module, device_mesh.get_group())
        return module

    @abstractmethod
    def run(self, module: Any, group: ProcessGroup, x: Tensor) -> Tensor:
        """Forward pass of the module with its parameters split."""


class ColumnParallel(Style):
    """A linear layer with 1 / n of the output features. Input whole, output split; no communication."""

    placements: ClassVar = {"weight": Shard(0), "bias": Shard(0)}

    def run(self, module: Any, group: ProcessGroup, x: Tensor) -> Tensor:
        return F.linear(x, *_local(module))


class VocabularyHead(ColumnParallel):
    """The output head with V / n rows; logits are gathered. Training takes its loss without ever joining them."""

    def run(self, module: Any, group: ProcessGroup, x: Tensor) -> Tensor:
        return collectives.gather_from_tensor_region(super().run(module, group, x), -1 % x.dim(), group)


class RowParallel(Style):
    """A linear layer with 1 / n of the input features: each process has a part of the sum that the output is.

    The parts are summed here, and the bias added once, unless `seam` says that `ParallelBranches` does both.
    """

    placements: ClassVar = {"weight": Shard(1)}

    def __init__(self, sequence: bool = False, seam: bool = False) -> None:
        self.sequence, self.seam = sequence, seam

    def run(self, module: Any, group: ProcessGroup, x: Tensor) -> Tensor:
        part = F.linear(x, _local(module)[0])
        return part if self.seam else _summed(part, [module], group, self.sequence)


class ParallelBranches(ParallelStyle):
    """The residual seams of a block: one reduction for both branches, each way.

    `branch_input`: both branches read x, whose gradient is summed over them, then over the processes, once.
    `branch_sum`: the sum of a parallel residual's branches is summed over the processes once, then biases are added.
    With sequence parallelism the norms stand between `branch_input` and the split work, and reduce in its place.
    """

    def __init__(self, sequence: bool = False) -> None:
        self.sequence = sequence

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, Block)
        group = device_mesh.get_group()
        if not self.sequence:
            module.branch_input.__dict__["forward"] = partial(collectives.copy_to_tensor_region, group=group)
        if module.parallel:
            outputs = [module.attention.dense, module.mlp.dense_4h_to_h]
            summed = partial(_summed, modules=outputs, group=group, sequence=self.sequence)
            module.branch_sum.__dict__["forward"] = summed
        return module


class Norm(Style):
    """A layer norm before split work. Its output is whole, the gradient that comes back is a part of a sum.

    Its input is x as a fork, or with `copy` it itself, lets it in; with sequence parallelism 1 / n of the tokens,
    which are gathered after the norm. Its own parameters' gradients are summed over the processes.
    """

    def __init__(self, sequence: bool = False, copy: bool = False) -> None:
        self.sequence, self.copy = sequence, copy

    def run(self, module: Any, group: ProcessGroup, x: Tensor) -> Tensor:
        if self.copy and not self.sequence:
            x = collectives.copy_to_tensor_region(x, group)
        weight, bias = collectives.copy_parameters_to_tensor_region(_local(module), group)
        normed = F.layer_norm(x, module.normalized_shape, weight, bias, module.eps)
        return collectives.gather_from_sequence_region(normed, TIME, group) if self.sequence else normed


class VocabularyEmbedding(Style):
    """An embedding with V / n of the rows; rows of other processes count as zero, and the parts are summed."""

    placements: ClassVar = {"weight": Shard(0)}

    def __init__(self, sequence: bool = False) -> None:
        self.sequence = sequence

    def run(self, module: Any, group: ProcessGroup, x: Tensor) -> Tensor:
        (weight,) = _local(module)
        index = x - group.rank() * len(weight)
        mine = (index >= 0) & (index < len(weight))
        found = F.embedding(torch.where(mine, index, 0), weight) * mine[..., None]
        return _summed(found, [], group, self.sequence)


class CopiedEmbedding(Style):
    """A replicated embedding, such as that of positions; with sequence parallelism for the local tokens only."""

    def __init__(self, sequence: bool = False) -> None:
        self.sequence = sequence

    def run(self, module: Any, group: ProcessGroup, x: Tensor) -> Tensor:
        (weight,) = _local(module)
        if self.sequence:
            x = x.chunk(group.size(), TIME)[group.rank()]
            (weight,) = collectives.copy_parameters_to_tensor_region([weight], group)
        return F.embedding(x, weight)


def _summed(part: Tensor, modules: list[Any], group: ProcessGroup, sequence: bool) -> Tensor:
    """Sum of `part` over the processes, with the biases of `modules` added once; with `sequence` the local tokens."""
    biases = [_part(module.bias) for module in modules if module.bias is not None]
    if not sequence:
        x = collectives.reduce_from_tensor_region(part, group)
    else:
        x = collectives.reduce_scatter_to_sequence_region(part, TIME, group)
        biases = list(collectives.copy_parameters_to_tensor_region(biases, group)) if biases else []
    for bias in biases:
        x = x + bias
    return x


def _local(module: nn.Module) -> list[Tensor]:
    """The local parts of a module's own parameters: weight, then bias if there is one."""
    return [_part(parameter) for parameter in module.parameters(recurse=False)]


def _part(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter

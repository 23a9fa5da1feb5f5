"""Tensor-parallel inference: each process keeps its shard of every matrix, as plain tensors.

The plan is training's, without distributed tensors, which only training needs.
"""

from collections.abc import Callable

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

from neox.config import Config
from neox.model.decoder import GPTNeoX
from neox.parallel.tp_plan import apply_plan, matches, plan


def sharing(mesh: DeviceMesh) -> Callable[[str, nn.Module], nn.Module]:
    """(name, layer) -> the layer with this process's share alone, for `checkpoint.load(transform=)`: memory never holds
    more than the shares and one whole layer. `share` does what that leaves."""
    table = plan(Config())  # where a matrix is cut does not depend on the config

    def keep_share(name: str, module: nn.Module) -> nn.Module:
        style = next((style for pattern, style in table.items() if matches(name, pattern)), None)
        return parallelize_module(module, mesh, style, src_data_rank=None) if style else module

    return keep_share


def share(model: GPTNeoX, config: Config, mesh: DeviceMesh) -> GPTNeoX:
    """Shard every parameter of the model in place for tensor-parallel inference (already sharded ones stay)."""
    apply_plan(model, config, mesh)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            assert isinstance(parameter, DTensor)
            module.register_parameter(name, nn.Parameter(parameter.to_local(), requires_grad=False))
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
    model.tie()
    return model

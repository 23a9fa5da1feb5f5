"""What a step says of the model's parts: the norms of their gradients and of their parameters."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from neox.model import GPTNeoX

PARTS = ("embedding", "attention", "mlp", "norms", "head")


def part_of(name: str) -> str:
    """The one of `PARTS` that the parameter `name` belongs to; a tied head's weight is the embedding's."""
    if "norm" in name:
        return "norms"
    if name.startswith("embed_"):
        return "head" if name.startswith("embed_out.") else "embedding"
    return "attention" if ".attention." in name else "mlp"


@torch.no_grad()
def norms(model: GPTNeoX, loss_scale: float = 1.0) -> dict[str, float]:
    """L2 norms of the gradients, divided by `loss_scale`, and of the parameters, of each part that has any.

    Keys are gradient_norms/PART and parameter_norms/PART, the prefixes as in gpt-neox. The squares of the former sum
    up to that of the global gradient norm. All of it comes to the host in one copy.
    """
    tensors: dict[str, list[Tensor]] = {
        f"{kind}_norms/{part}": [] for kind in ("gradient", "parameter") for part in PARTS
    }
    for name, parameter in model.named_parameters():
        part = part_of(name)
        tensors[f"parameter_norms/{part}"].append(parameter)
        if parameter.grad is not None:
            tensors[f"gradient_norms/{part}"].append(parameter.grad)
    tensors = {key: members for key, members in tensors.items() if members}
    each = torch.stack(torch._foreach_norm([tensor for members in tensors.values() for tensor in members]))
    if isinstance(each, DTensor):
        each = each.full_tensor()
    found = torch.stack([part.norm() for part in each.split([len(members) for members in tensors.values()])]).tolist()
    return {
        key: norm / loss_scale if key.startswith("gradient") else norm for key, norm in zip(tensors, found, strict=True)
    }

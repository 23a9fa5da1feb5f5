"""What a step says of the model's parts: the norms of their gradients and of their parameters."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from neox.parallel import Layout

PARTS = ("embedding", "attention", "mlp", "norms", "head")


def part_of(name: str) -> str:
    """The one of `PARTS` that the parameter `name` belongs to; a tied head's weight is the embedding's."""
    if "norm" in name:
        return "norms"
    if name.startswith("embed_"):
        return "head" if name.startswith("embed_out.") else "embedding"
    return "attention" if ".attention." in name else "mlp"


@torch.no_grad()
def norms(parts: Iterable[nn.Module], loss_scale: float = 1.0, layout: Layout | None = None) -> dict[str, float]:
    """L2 norms of the gradients, divided by `loss_scale`, and of the parameters, of each part that has any.

    Keys are gradient_norms/PART and parameter_norms/PART, the prefixes as in gpt-neox. The squares of the former sum
    up to that of the global gradient norm. All of it comes to the host in one copy. `parts` are those of the model
    that are here; the norms are those of the whole model, over all stages of `layout`.
    """
    tensors: dict[str, list[Tensor]] = {
        f"{kind}_norms/{part}": [] for kind in ("gradient", "parameter") for part in PARTS
    }
    for name, parameter in (named for part in parts for named in part.named_parameters()):
        part = part_of(name)
        tensors[f"parameter_norms/{part}"].append(parameter)
        if parameter.grad is not None:
            tensors[f"gradient_norms/{part}"].append(parameter.grad)
    each = torch.stack(torch._foreach_norm([tensor for members in tensors.values() for tensor in members]))
    if isinstance(each, DTensor):
        each = each.full_tensor()
    sizes = [len(members) for members in tensors.values()]
    squares = torch.stack([(group.double() ** 2).sum() for group in each.split(sizes)])
    # Beside each sum how many it is of: a part may lie on other stages altogether.
    found = torch.stack((squares, torch.tensor(sizes, dtype=squares.dtype, device=squares.device)))
    if layout is not None:
        found = layout.sum_over_stages(found)
    return {
        key: square**0.5 / (loss_scale if key.startswith("gradient") else 1.0)
        for key, square, members in zip(tensors, *found.tolist(), strict=True)
        if members
    }

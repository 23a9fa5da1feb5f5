"""L2 norms of gradients, parameters and updates, by component of the model."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from neox.parallel.mesh import ParallelDims

PARTS = ("embedding", "attention", "mlp", "norms", "head")


def part_of(name: str) -> str:
    """Component of `PARTS` that the parameter `name` belongs to; a tied head's weight is the embedding's."""
    if "norm" in name:
        return "norms"
    if name.startswith("embed_"):
        return "head" if name.startswith("embed_out.") else "embedding"
    return "attention" if ".attention." in name else "mlp"


def norms(
    model_parts: Iterable[nn.Module], loss_scale: float = 1.0, dims: ParallelDims | None = None
) -> dict[str, float]:
    """L2 norms of the gradients, divided by `loss_scale`, and of the parameters, of each part that has any.

    Keys are gradient_norms/PART and parameter_norms/PART, the prefixes as in gpt-neox. The squares of the former sum
    up to that of the global gradient norm. `model_parts` are those of this process; the norms are those of the whole
    model, over all stages of `dims`.
    """
    tensors: dict[str, list[Tensor]] = {
        f"{kind}_norms/{part}": [] for kind in ("gradient", "parameter") for part in PARTS
    }
    for name, parameter in _named(model_parts):
        part = part_of(name)
        tensors[f"parameter_norms/{part}"].append(parameter.detach())
        if parameter.grad is not None:
            tensors[f"gradient_norms/{part}"].append(parameter.grad)
    found = _norms(tensors, dims)
    return {key: value / (loss_scale if key.startswith("gradient") else 1.0) for key, value in found.items()}


def copies(model_parts: Iterable[nn.Module]) -> list[Tensor]:
    """Copy the parameters before an update, for `update_norms`."""
    return [parameter.detach().clone() for _, parameter in _named(model_parts)]


def update_norms(
    model_parts: Iterable[nn.Module], before: Iterable[Tensor], dims: ParallelDims | None = None
) -> dict[str, float]:
    """L2 norms of an update of the parameters of each part, under update_norms/PART; otherwise as `norms`.

    `before` comes from `copies`; it is overwritten.
    """
    tensors: dict[str, list[Tensor]] = {f"update_norms/{part}": [] for part in PARTS}
    for (name, parameter), old in zip(_named(model_parts), before, strict=True):
        tensors[f"update_norms/{part_of(name)}"].append(old.sub_(parameter.detach()))
    return _norms(tensors, dims)


def _named(model_parts: Iterable[nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    return (named for part in model_parts for named in part.named_parameters())


@torch.no_grad()
def _norms(tensors: Mapping[str, list[Tensor]], dims: ParallelDims | None) -> dict[str, float]:
    """Norm of each non-empty list of tensors, over all stages, in one copy to the host."""
    each = torch.stack(torch._foreach_norm([tensor for members in tensors.values() for tensor in members]))
    if isinstance(each, DTensor):
        each = each.full_tensor()
    sizes = [len(members) for members in tensors.values()]
    squares = torch.stack([(group.double() ** 2).sum() for group in each.split(sizes)])
    # Beside each sum how many it is of: a part may lie on other stages altogether.
    found = torch.stack((squares, torch.tensor(sizes, dtype=squares.dtype, device=squares.device)))
    if dims is not None:
        found = dims.sum_over_stages(found)
    return {key: square**0.5 for key, square, members in zip(tensors, *found.tolist(), strict=True) if members}

"""Optimizers: AdamW with gpt-neox's decay groups, Muon for the blocks' matrices."""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from neox.config import OptimConfig
from neox.model.decoder import GPTNeoX
from neox.model.mup import scaling
from neox.parallel.mesh import ParallelDims
from neox.system.device import readable


def build_optimizers(model_parts: Iterable[GPTNeoX], config: OptimConfig) -> list[torch.optim.Optimizer]:
    """AdamW over everything, or Muon over the blocks' matrices and AdamW over the rest, of a model's parts.

    Weight decay is decoupled and spares layer norms and biases, as in gpt-neox; embeddings and the head do decay.
    Under muP, AdamW's rate, decay and eps follow the width (`neox.model.mup`); Muon's do so by themselves.
    Every group carries `peak_lr`, which `set_lr` scales. Their state is there from the beginning, zeros: a checkpoint
    holds the same tensors at every step, the first and a skipped one too.
    """
    muon: list[Tensor] = []
    adamw: dict[tuple[float, float, float], list[Tensor]] = defaultdict(list)  # by peak rate, decay and eps
    for part in model_parts:
        for name, parameter in part.named_parameters():
            spared = name.endswith("bias") or "norm" in name
            if config.name == "muon" and name.startswith("layers.") and not spared:
                muon.append(parameter)
                continue
            factor = scaling(part.config, name)
            decay = 0.0 if spared else config.weight_decay * factor.decay
            adamw[config.lr * factor.lr, decay, config.eps * factor.eps].append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": parameters, "lr": lr, "peak_lr": lr, "weight_decay": decay, "eps": eps}
        for (lr, decay, eps), parameters in adamw.items()
    ]
    built: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, betas=config.betas, fused=True)]
    if muon:
        group = {"params": muon, "peak_lr": config.muon_lr}
        built.append(Muon([group], lr=config.muon_lr, momentum=config.muon_momentum, weight_decay=config.weight_decay))
    for optimizer in built:
        for options in optimizer.param_groups:
            for parameter in options["params"]:
                optimizer.state[parameter] = _zero_state(optimizer, options, parameter)
    return built


def _zero_state(optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: Tensor) -> dict[str, Tensor]:
    """State that an optimizer begins its first update with."""
    if isinstance(optimizer, Muon):
        return {"momentum_buffer": torch.zeros_like(parameter)}
    # torch's fused kernel wants the step counter beside the parameter, the others on the CPU.
    step = torch.zeros((), device=parameter.device if group["fused"] else "cpu")
    return {"step": step, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}


def clip_gradients(
    model_parts: Iterable[nn.Module], limit: float, loss_scale: float = 1.0, dims: ParallelDims | None = None
) -> Tensor:
    """Divide all gradients by `loss_scale`, and scale them so that their global L2 norm is at most `limit` (0: none).

    `model_parts` are those of the model that are here; the norm is that of the whole model, over all stages of `dims`.

    Returns the norm of the divided gradients before the limit. Where it is not finite, on an overflow, they are left
    as they are. Both factors are one multiplication, min(1, limit / (norm + 1e-6)) / loss_scale, as in gpt-neox; with
    `loss_scale` 1 this is torch's clip_grad_norm_. On a CPU, where looking at the norm costs nothing, gradients within
    the limit are left alone instead of being multiplied by one.
    """
    parameters = [p for part in model_parts for p in part.parameters() if p.grad is not None]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if dims is not None and dims.size("pp") > 1:
        norm = dims.sum_over_stages(norm.double() ** 2).sqrt().float()
    if loss_scale != 1.0:
        norm = norm / loss_scale
        if norm.isfinite():
            factor = min(1.0, limit / (norm.item() + 1e-6)) if limit else 1.0
            torch._foreach_mul_(gradients, factor / loss_scale)
    elif limit and (not readable(norm) or norm > limit):
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


def set_lr(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor


class Muon(torch.optim.Muon):
    """torch's Muon (same arguments, same state) with its Newton-Schulz iteration batched and, off CUDA, in float32.

    torch computes it in bfloat16 one matrix at a time. Without AVX-512 or AMX a bfloat16 product runs 5 to 400 times
    slower than a float32 one, and small matrices keep a processor busy only together.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            same_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    same_shape[parameter.shape].append(parameter)
            for shape, parameters in same_shape.items():
                updates = []
                for parameter in parameters:
                    assert parameter.grad is not None
                    state = self.state[parameter]
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = torch.zeros_like(parameter)
                    momentum = state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
                    updates.append(parameter.grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum)
                update = orthogonalize(torch.stack(updates), group["ns_coefficients"], group["ns_steps"], group["eps"])
                if group["adjust_lr_fn"] == "match_rms_adamw":
                    scale = 0.2 * math.sqrt(max(shape))  # Liu et al. 2025: AdamW's learning rates serve
                else:
                    # Keller Jordan's: the update's RMS does not depend on how far the matrix is from square.
                    scale = math.sqrt(max(1, shape[0] / shape[1]))
                for parameter, direction in zip(parameters, update.unbind(), strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(direction.to(parameter.dtype), alpha=-group["lr"] * scale)
        return loss


def orthogonalize(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Matrices [N, rows, columns] with their singular values s replaced by about one, singular vectors kept.

    `steps` times s <- a s + b s^3 + c s^5, after scaling by the Frobenius norm (Jordan et al. 2024, "Muon").
    """
    a, b, c = coefficients
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    wide = x if x.shape[1] <= x.shape[2] else x.mT
    wide = wide / wide.flatten(1).norm(dim=1).clamp(min=eps)[:, None, None]
    for _ in range(steps):
        gram = wide @ wide.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        wide = torch.baddbmm(wide, polynomial, wide, beta=a)
    return wide if x.shape[1] <= x.shape[2] else wide.mT

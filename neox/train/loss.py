"""The language-modelling loss, taken over the head in chunks so that the full [tokens, vocab] logits never exist.

Shapes: C hidden, V vocab.
"""

from typing import Any

import torch
from torch import Tensor

from neox.data.loader import IGNORED


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the cross entropies; both gradients are taken during the forward pass, while a chunk's logits exist.

    With z = h W^T + b and p = softmax(z): d loss / d z = p - onehot(label), d loss / d h = (p - onehot) W,
    d loss / d W = (p - onehot)^T h. Three matmuls a chunk, the same as without chunks, and nothing is recomputed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        chunk: int,
        scale: float,
        dtype: torch.dtype,
        learning: bool,
    ) -> Tensor:
        # needs_input_grad says what requires a gradient, also where none is being recorded.
        need_hidden, need_weight, need_bias = (learning and need for need in ctx.needs_input_grad[:3])
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight) if need_weight else None
        grad_bias = torch.zeros_like(bias) if bias is not None and need_bias else None
        total = hidden.new_zeros((), dtype=torch.float32)
        matrix = weight.to(dtype)
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            h, target = hidden[part].to(dtype), labels[part]
            counted = target != IGNORED
            # Only the ignored label is replaced: any other that is no token fails in gather instead of counting as 0.
            index = torch.where(counted, target, 0)[:, None]
            logits = (h @ matrix.t()).float()
            if bias is not None:
                logits += bias
            logits -= logits.amax(dim=-1, keepdim=True)
            picked = logits.gather(1, index)
            norm = logits.exp_().sum(dim=-1, keepdim=True)
            total += ((norm.log() - picked).squeeze(1) * counted).sum() * scale
            if not (need_hidden or need_weight or need_bias):
                continue
            factor = counted[:, None] * scale
            logits *= factor / norm
            logits.scatter_add_(1, index, -factor.to(logits.dtype))
            grad_logits = logits.to(dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad_logits @ matrix
            if grad_weight is not None:
                if dtype == grad_weight.dtype:
                    grad_weight.addmm_(grad_logits.t(), h)  # no second buffer of the head's size
                else:
                    grad_weight += grad_logits.t() @ h
            if grad_bias is not None:
                grad_bias += logits.sum(dim=0)
        # Attributes, not save_for_backward: with one owner autograd adopts the head's gradient instead of copying it.
        ctx.gradients = [grad_hidden, grad_weight, grad_bias]
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the loss was differentiated before: its gradients are given away once")
        for i, gradient in enumerate(gradients):
            gradients[i] = None if gradient is None else gradient.mul_(grads[0])
        gradient = None
        return (gradients.pop(0), gradients.pop(0), gradients.pop(0), None, None, None, None, None)


def cross_entropy(
    hidden: Tensor, head: torch.nn.Linear, labels: Tensor, *, chunk: int = 512, scale: float = 1.0
) -> Tensor:
    """Sum over all tokens of -log p(label), in float32, times `scale`; a scalar that can be differentiated once.

    hidden [..., C] are the model's final states (`head=False`), labels [...] are token ids, -100 where no loss is
    taken. `scale` is applied before the gradients are formed, so a mean costs no extra pass: pass 1 / valid tokens.
    Under autocast the products run in its type; statistics, loss and the accumulated gradients stay float32.
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    with torch.autocast(kind, enabled=False):
        return _ChunkedCrossEntropy.apply(
            hidden.reshape(-1, hidden.shape[-1]),
            head.weight,
            head.bias,
            labels.reshape(-1),
            chunk,
            scale,
            dtype,
            torch.is_grad_enabled(),
        )

"""The language-modelling loss, taken over the head in chunks: the full [tokens, vocab] logits never exist.

Shapes: B batch, T time, N tokens, C hidden, V vocab.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from neox.model import IGNORED
from neox.model.decoder import GPTNeoX
from neox.parallel.collectives import gather_from_sequence_region
from neox.system.device import readable


class LossHead(torch.nn.Linear):
    """The output head as training uses it: it also takes the loss, `chunk` tokens at a time.

    A method of the head, not a function beside it, so that fully_shard gathers the head's weight for it as it does for
    a forward pass (`register_fsdp_forward_method`).
    """

    chunk = 512

    def loss(self, hidden: Tensor, labels: Tensor, scale: float) -> Tensor:
        """Sum of the cross entropies of labels [B, T] under states [B, T, C], times `scale`; a scalar."""
        return cross_entropy(hidden, self, labels, chunk=self.chunk, scale=scale)


def take_loss_in_head(model: GPTNeoX, chunk: int) -> None:
    """Turn the output head, of a part of the model that has it, into a `LossHead`; its parameters keep their names."""
    if (head := model.embed_out) is not None:
        head.__class__ = LossHead
        assert isinstance(head, LossHead)
        head.chunk = chunk


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the cross entropies; both gradients are taken during the forward pass, while a chunk's logits exist.

    With z = h W^T + b and p = softmax(z): d loss / d z = p - onehot(label), d loss / d h = (p - onehot) W,
    d loss / d W = (p - onehot)^T h. Three matmuls a chunk, the same as without chunks, and nothing is recomputed.
    The mean's factor and the mask are put on h and d h, [N, C], so that the [chunk, V] buffer is passed over as seldom
    as can be: the product, log-softmax and exp in place, two products.
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
        group: ProcessGroup | None,
    ) -> Tensor:
        # needs_input_grad says what requires a gradient, also where none is being recorded.
        need_hidden, need_weight, need_bias = (learning and need for need in ctx.needs_input_grad[:3])
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        # Written by the first chunk, added to by the others.
        grad_weight = torch.empty_like(weight, dtype=torch.float32) if need_weight and len(hidden) else None
        grad_bias = torch.zeros_like(bias) if bias is not None and need_bias else None
        total = hidden.new_zeros((), dtype=torch.float32)
        matrix, states = weight.to(dtype), hidden.to(dtype)
        rows = min(chunk, len(hidden))
        # One buffer for all chunks: fresh pages for each would cost a quarter of the product's speed.
        product = torch.empty((rows, len(matrix)), dtype=dtype, device=hidden.device)
        # On a CPU a few rows at a time stay in the caches between the softmax and the exponential.
        rows_at_once = 16 if hidden.device.type == "cpu" else rows
        for part in slices(len(hidden), chunk):
            h, target = states[part], labels[part]
            counted = target != IGNORED
            factor = counted[:, None] * scale
            # Only the ignored label is replaced: any other that is no token fails in gather instead of counting as 0.
            index = torch.where(counted, target, 0)[:, None]
            logits = torch.mm(h, matrix.t(), out=product[: len(h)]).float()
            if bias is not None:
                logits += bias
            learn = need_hidden or need_weight or need_bias
            if group is not None:
                total -= (_split_error(logits, index, group) * factor[:, 0]).sum()
            else:
                for block in slices(len(h), rows_at_once):
                    log_p, at = torch.log_softmax(logits[block], dim=-1, out=logits[block]), index[block]
                    total -= (log_p.gather(1, at) * factor[block]).sum()
                    if learn:
                        log_p.exp_().scatter_add_(1, at, torch.full_like(at, -1.0, dtype=log_p.dtype))
            if not learn:
                continue
            error = logits  # p - onehot(label), by now
            grad_logits = error.to(dtype)
            if grad_hidden is not None:
                torch.mul(torch.mm(grad_logits, matrix), factor, out=grad_hidden[part])
            if grad_weight is not None:
                h = h * factor.to(dtype)
                if dtype == grad_weight.dtype:
                    grad_weight.addmm_(grad_logits.t(), h, beta=1 if part.start else 0)  # no second buffer of this size
                elif part.start:
                    grad_weight += grad_logits.t() @ h
                else:
                    grad_weight.copy_(grad_logits.t() @ h)
            if grad_bias is not None:
                grad_bias += (factor.t() @ error)[0]
        # Attributes, not save_for_backward: with one owner autograd adopts the head's gradient instead of copying it.
        ctx.gradients = [grad_hidden, grad_weight, grad_bias]
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.gradients
        if gradients is None:
            raise RuntimeError("the loss was differentiated before: its gradients are given away once")
        if torch._C._autograd._get_current_graph_task_keep_graph():
            # Pipelines that split the backward pass come back for the weight's gradient.
            return (*(None if g is None else g * grads[0] for g in gradients), *(None,) * 6)
        ctx.gradients = None
        if not readable(grads[0]) or grads[0] != 1:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(grads[0])
            gradient = None
        return (gradients.pop(0), gradients.pop(0), gradients.pop(0), *(None,) * 6)


def _split_error(logits: Tensor, index: Tensor, group: ProcessGroup) -> Tensor:
    """log p(label) [N] over all columns, where `logits` [N, V / n] are this process's; they become p - onehot(label).

    Three numbers a token go to all processes, in one message: the largest logit here, the sum of exp(logit - largest)
    and the label's logit, zero where it is another's.
    """
    columns = logits.shape[1]
    last = columns * group.size() - 1
    torch._assert_async(((index >= 0) & (index <= last)).all(), "a label is no token")
    at = index - group.rank() * columns
    mine = (at >= 0) & (at < columns)
    at = torch.where(mine, at, 0)
    label = logits.gather(1, at) * mine
    largest = logits.amax(dim=1, keepdim=True)
    logits.sub_(largest).exp_()
    own = torch.cat((largest, logits.sum(dim=1, keepdim=True), label), dim=1)
    found = gather_from_sequence_region(own, 0, group).unflatten(0, (group.size(), -1))
    largest_of_all = found[:, :, 0].amax(dim=0)
    total = (found[:, :, 1] * (found[:, :, 0] - largest_of_all).exp()).sum(dim=0)
    logits.mul_(((largest[:, 0] - largest_of_all).exp() / total)[:, None])
    logits.scatter_add_(1, at, -mine.to(logits.dtype))
    return found[:, :, 2].sum(dim=0) - largest_of_all - total.log()


def slices(length: int, size: int) -> Iterator[slice]:
    """0 .. length in consecutive slices of `size`; the last one may be shorter."""
    return (slice(start, start + size) for start in range(0, length, size))


def cross_entropy(
    hidden: Tensor, head: torch.nn.Linear, labels: Tensor, *, chunk: int = 512, scale: float = 1.0
) -> Tensor:
    """Sum over all tokens of -log p(label), in float32, times `scale`; a scalar that can be differentiated once.

    hidden [..., C] are the model's final states (`head=False`), labels [...] are token ids, -100 where no loss is
    taken. `scale` is applied before the gradients are formed, so a mean costs no extra pass: pass 1 / valid tokens.
    Under autocast the products run in its type; statistics, loss and the accumulated gradients stay float32.

    Where a head's weight is a distributed tensor its rows, the vocabulary, are split over processes that call this
    together with the same states. All get the whole sum; the gradient for `hidden` is a part of a sum over them.
    """
    weight: Tensor = head.weight
    bias: Tensor | None = head.bias
    group = None
    if isinstance(weight, DTensor):
        group = weight.device_mesh.get_group()
        weight, bias = weight.to_local(), bias.to_local() if isinstance(bias, DTensor) else None
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    with torch.autocast(kind, enabled=False):
        return _ChunkedCrossEntropy.apply(
            hidden.reshape(-1, hidden.shape[-1]),
            weight,
            bias,
            labels.reshape(-1),
            chunk,
            scale,
            dtype,
            torch.is_grad_enabled(),
            group,
        )

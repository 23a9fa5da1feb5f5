"""Log-probabilities of a text's tokens, with overlapping windows for long texts."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


@torch.inference_mode()
def token_logprobs(
    logits_of: Callable[[Tensor], Tensor],
    tokens: Sequence[int],
    window: int,
    stride: int | None = None,
    batch: int = 8,
    first: int | None = None,
) -> Tensor:
    """Natural log-probability of each token given up to `window` tokens before it; float32 [len(tokens)].

    Windows start every `stride` tokens (default: half a window) and each token is scored once, in the first window that
    reaches it: all but the first window give at least window - stride tokens of context. `logits_of` maps tokens
    [B, T] to logits [B, T, V] (our model, or any other: the figures are then comparable). `first` is a token put in
    front, that the first one is predicted from; without it the first log-probability is nan.
    """
    stride = stride or max(1, window // 2)
    if not 1 <= stride <= window:
        raise ValueError(f"stride {stride} must be between 1 and the window's {window} tokens")
    ids = torch.tensor(list(tokens) if first is None else [first, *tokens])
    scores = torch.full((max(0, len(ids) - 1),), math.nan)
    starts = list(range(0, max(1, len(ids) - 1 - (window - stride)), stride)) if len(scores) else []
    for i in range(0, len(starts), batch):
        group = starts[i : i + batch]
        # Right padding is harmless under causal attention; the padded positions are not read.
        rows = torch.zeros((len(group), window + 1), dtype=torch.long)
        for row, start in zip(rows, group, strict=True):
            part = ids[start : start + window + 1]
            row[: len(part)] = part
        width = min(window, len(ids) - 1 - group[0])
        logits = logits_of(rows[:, :width]).float()
        scored = logits.log_softmax(dim=-1).gather(-1, rows[:, 1 : width + 1, None].to(logits.device))[..., 0].cpu()
        for row, start in zip(scored, group, strict=True):
            skip = 0 if start == 0 else window - stride
            part = row[skip : len(ids) - 1 - start]
            scores[start + skip : start + skip + len(part)] = part
    return scores if first is not None else torch.cat((torch.tensor([math.nan])[: len(ids)], scores))


def bits_per_byte(logprobs: Tensor, num_bytes: int) -> float:
    """-sum(log2 p) / bytes of the scored text; tokens without a prediction (nan) are an error of the caller."""
    assert not logprobs.isnan().any(), "a token without a prediction has no bits"
    return -logprobs.double().sum().item() / math.log(2) / num_bytes

"""From logits to a token: greedy, temperature, top-k, top-p, reproducible by seed.

Shapes: V vocab.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How to continue a prompt. ValueError for values that make no sense."""

    max_tokens: int = 128  # new tokens, at most
    temperature: float = 1.0  # divides the logits; 0 takes the most likely token
    top_k: int = 0  # sample from the k most likely tokens; 0: from all
    top_p: float = 1.0  # sample from the smallest set of most likely tokens that holds this probability
    seed: int = 1234
    stop_at_eod: bool = True  # end at the end-of-document token, which is then left out

    def __post_init__(self) -> None:
        for name, good, rule in (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
        ):
            if not good:
                raise ValueError(f"generate.{name} = {getattr(self, name)} must be {rule}")


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities [V] that a token is drawn with from logits [V], in float32: temperature, then top-k, then top-p.

    Ties at the border of top-k are kept; top-p keeps a token while the ones before it hold less than p.
    """
    logits = logits.float()
    if sampling.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(), logits.numel()).float()
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.numel():
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[-1], float("-inf"))
    probabilities = logits.softmax(dim=-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(descending=True, stable=True)
        before = ordered.cumsum(dim=-1) - ordered
        probabilities[order[before >= sampling.top_p]] = 0
        probabilities /= probabilities.sum()
    return probabilities


class Sampler:
    """Draws the tokens of one sequence with its own random stream, so that its neighbours in a batch do not matter."""

    def __init__(self, sampling: Sampling, usable: int) -> None:
        """`usable` is how many rows of the vocabulary stand for tokens; padding rows beyond are never drawn."""
        self.sampling, self.usable = sampling, usable
        self.generator = torch.Generator().manual_seed(sampling.seed)

    def __call__(self, logits: Tensor) -> int:
        """The next token for logits [V]."""
        logits = logits[: self.usable]
        if self.sampling.temperature == 0:
            return int(logits.argmax())
        probabilities = distribution(logits, self.sampling).cpu()
        # argmax of p / Exp(1) is distributed as p (the exponential race); zero-probability tokens never win it.
        noise = torch.empty_like(probabilities).exponential_(generator=self.generator)
        return int((probabilities / noise).argmax())

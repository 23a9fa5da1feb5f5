"""From logits to a token: repetition penalty, temperature, top-k, top-p, min-p, reproducible by seed.

The filters and their order are those of Hugging Face transformers. Shapes: V vocab.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neox.config import GenerateConfig


@dataclass(frozen=True)
class Sampling:
    """How to continue a prompt. ValueError for values that make no sense."""

    max_tokens: int = 128  # new tokens, at most
    temperature: float = 1.0  # divides the logits; 0 takes the most likely token
    top_k: int = 0  # sample from the k most likely tokens; 0: from all
    top_p: float = 1.0  # sample from the smallest set of most likely tokens that holds this probability
    seed: int = 1234
    stop_at_eod: bool = True  # end at the end-of-document token, which is then left out
    repetition_penalty: float = 1.0  # above 1: tokens of the prompt and of the output so far become less likely
    min_p: float = 0.0  # sample from tokens at least this fraction as likely as the most likely one
    stop: Sequence[str] = ()  # end before the first of these strings in the output
    logprobs: int | None = None  # record each token's log-probability and those of so many alternatives
    prompt_logprobs: int | None = None  # the same for the prompt's tokens, all but the first

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        for name, good, rule in (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0"),
            ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
            ("stop", all(self.stop), "strings that are not empty"),
            ("logprobs", self.logprobs is None or self.logprobs >= 0, "none, or 0 or more"),
            ("prompt_logprobs", self.prompt_logprobs is None or self.prompt_logprobs >= 0, "none, or 0 or more"),
        ):
            if not good:
                raise ValueError(f"generate.{name} = {getattr(self, name)} must be {rule}")

    @classmethod
    def of(cls, config: GenerateConfig) -> "Sampling":
        """The sampling options of a config's section `generate`."""
        return cls(**config.model_dump(exclude={"n", "slots"}))


def penalized(logits: Tensor, penalty: float, seen: Tensor) -> Tensor:
    """Logits [V] with those of `seen` tokens (bool [V]) divided by `penalty` where positive, else multiplied by it.

    Keskar et al. 2019 (CTRL), section 4.1, as transformers has it: once per token, however often it was seen.
    """
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def distribution(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """Probabilities [V] that a token is drawn with from logits [V], in float32; `seen` (bool [V]) are penalized.

    Repetition penalty, temperature, top-k, top-p, min-p, in this order. Ties at the border of top-k are kept; top-p
    keeps a token while the ones before it hold less than p; min-p looks at what top-p left.
    """
    logits = logits.float()
    if seen is not None:
        logits = penalized(logits, sampling.repetition_penalty, seen)
    if sampling.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(), logits.numel()).float()
    # The largest becomes 0 first and the divisor stays a normal float32, so that no temperature overflows.
    logits = (logits - logits.max()) / max(sampling.temperature, 1e-30)
    if 0 < sampling.top_k < logits.numel():
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[-1], float("-inf"))
    probabilities = logits.softmax(dim=-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(descending=True, stable=True)
        before = ordered.cumsum(dim=-1) - ordered
        probabilities[order[before >= sampling.top_p]] = 0
        probabilities /= probabilities.sum()
    if sampling.min_p > 0:
        probabilities[probabilities < sampling.min_p * probabilities.max()] = 0
        probabilities /= probabilities.sum()
    return probabilities


class Sampler:
    """Draws the tokens of one sequence with its own random stream, so that its neighbours in a batch do not matter."""

    def __init__(self, sampling: Sampling, usable: int, prompt: Sequence[int] = ()) -> None:
        """`usable` is how many rows of the vocabulary stand for tokens; padding rows beyond are never drawn."""
        self.sampling, self.usable = sampling, usable
        self.generator = torch.Generator().manual_seed(sampling.seed)
        self.seen: Tensor | None = None
        if sampling.repetition_penalty != 1:
            self.seen = torch.zeros(usable, dtype=torch.bool)
            self.seen[[token for token in prompt if token < usable]] = True

    def __call__(self, logits: Tensor) -> int:
        """The next token for logits [V]. ValueError where they are no numbers."""
        logits = logits[: self.usable]
        if not logits.max() < math.inf:  # also false for nan
            raise ValueError("the model's logits are not finite: try dtype=fp32, or its weights are damaged")
        if self.seen is not None:
            self.seen = self.seen.to(logits.device)
        probabilities = distribution(logits, self.sampling, self.seen)
        if self.sampling.temperature == 0:
            token = int(probabilities.argmax())
        else:
            probabilities = probabilities.cpu()
            # argmax of p / Exp(1) is distributed as p (the exponential race); zero-probability tokens never win it.
            noise = torch.empty_like(probabilities).exponential_(generator=self.generator)
            token = int((probabilities / noise).argmax())
        if self.seen is not None:
            self.seen[token] = True
        return token

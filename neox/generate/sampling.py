"""Sampling a token from logits: bias, penalties, temperature, top-k, top-p, min-p, reproducible by seed.

The order is that of Hugging Face transformers, with OpenAI's two penalties after the repetition penalty, where vLLM has
them. Shapes: V vocab.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from neox.config import GenerateConfig, SamplingConfig
from neox.config.sections import OptionalInt
from neox.generate.grammar import OPTIONS, Constraint, check, read
from neox.tokenizer import Tokenizer

NOT_FINITE = "the model's logits are not finite: try dtype=fp32, or its weights are damaged"
NO_TOKEN = "no token has a probability above 0 after penalties and filters: loosen them"


class Sampling(SamplingConfig):
    """Sampling options of one prompt: those of `SamplingConfig`, with texts in place of files.

    Raises ConfigError for a wrong value.
    """

    prompt_logprobs: OptionalInt = Field(default=None, ge=0)
    """Record the log-probabilities of the prompt's tokens but the first, with this many alternatives; none = no."""

    def __init__(self, /, **values: Any) -> None:
        super().__init__(**values)
        given = [option for option in OPTIONS if getattr(self, option) is not None]
        if len(given) > 1:
            raise ValueError(f"generate.{given[0]} and generate.{given[1]}: give one of them")
        if self.constraint:
            if not self.stop_at_eod:
                raise ValueError(f"generate.stop_at_eod = false: what generate.{given[0]} asks for ends there")
            check(*self.constraint)

    @property
    def constraint(self) -> tuple[str, str] | None:
        """(option, text) of the option that constrains the output; None without one."""
        return next(((option, text) for option in OPTIONS if (text := getattr(self, option)) is not None), None)

    @property
    def prompt_alternatives(self) -> int | None:
        """Alternatives to record at each token of the prompt; None records no log-probabilities."""
        return self.prompt_logprobs if self.prompt_logprobs is not None or not self.echo else self.logprobs

    @classmethod
    def of(cls, config: GenerateConfig) -> "Sampling":
        """The sampling options of a config's section `generate`. Raises ValueError, also for files that it names."""
        options = {name: getattr(config, name) for name in SamplingConfig.model_fields}
        source = ""
        for option in OPTIONS:
            if options[option] is not None:
                options[option], source = read(option, options[option])
        try:
            return cls(**options)
        except ValueError as error:
            raise ValueError(f"{error} ({source})" if source else str(error)) from None

    def finish_reason(self, token: int, eod: int | None) -> Literal["eod", "stop"] | None:
        """The reason to end a sequence at `token`, which is then left out; None where it continues."""
        if self.stop_at_eod and token == eod:
            return "eod"
        return "stop" if token in self.stop_tokens else None


def apply_repetition_penalty(logits: Tensor, penalty: float, seen: Tensor) -> Tensor:
    """Divide the logits [V] of `seen` tokens (bool [V]) by `penalty` where positive, else multiply them.

    Keskar et al. 2019 (CTRL), section 4.1, as transformers has it: once per token, however often it was seen.
    """
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def apply_penalties(
    logits: Tensor,
    sampling: Sampling,
    seen: Tensor | None = None,
    counts: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Apply bias and penalties to logits [V]; returns float32.

    `seen` (bool [V]) are the tokens of prompt and output, `counts` ([V]) how often the output holds each, `bias` ([V])
    is Sampling.logit_bias. In this order: bias, repetition penalty, frequency and presence penalty (OpenAI's API
    reference, "Frequency and presence penalties": logit - counts * frequency - (counts > 0) * presence).
    """
    logits = logits.float()
    if bias is not None:
        logits = logits + bias
    if seen is not None:
        logits = apply_repetition_penalty(logits, sampling.repetition_penalty, seen)
    if counts is not None:
        logits = logits - counts * sampling.frequency_penalty - (counts > 0) * sampling.presence_penalty
    return logits


def distribution(logits: Tensor, sampling: Sampling, **past: Tensor) -> Tensor:
    """Sampling probabilities [V], float32, from logits [V]; `past` as in `apply_penalties`.

    After the penalties: temperature, top-k, top-p, min-p. top-k keeps ties at its border. top-p keeps a token while the
    ones before it hold less than p, and always the first. min-p applies to the tokens that top-p kept.
    Raises ValueError where the largest logit is not finite.
    """
    logits = apply_penalties(logits, sampling, **past)
    if not -math.inf < logits.max() < math.inf:  # also false for nan
        raise ValueError(NO_TOKEN)
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
        before[0] = -1.0  # a smaller p than float32 holds keeps it too
        probabilities[order[before >= sampling.top_p]] = 0
        probabilities /= probabilities.sum()
    if sampling.min_p > 0:
        probabilities[probabilities < sampling.min_p * probabilities.max()] = 0
        probabilities /= probabilities.sum()
    return probabilities


def inverse_cdf(weights: Tensor, uniform: Tensor) -> Tensor:
    """Sample tokens [...] from weights [..., V] by uniform numbers [...] in [0, 1), float64.

    Weights are unnormalized probabilities. The token is the first whose cumulative sum exceeds the number's share of
    the total; a token of weight zero is never sampled.
    """
    sums = weights.double().cumsum(dim=-1)
    tokens = torch.searchsorted(sums, uniform[..., None] * sums[..., -1:], right=True)[..., 0]
    return tokens.clamp(max=weights.shape[-1] - 1)


def sample_rows(logits: Tensor, settings: Tensor | None, filtered: bool) -> Tensor:
    """Sample tokens [S] from logits [S, V] as `Sampler` does, in operations of fixed shapes; -1 for errors.

    The token is -1 where the largest logit is not finite, or no weight is above 0.
    settings [5, S], float64, hold temperature, top_k, top_p, min_p and a uniform number for each row; None means that
    all rows are greedy. Without `filtered`, top_k, top_p and min_p are ignored.
    """
    logits = logits.float()
    highest, best = logits.max(dim=-1, keepdim=True)
    good = highest[:, 0].isfinite()
    if settings is None:
        return torch.where(good, best[:, 0], -1)
    temperature, top_k, top_p, min_p, uniform = settings
    scaled = (logits - highest) / temperature.float().clamp(min=1e-30)[:, None]
    if filtered:
        last = torch.where(top_k > 0, top_k, logits.shape[-1]).long().clamp(max=logits.shape[-1]) - 1
        border = scaled.sort(dim=-1, descending=True).values.gather(1, last[:, None])
        scaled = scaled.masked_fill(scaled < border, float("-inf"))
    weights = scaled.softmax(dim=-1)
    if filtered:
        ordered, order = weights.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(dim=-1) - ordered
        before[:, 0] = -1.0
        beyond = before >= torch.where(top_p < 1, top_p, math.inf).float()[:, None]
        weights = weights.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), 0)
        weights = weights.masked_fill(weights < min_p.float()[:, None] * weights.amax(dim=-1, keepdim=True), 0)
    tokens = torch.where(temperature == 0, best[:, 0], inverse_cdf(weights, uniform))
    return torch.where(good & (weights.sum(dim=-1) > 0), tokens, -1)


class Sampler:
    """Sample the tokens of one sequence with its own random stream, independent of its batch."""

    def __init__(
        self, sampling: Sampling, num_real_tokens: int, prompt: Sequence[int] = (), tokenizer: Tokenizer | None = None
    ) -> None:
        """`num_real_tokens` rows of the vocabulary stand for tokens; padding rows beyond them are never sampled.

        Raises ValueError where an option names an id that is not a token, or needs a tokenizer.
        """
        self.sampling, self.num_real_tokens = sampling, num_real_tokens
        self._generator = torch.Generator().manual_seed(sampling.seed)
        self.unused: list[float] = []  # numbers taken from it for tokens that were dropped
        self._constraint = Constraint(*sampling.constraint, tokenizer) if sampling.constraint else None
        self._past: dict[str, Tensor] = {}  # arguments of `apply_penalties`, by name
        if sampling.repetition_penalty != 1:
            self._past["seen"] = torch.zeros(num_real_tokens, dtype=torch.bool)
            self._past["seen"][[token for token in prompt if token < num_real_tokens]] = True
        if sampling.presence_penalty or sampling.frequency_penalty:
            self._past["counts"] = torch.zeros(num_real_tokens)
        if sampling.logit_bias:
            self._past["bias"] = torch.zeros(num_real_tokens)
            for key, bias in sampling.logit_bias:
                self._past["bias"][_token(key, num_real_tokens, tokenizer)] += bias
        for token in sampling.stop_tokens:
            _check_token("stop_tokens", token, num_real_tokens)

    @property
    def samples_on_device(self) -> bool:
        """True where `sample_rows` gives the same tokens: they depend on logits, settings and seed alone."""
        return not self._past and not self._constraint and self.sampling.logprobs is None

    def uniform(self) -> float:
        """The next number of the random stream, one a token."""
        if self.unused:
            return self.unused.pop(0)
        return torch.rand((), dtype=torch.float64, generator=self._generator).item()

    def __call__(self, logits: Tensor) -> int:
        """Sample the next token from logits [V], and append it. Raises ValueError as `probabilities` does."""
        if self.sampling.temperature == 0 and not self._past and not self._constraint and logits.device.type == "cpu":
            # One pass of numpy, for which nan and infinity are the largest; torch takes two, with threads.
            values = logits[: self.num_real_tokens].float().numpy()
            token = int(values.argmax())
            if not -math.inf < values[token] < math.inf:
                raise ValueError(NOT_FINITE)
            return token
        if self.sampling.temperature == 0:
            token = int(distribution(self._allowed(logits), self.sampling, **self._past).argmax())
        else:
            probabilities = self.probabilities(logits).cpu()
            token = int(inverse_cdf(probabilities, torch.tensor(self.uniform(), dtype=torch.float64)))
        self.take(token)
        return token

    def probabilities(self, logits: Tensor) -> Tensor:
        """Probabilities [num_real_tokens] of the next token for logits [V].

        Raises ValueError where the logits are not finite, and where a grammar allows no token.
        """
        return distribution(self._allowed(logits), self.sampling, **self._past)

    def _allowed(self, logits: Tensor) -> Tensor:
        """Logits [num_real_tokens], -inf for tokens that a grammar forbids; moves `_past` to their device."""
        logits = logits[: self.num_real_tokens]
        if not logits.max() < math.inf:  # also false for nan
            raise ValueError(NOT_FINITE)
        if self._constraint:
            allowed = self._constraint.allowed()[: self.num_real_tokens].to(logits.device)
            logits = logits.masked_fill(~allowed, -math.inf)
        self._past = {name: tensor.to(logits.device) for name, tensor in self._past.items()}
        return logits

    def take(self, token: int) -> None:
        """Append `token` to the sequence."""
        if "seen" in self._past:
            self._past["seen"][token] = True
        if "counts" in self._past:
            self._past["counts"][token] += 1
        if self._constraint:
            self._constraint.take(token)


def _token(key: str, num_real_tokens: int, tokenizer: Tokenizer | None) -> int:
    """Token id for a key of Sampling.logit_bias: digits are an id, as in OpenAI's API; other text is one token."""
    if key.isdecimal() and key.isascii():
        token = int(key)
    else:
        if tokenizer is None:
            raise ValueError(f"generate.logit_bias: {key!r} needs a tokenizer: this model was loaded without one")
        tokens = tokenizer.encode(key)
        if len(tokens) != 1:
            raise ValueError(
                f"generate.logit_bias: {key!r} is {len(tokens)} tokens {tokens}: give their ids, or a text that is one "
                "token (a space before a word belongs to it)"
            )
        token = tokens[0]
    _check_token("logit_bias", token, num_real_tokens)
    return token


def _check_token(option: str, token: int, num_real_tokens: int) -> None:
    if not 0 <= token < num_real_tokens:
        raise ValueError(f"generate.{option}: {token} is no token: they are 0 to {num_real_tokens - 1}")

"""Requests with their progress, and their results: events, completions and scores."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neox.config import ModelConfig
from neox.generate.prefix import Node
from neox.generate.sampling import Sampler
from neox.generate.text_stream import TextStream
from neox.model.cache import BLOCK
from neox.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of a token, and the most likely alternatives.

    Natural logarithms over the full vocabulary, padding rows included, before bias, penalties, temperature and filters.
    """

    token: int
    logprob: float | None  # None for the first token of a text
    top: list[tuple[int, float]]  # (token, log-probability), most likely first; never a padding row


@dataclass(frozen=True)
class Completion:
    """The continuation of a prompt."""

    tokens: list[int]  # all sampled tokens, those of a stop string too; not the end-of-document or stop token
    text: str  # up to the stop string, if one came; empty without a tokenizer; with Sampling.echo after the prompt's
    finish_reason: str  # "stop": a stop string or token; "eod": end-of-document token; "length": max_tokens or context
    # One for each of `tokens`, where Sampling.logprobs asks for them; with Sampling.echo those of the prompt first.
    logprobs: list[TokenLogprob] | None = None
    # One for each token of the prompt but the first, where Sampling.prompt_logprobs asks for them.
    prompt_logprobs: list[TokenLogprob] | None = None


@dataclass(frozen=True)
class Event:
    """A step of one sequence."""

    number: int  # of its prompt, from 0; as `submit` gave it
    token: int | None  # the sampled token; None when the end-of-document or a stop token ended the sequence
    text: str  # new text in whole characters, no part of a stop string
    done: Completion | None  # on the last event of the sequence


@dataclass(frozen=True)
class Score:
    """The log-probability of a continuation after its context."""

    logprob: float  # natural logarithm, the sum over its tokens
    is_greedy: bool  # each of its tokens is the most likely one of all rows, padding included
    logprobs: list[float]  # of each token


class Request:
    """A sequence to continue or to score, and its progress in the cache."""

    decodes = True  # grows token by token after its prompt

    def __init__(self, tokens: list[int], limit: int, logits_from: int) -> None:
        self.tokens = tokens
        self.limit = limit  # length at which it ends
        self.logits_from = logits_from  # first position whose logits are still needed
        self.draft: list[int] = []  # draft tokens, to be verified with the rest
        self.computed = 0  # positions that the cache holds
        self.nodes: list[Node] = []  # its blocks in the prefix cache, from the first position on
        self.table: list[int] = []  # all its blocks

    @property
    def pending(self) -> int:
        return len(self.tokens) + len(self.draft) - self.computed

    @property
    def missing(self) -> int:
        """Blocks still to be allocated for the pending tokens."""
        return max(0, -(-(self.computed + self.pending) // BLOCK) - len(self.table))

    def block(self, number: int) -> list[int]:
        """Known tokens of a block; fewer than BLOCK in the last."""
        return self.tokens[number * BLOCK : (number + 1) * BLOCK]


class Generation(Request):
    """A prompt to continue."""

    def __init__(
        self, number: int, prompt: list[int], limit: int, sampler: Sampler, text: TextStream | None, before: str = ""
    ) -> None:
        asked = sampler.sampling.prompt_alternatives is not None
        super().__init__(list(prompt), limit, logits_from=0 if asked else len(prompt) - 1)
        self.number, self.prompt, self.sampler, self.text = number, len(prompt), sampler, text
        self.before = before  # echoed prompt, with which its text begins
        self.shown: list[str] = []
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: list[TokenLogprob] = []

    def completion(self, reason: str, tokenizer: Tokenizer | None) -> Completion:
        """The finished request's result; `reason` is why it ended, unless its text held a stop string."""
        new, sampling = self.tokens[self.prompt :], self.sampler.sampling
        if self.text:
            text = "".join(self.shown)
            reason = "stop" if self.text.stopped else reason
        else:
            text = self.before + (tokenizer.decode(new) if tokenizer else "")
        logprobs = self.logprobs if sampling.logprobs is not None else None
        if logprobs is not None and sampling.echo:
            logprobs = [TokenLogprob(self.tokens[0], None, []), *self.prompt_logprobs, *logprobs]
        prompt = self.prompt_logprobs if sampling.prompt_logprobs is not None else None
        return Completion(new, text, reason, logprobs, prompt)


class Scoring(Request):
    """A context with continuations that differ in their last token only."""

    decodes = False

    def __init__(self, context: list[int], continuation: list[int]) -> None:
        super().__init__((context + continuation)[:-1], limit=len(context + continuation), logits_from=len(context) - 1)
        self.last_tokens = [continuation[-1]]
        self.logprobs: list[float] = []  # of the tokens before the last
        self.is_greedy = True  # all of them are the most likely ones
        self.results: list[tuple[float, bool]] = []  # (log-probability, is greedy) of each of `last_tokens`

    @classmethod
    def checked(cls, context: list[int], continuation: list[int], config: ModelConfig) -> "Scoring":
        """A request that the model can score. Raises ValueError for no token, too many, or ids it does not have."""
        limit = config.max_position_embeddings + 1
        if not context or not continuation:
            raise ValueError("a context and a continuation have at least one token each")
        if (length := len(context) + len(continuation)) > limit:
            raise ValueError(f"{length} tokens, at most {limit} can be scored: cut the context's beginning off")
        check_tokens(context + continuation, config.vocab_size, "it")
        return cls(context, continuation)

    @property
    def targets(self) -> list[list[int]]:
        """The tokens to score at each position from `logits_from` on."""
        return [*([token] for token in self.tokens[self.logits_from + 1 :]), self.last_tokens]

    @staticmethod
    def record(scored: Sequence[tuple["Scoring", range]], logits: Tensor) -> None:
        """Record the log-probabilities of each request's targets, from its rows of logits [R, V]."""
        asked = [pair for request, rows in scored for pair in zip(rows, request.targets, strict=False)]
        if not asked:
            return
        logprobs = logits.float().log_softmax(dim=-1)
        row = torch.tensor([row for row, targets in asked for _ in targets], device=logits.device)
        token = torch.tensor([token for _, targets in asked for token in targets], device=logits.device)
        likely = logprobs.argmax(dim=-1)[row] == token
        # One transfer for all: the device is waited for once.
        pairs = iter(torch.stack((logprobs[row, token], likely.float()), dim=1).tolist())
        for request, rows in scored:
            request._store(pairs, len(rows))

    def _store(self, pairs: Iterator[Sequence[float]], positions: int) -> None:
        """Store the next `positions` results of `targets`: pairs of (log-probability, is it the largest)."""
        for targets in self.targets[:positions]:
            results = [(logprob, bool(likely)) for logprob, likely in itertools.islice(pairs, len(targets))]
            self.logits_from += 1
            if self.logits_from == len(self.tokens):
                self.results = results
            else:
                self.logprobs.append(results[0][0])
                self.is_greedy &= results[0][1]

    def score(self, number: int) -> Score:
        """Score of the continuation whose last token is `last_tokens[number]`."""
        logprob, is_greedy = self.results[number]
        logprobs = [*self.logprobs, logprob]
        return Score(sum(logprobs), self.is_greedy and is_greedy, logprobs)


def check_tokens(tokens: Sequence[int], rows: int, what: str) -> None:
    """Raise ValueError for a token id that a model of so many vocabulary rows does not have."""
    if wrong := [token for token in tokens if not 0 <= token < rows]:
        raise ValueError(f"{what} holds token {wrong[0]}, the model has {rows} rows: another tokenizer's ids?")


def token_logprob(token: int, logits: Tensor, alternatives: int, num_real_tokens: int) -> TokenLogprob:
    """The log-probability of `token` in logits [V], and the most likely alternatives, padding rows excepted."""
    logprobs = logits.float().log_softmax(dim=-1)
    top = logprobs[:num_real_tokens].topk(min(alternatives, num_real_tokens))
    pairs = list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return TokenLogprob(token, logprobs[token].item(), pairs)

"""What the engine works on, and what it hands out: requests with how far they are, events, completions and scores."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neox.generate.prefix import Node
from neox.generate.sampling import Sampler
from neox.generate.text_stream import TextStream
from neox.model.cache import BLOCK
from neox.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenLogprob:
    """How likely the model found a token: natural logarithms over the full vocabulary, padding rows included, before
    bias, penalties, temperature and every filter."""

    token: int
    logprob: float | None  # none for a text's first token, which nothing comes before
    top: list[tuple[int, float]]  # the most likely tokens at this place, most likely first; never a padding row


@dataclass(frozen=True)
class Completion:
    """What followed a prompt."""

    tokens: list[int]  # all that were drawn, those of a stop string too; not the end-of-document or stop token
    text: str  # up to the stop string, if one came; empty without a tokenizer; with Sampling.echo behind the prompt's
    finish_reason: str  # "stop": a stop string or token; "eod": end-of-document token; "length": max_tokens or context
    # One for each of `tokens`, where Sampling.logprobs asks for them; with Sampling.echo those of the prompt first.
    logprobs: list[TokenLogprob] | None = None
    # One for each token of the prompt but the first, where Sampling.prompt_logprobs asks for them.
    prompt_logprobs: list[TokenLogprob] | None = None


@dataclass(frozen=True)
class Event:
    """A step of one sequence."""

    number: int  # of its prompt, from 0; as `submit` gave it
    token: int | None  # the token drawn; none when the end-of-document or a stop token ended the sequence
    text: str  # the text that has become certain: whole characters, no part of a stop string
    done: Completion | None  # on the last event of the sequence


@dataclass(frozen=True)
class Score:
    """How likely a continuation is after its context."""

    logprob: float  # natural logarithm, the sum over its tokens
    is_greedy: bool  # whether each of its tokens is the most likely one of all rows, padding included
    logprobs: list[float]  # of each token


class Request:
    """A sequence to continue, or to score: what is known of it, and how far its keys are in the cache."""

    decodes = True  # grows token by token, once its prompt is through

    def __init__(self, tokens: list[int], limit: int, wanted: int) -> None:
        self.tokens = tokens
        self.limit = limit  # length at which it ends
        self.wanted = wanted  # the first position whose logits are still needed
        self.draft: list[int] = []  # a guess at what follows, to be computed with the rest
        self.computed = 0  # positions that the cache holds
        self.nodes: list[Node] = []  # the blocks that it shares, from the first position on
        self.table: list[int] = []  # all its blocks

    @property
    def pending(self) -> int:
        return len(self.tokens) + len(self.draft) - self.computed

    @property
    def missing(self) -> int:
        """Blocks that it lacks for what is pending."""
        return max(0, -(-(self.computed + self.pending) // BLOCK) - len(self.table))

    def block(self, number: int) -> list[int]:
        """Known tokens of a block; fewer than BLOCK in the last."""
        return self.tokens[number * BLOCK : (number + 1) * BLOCK]


class Generation(Request):
    """A prompt that is continued."""

    def __init__(
        self, number: int, prompt: list[int], limit: int, sampler: Sampler, text: TextStream | None, before: str = ""
    ) -> None:
        asked = sampler.sampling.prompt_alternatives is not None
        super().__init__(list(prompt), limit, wanted=0 if asked else len(prompt) - 1)
        self.number, self.prompt, self.sampler, self.text = number, len(prompt), sampler, text
        self.before = before  # what its text begins with
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
    """A context and continuations of it that differ in their last token only, which is predicted but not computed."""

    decodes = False

    def __init__(self, context: list[int], continuation: list[int]) -> None:
        super().__init__((context + continuation)[:-1], limit=len(context + continuation), wanted=len(context) - 1)
        self.lasts = [continuation[-1]]
        self.logprobs: list[float] = []  # of the tokens before the last
        self.is_greedy = True  # whether they are
        self.ends: list[tuple[float, bool]] = []  # the same of each of `lasts`, once all is computed

    @property
    def targets(self) -> list[list[int]]:
        """For each position from `wanted` on, the tokens whose log-probabilities are asked for."""
        return [*([token] for token in self.tokens[self.wanted + 1 :]), self.lasts]

    def record(self, found: Iterator[Sequence[float]], positions: int) -> None:
        """Take what was found for `targets` of that many positions: (log-probability, whether it is the largest)."""
        for targets in self.targets[:positions]:
            own = [(logprob, bool(likely)) for logprob, likely in itertools.islice(found, len(targets))]
            self.wanted += 1
            if self.wanted == len(self.tokens):
                self.ends = own
            else:
                self.logprobs.append(own[0][0])
                self.is_greedy &= own[0][1]

    def score(self, number: int) -> Score:
        """Of the continuation that ends in the so-manieth of `lasts`."""
        logprob, is_greedy = self.ends[number]
        logprobs = [*self.logprobs, logprob]
        return Score(sum(logprobs), self.is_greedy and is_greedy, logprobs)


def record(scored: Sequence[tuple[Scoring, range]], logits: Tensor) -> None:
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
        request.record(pairs, len(rows))


def token_logprob(token: int, logits: Tensor, alternatives: int, real: int) -> TokenLogprob:
    """The log-probability of `token` in logits [V], and the most likely ones of the first `real` rows."""
    logprobs = logits.float().log_softmax(dim=-1)
    top = logprobs[:real].topk(min(alternatives, real))
    pairs = list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return TokenLogprob(token, logprobs[token].item(), pairs)

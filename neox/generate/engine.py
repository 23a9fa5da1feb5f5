"""Generation with a key-value cache: prompts of different lengths decode side by side, each as if it were alone.

A batch is prefilled row by row and decoded together; a row that ends leaves its slot to the next prompt.
Shapes: R rows in flight, V vocab.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from neox.cache import KVCache
from neox.generate.sampling import Sampler, Sampling
from neox.generate.text import TextStream
from neox.model import GPTNeoX
from neox.tokenizer import Tokenizer

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class TokenLogprob:
    """How likely the model found a token: natural logarithms over the full vocabulary, padding rows included, before
    bias, penalties, temperature and every filter."""

    token: int
    logprob: float
    top: list[tuple[int, float]]  # the most likely tokens at this place, most likely first; never a padding row


@dataclass(frozen=True)
class Completion:
    """What followed a prompt."""

    tokens: list[int]  # all that were drawn, those of a stop string too; not the end-of-document or stop token
    text: str  # up to the stop string, if one came; empty without a tokenizer
    finish_reason: str  # "stop": a stop string or token; "eod": end-of-document token; "length": max_tokens or context
    logprobs: list[TokenLogprob] | None = None  # one for each of `tokens`, where Sampling.logprobs asks for them


@dataclass(frozen=True)
class Event:
    """A step of one sequence."""

    number: int  # of its prompt, from 0
    token: int | None  # the token drawn; none when the end-of-document or a stop token ended the sequence
    text: str  # the text that has become certain: whole characters, no part of a stop string
    done: Completion | None  # on the last event of the sequence


@dataclass
class _Row:
    """One sequence in flight."""

    number: int
    prompt: list[int]
    limit: int  # length at which it ends
    sampler: Sampler
    text: TextStream | None
    ended: bool = False
    new: list[int] = field(default_factory=list)
    shown: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.new)


class Engine:
    """Generates from a loaded model. `slots` sequences run at a time; `cache_bytes` bounds their cache instead."""

    def __init__(
        self, model: GPTNeoX, tokenizer: Tokenizer | None = None, slots: int = 8, cache_bytes: int | None = None
    ) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        config, self.weight = model.config, next(model.parameters())
        row = 2 * config.num_hidden_layers * config.hidden_size * config.max_position_embeddings
        row *= self.weight.element_size()
        self.slots = slots if cache_bytes is None else cache_bytes // row
        if self.slots < 1:
            raise ValueError(f"one sequence at full context needs {row:,} bytes of cache: raise cache_bytes or slots")
        self.eod = tokenizer.eod_id if tokenizer else None
        self.usable = min(tokenizer.vocab_size, config.vocab_size) if tokenizer else config.vocab_size

    def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling: Sampling | Sequence[Sampling] | None = None
    ) -> list[Completion]:
        """Continue each prompt (text, or token ids); arguments and errors as in `events`."""
        many: Sequence[Prompt] = [prompts] if _is_one(prompts) else prompts  # type: ignore[assignment,list-item]
        done = {event.number: event.done for event in self.events(many, sampling, stream=False) if event.done}
        return [done[number] for number in range(len(many))]

    def stream(self, prompt: Prompt, sampling: Sampling | None = None) -> Iterator[str]:
        """The text of one completion as it is made, in whole characters; needs a byte-level tokenizer."""
        if self.tokenizer is None:
            raise ValueError("streaming text needs a tokenizer: this model was loaded without one")
        return (event.text for event in self.events([prompt], sampling) if event.text)

    def events(
        self, prompts: Sequence[Prompt], sampling: Sampling | Sequence[Sampling] | None = None, stream: bool = True
    ) -> Iterator[Event]:
        """Every step of every sequence, as it happens.

        One `sampling` is for all prompts, and the i-th draws with seed + i; a list has one for each. Without `stream`
        the events carry no text (their completions do), which any tokenizer can be decoded with.
        Raises ValueError, before anything is computed, for a prompt that leaves no room in the context.
        """
        if isinstance(sampling, Sampling) or sampling is None:
            base = sampling or Sampling()
            sampling = [replace(base, seed=base.seed + number) for number in range(len(prompts))]
        pairs = zip(prompts, sampling, strict=True)
        rows = [self._row(number, prompt, own, stream) for number, (prompt, own) in enumerate(pairs)]
        return self._decode(deque(rows))

    def encode(self, prompt: Prompt) -> list[int]:
        """The tokens that a prompt begins with: an empty one is the start of a document.

        Raises ValueError for a prompt that leaves no room in the context, and for ids that the model does not have.
        """
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("a prompt in text needs a tokenizer: this model was loaded without one")
            tokens = self.tokenizer.encode(prompt)
        else:
            tokens = [int(token) for token in prompt]
        if not tokens:
            tokens = [self.eod or 0]
        context, vocab = self.model.config.max_position_embeddings, self.model.config.vocab_size
        if len(tokens) >= context:
            raise ValueError(f"the prompt has {len(tokens)} tokens, the context {context}: shorten the prompt")
        if wrong := [token for token in tokens if not 0 <= token < vocab]:
            raise ValueError(f"the prompt holds token {wrong[0]}, the model has {vocab} rows: another tokenizer's ids?")
        return tokens

    def _row(self, number: int, prompt: Prompt, sampling: Sampling, stream: bool) -> _Row:
        if sampling.stop and self.tokenizer is None:
            raise ValueError("a stop string needs a tokenizer: this model was loaded without one")
        tokens = self.encode(prompt)
        limit = min(len(tokens) + sampling.max_tokens, self.model.config.max_position_embeddings)
        text = TextStream(self.tokenizer, sampling.stop) if self.tokenizer and (stream or sampling.stop) else None
        sampler = Sampler(sampling, self.usable, tokens, self.tokenizer)
        return _Row(number, tokens, limit, sampler, text)

    @torch.inference_mode()
    def _decode(self, waiting: deque[_Row]) -> Iterator[Event]:
        slots = min(self.slots, len(waiting))
        length = max((row.limit for row in waiting), default=0)
        cache = KVCache(self.model.config, slots, length, self.weight.device, self.weight.dtype)
        active: list[_Row] = []  # active[i] owns cache row i
        while waiting or active:
            while waiting and len(active) < slots:
                row = waiting.popleft()
                view = cache.rows(len(active), len(active) + 1)
                logits = self._forward(view, [row.prompt], [0])
                active.append(row)
                yield self._accept(row, logits[0])
            for i in reversed(range(len(active))):
                if active[i].ended:
                    # The last row moves into the gap, so that the rows in use stay contiguous.
                    cache.move(len(active) - 1, i)
                    active[i] = active[-1]
                    active.pop()
            if active:
                view = cache.rows(0, len(active))
                logits = self._forward(view, [row.new[-1:] for row in active], [row.length - 1 for row in active])
                for row, own in zip(list(active), logits, strict=True):
                    yield self._accept(row, own)

    def _accept(self, row: _Row, logits: Tensor) -> Event:
        """Draw the next token of a row from logits [V]."""
        sampling = row.sampler.sampling
        token = row.sampler(logits)
        if reason := sampling.ends(token, self.eod):
            return self._end(row, reason, None, "")
        row.new.append(token)
        if sampling.logprobs is not None:
            row.logprobs.append(self._logprob(token, logits, sampling.logprobs))
        text = row.text.push(token) if row.text else ""
        if (row.text and row.text.stopped) or row.length >= row.limit:
            return self._end(row, "length", token, text)
        row.shown.append(text)
        return Event(row.number, token, text, None)

    def _end(self, row: _Row, reason: str, token: int | None, text: str) -> Event:
        row.ended = True
        if row.text:
            text += row.text.finish()
            if row.text.stopped:
                reason = "stop"  # found just now, or in what was held back
            row.shown.append(text)
            whole = "".join(row.shown)
        else:
            whole = self.tokenizer.decode(row.new) if self.tokenizer else ""
        logprobs = row.logprobs if row.sampler.sampling.logprobs is not None else None
        return Event(row.number, token, text, Completion(row.new, whole, reason, logprobs))

    def _logprob(self, token: int, logits: Tensor, alternatives: int) -> TokenLogprob:
        logprobs = logits.float().log_softmax(dim=-1)
        top = logprobs[: self.usable].topk(min(alternatives, self.usable))
        pairs = list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        return TokenLogprob(token, logprobs[token].item(), pairs)

    def _forward(self, cache: KVCache, tokens: list[list[int]], starts: list[int]) -> Tensor:
        """Logits [R, V] after the last of each row's tokens (equally many per row), which begin at `starts`."""
        device = self.weight.device
        batch = torch.tensor(tokens, device=device)
        positions = torch.tensor(starts, device=device)[:, None] + torch.arange(batch.shape[1], device=device)
        cache.extent = max(starts) + batch.shape[1]
        hidden = self.model(batch, positions=positions, cache=cache, head=False)
        logits: Tensor = self.model.embed_out(hidden[:, -1])
        return logits


def _is_one(prompts: Prompt | Sequence[Prompt]) -> bool:
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))

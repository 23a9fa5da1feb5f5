"""Generation with a key-value cache: prompts of different lengths decode side by side, each as if it were alone.

A batch is prefilled row by row and decoded together; a row that ends leaves its slot to the next prompt.
Shapes: R rows in flight, V vocab.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from neox.cache import KVCache
from neox.generate.sampling import Sampler, Sampling
from neox.model import GPTNeoX
from neox.tokenizer import StreamDecoder, Tokenizer

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Completion:
    """What followed a prompt."""

    tokens: list[int]
    text: str  # empty without a tokenizer
    finish_reason: str  # "stop" at the end-of-document token, "length" at max_tokens or the context's end


@dataclass
class _Row:
    """One sequence in flight."""

    prompt: list[int]
    limit: int  # length at which it ends
    sampler: Sampler
    number: int
    stopped: bool = False  # by the end-of-document token
    new: list[int] = field(default_factory=list)

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

    def generate(self, prompts: Prompt | Sequence[Prompt], sampling: Sampling | None = None) -> list[Completion]:
        """Continue each prompt (text, or token ids). The i-th prompt draws with seed + i.

        Raises ValueError for a prompt that leaves no room in the context.
        """
        sampling = sampling or Sampling()
        many: Sequence[Prompt] = [prompts] if _is_one(prompts) else prompts  # type: ignore[assignment,list-item]
        rows = [self._row(prompt, sampling, i) for i, prompt in enumerate(many)]
        for _ in self._decode(deque(rows), sampling):
            pass
        return [Completion(row.new, self._text(row.new), "stop" if row.stopped else "length") for row in rows]

    def stream(self, prompt: Prompt, sampling: Sampling | None = None) -> Iterator[str]:
        """The continuation of one prompt as it is made, in whole characters; needs a tokenizer."""
        if self.tokenizer is None:
            raise ValueError("streaming text needs a tokenizer: this model was loaded without one")
        sampling = sampling or Sampling()
        decoder = StreamDecoder(self.tokenizer)
        for _, token in self._decode(deque([self._row(prompt, sampling, 0)]), sampling):
            text = decoder.finish() if token is None else decoder.push(token)
            if text:
                yield text

    def _row(self, prompt: Prompt, sampling: Sampling, number: int) -> _Row:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("a prompt in text needs a tokenizer: this model was loaded without one")
            tokens = self.tokenizer.encode(prompt)
        else:
            tokens = [int(token) for token in prompt]
        if not tokens:
            tokens = [self.eod or 0]  # an empty prompt starts a document
        context, vocab = self.model.config.max_position_embeddings, self.model.config.vocab_size
        if len(tokens) >= context:
            raise ValueError(f"the prompt has {len(tokens)} tokens, the context {context}: shorten the prompt")
        if wrong := [token for token in tokens if not 0 <= token < vocab]:
            raise ValueError(f"the prompt holds token {wrong[0]}, the model has {vocab} rows: another tokenizer's ids?")
        own = Sampling(**{**sampling.__dict__, "seed": sampling.seed + number})
        return _Row(tokens, min(len(tokens) + sampling.max_tokens, context), Sampler(own, self.usable), number)

    @torch.inference_mode()
    def _decode(self, waiting: deque[_Row], sampling: Sampling) -> Iterator[tuple[_Row, int | None]]:
        """Every new token as (row, token), and (row, None) once when a row has ended."""
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
                yield from self._accept(row, logits[0], sampling)
            for i in reversed(range(len(active))):
                if active[i].length >= active[i].limit:
                    # The last row moves into the gap, so that the rows in use stay contiguous.
                    cache.move(len(active) - 1, i)
                    active[i] = active[-1]
                    active.pop()
            if active:
                view = cache.rows(0, len(active))
                logits = self._forward(view, [row.new[-1:] for row in active], [row.length - 1 for row in active])
                for row, own in zip(list(active), logits, strict=True):
                    yield from self._accept(row, own, sampling)

    def _accept(self, row: _Row, logits: Tensor, sampling: Sampling) -> Iterator[tuple[_Row, int | None]]:
        token = row.sampler(logits)
        if sampling.stop_at_eod and token == self.eod:
            row.limit = row.length  # ends here
            row.stopped = True
            yield row, None
            return
        row.new.append(token)
        yield row, token
        if row.length >= row.limit:
            yield row, None

    def _forward(self, cache: KVCache, tokens: list[list[int]], starts: list[int]) -> Tensor:
        """Logits [R, V] after the last of each row's tokens (equally many per row), which begin at `starts`."""
        device = self.weight.device
        batch = torch.tensor(tokens, device=device)
        positions = torch.tensor(starts, device=device)[:, None] + torch.arange(batch.shape[1], device=device)
        cache.extent = max(starts) + batch.shape[1]
        hidden = self.model(batch, positions=positions, cache=cache, head=False)
        logits: Tensor = self.model.embed_out(hidden[:, -1])
        return logits

    def _text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens) if self.tokenizer else ""


def _is_one(prompts: Prompt | Sequence[Prompt]) -> bool:
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))

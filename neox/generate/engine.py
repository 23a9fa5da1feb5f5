"""The inference engine: continuous batching over a paged key-value cache, for generation and scoring.

Requests join and leave between steps. A step is one forward pass over pending tokens of many requests: the last token
of each that decodes, and chunks of prompts. The scheduler decides which (`scheduler.py`); common prefixes are computed
once (`prefix.py`). Shapes: N packed tokens, R rows of logits, C hidden, V vocab.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from neox.generate.prefix import PrefixTree, Stats
from neox.generate.prompts import prompt_list, token_ids
from neox.generate.requests import Completion, Event, Generation, Request, Score, Scoring, check_tokens, token_logprob
from neox.generate.sampling import NOT_FINITE, Sampler, Sampling
from neox.generate.scheduler import Scheduler
from neox.generate.static_decode import StaticDecoder
from neox.generate.text_stream import TextStream
from neox.model.cache import BLOCK, KVCache, KVPool, Span
from neox.model.decoder import GPTNeoX
from neox.quantization.fused import decoder
from neox.system.device import free_memory
from neox.tokenizer import Tokenizer

Prompt = str | Sequence[int]
Drafter = Callable[[Sequence[list[int]], int], list[list[int]]]  # (sequences, limit) -> draft tokens after each


class Engine:
    """Generate from a loaded model, and score with it; the model is left as it is.

    `slots` sequences run at a time. `cache_bytes` bounds the memory of the key-value cache, in which sequences share a
    common prefix and which keeps it for later ones (default: enough for `slots` sequences at full context, at most half
    of the machine's memory). A step computes about `budget` tokens.

    Batch invariance: with a packed model on a CPU (`quantization.packed`, compiled kernels) a request's results are
    bit-identical whatever its batch, the cache's contents and the chunks of its prompt (design D16). With torch's own
    layers, and on other devices, they agree up to rounding.

    Speculative decoding: `drafter` proposes up to `draft_tokens` tokens after a sequence (`speculate.py`), and a step
    verifies them along with the last token. The output is that without drafts; `stats` counts what was accepted.

    With `static`, steps in which all requests decode, and are sampled from on the device, are passes of fixed shape
    (`static_decode.py`), and events come a step late. Default: on CUDA, without `drafter`.
    """

    def __init__(
        self,
        model: GPTNeoX,
        tokenizer: Tokenizer | None = None,
        slots: int = 8,
        cache_bytes: int | None = None,
        budget: int = 256,
        drafter: Drafter | None = None,
        draft_tokens: int = 7,
        static: bool | None = None,
    ) -> None:
        self.drafter, self.draft_tokens = drafter, draft_tokens
        self.model, self.tokenizer, self.slots = model.eval(), tokenizer, slots
        config, self.weight = model.config, next(model.parameters())
        one = KVPool.block_bytes(config, self.weight.dtype, model.heads)
        if cache_bytes is None:
            full = slots * -(-config.max_position_embeddings // BLOCK)
            cache_bytes = min(full * one, free_memory(self.weight.device) // 2)
        blocks = cache_bytes // one
        if blocks < 1:
            raise ValueError(f"{BLOCK} positions of cache take {one:,} bytes: raise cache_bytes")
        self._window = config.local_window if config.local_layers else 0
        self._decoder = decoder(model)
        self._pool = self._new_pool(blocks)
        self._scheduler = Scheduler(self._pool, PrefixTree(blocks), slots, budget)
        self._requests: dict[int, Generation] = {}
        self._submitted = 0
        self._events: list[Event] = []  # not handed out yet
        self.eod = tokenizer.eod_id if tokenizer else None
        self.num_real_tokens = min(tokenizer.vocab_size, config.vocab_size) if tokenizer else config.vocab_size
        fixed = (self.weight.device.type == "cuda" if static is None else static) and drafter is None
        self._static = StaticDecoder(model, self._pool, slots, self.num_real_tokens, self._window) if fixed else None

    @property
    def stats(self) -> Stats:
        """Counters of the prefix cache and of speculative decoding."""
        return self._scheduler.tree.stats

    @property
    def busy(self) -> bool:
        """True while a step has anything to do."""
        return bool(self._scheduler.waiting or self._scheduler.running or self._events)

    def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling: Sampling | Sequence[Sampling] | None = None
    ) -> list[Completion]:
        """Continue each prompt (text, or token ids); arguments and errors as in `events`."""
        many = prompt_list(prompts)
        done = {event.number: event.done for event in self.events(many, sampling, stream=False) if event.done}
        return [done[number] for number in range(len(many))]

    def stream(self, prompt: Prompt, sampling: Sampling | None = None) -> Iterator[str]:
        """Stream the text of one completion in whole characters; needs a byte-level tokenizer."""
        if self.tokenizer is None:
            raise ValueError("streaming text needs a tokenizer: this model was loaded without one")
        return (event.text for event in self.events([prompt], sampling) if event.text)

    def events(
        self, prompts: Sequence[Prompt], sampling: Sampling | Sequence[Sampling] | None = None, stream: bool = True
    ) -> Iterator[Event]:
        """Iterate over the steps of all sequences as they happen; closing the iterator cancels the rest.

        One `sampling` is for all prompts, the i-th sampling with seed + i; a list has one for each. Without `stream`
        the events carry no text (their completions do), and any tokenizer will do.
        Raises ValueError, before anything is computed, for a prompt that leaves no room in the context or the cache.
        """
        if isinstance(sampling, Sampling) or sampling is None:
            base = sampling or Sampling()
            sampling = [base.replace(seed=base.seed + number) for number in range(len(prompts))]
        requests = [self._generation(*pair, stream) for pair in zip(prompts, sampling, strict=True)]
        return self._run({request.number: number for number, request in enumerate(requests)}, requests)

    def submit(self, prompt: Prompt, sampling: Sampling | None = None, stream: bool = True) -> int:
        """Queue a prompt; returns the number of its events. Errors as in `events`."""
        request = self._generation(prompt, sampling or Sampling(), stream)
        self._start(request)
        return request.number

    def cancel(self, number: int) -> None:
        """Remove a request, waiting or running; it has no more events. Nothing happens if it has ended."""
        if request := self._requests.pop(number, None):
            self._scheduler.remove(request)
        self._events = [event for event in self._events if event.number != number]

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Run one forward pass; returns its events."""
        try:
            if not self._static_step():
                self._draft()
                if batch := self._scheduler.next_batch():
                    self._run_batch(batch)
        except BaseException:
            # The cache may be half written: all running requests are computed anew.
            self._scheduler.reset()
            if self._static:
                self._static.reset()
            raise
        events, self._events = self._events, []
        return events

    def score(self, requests: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Score]:
        """Score each (context, continuation), in their order; common prefixes are computed once.

        Log-probabilities are float32 over the full padded vocabulary; the head runs at the continuation only.
        Raises ValueError, before anything is computed, for an empty context or continuation, for both together if
        longer than the context and one, and for ids that the model does not have.
        """
        scorings: dict[tuple[int, tuple[int, ...]], Scoring] = {}
        members = []  # for each request: its scoring, and the number of its last token there
        for number, (context, continuation) in enumerate(requests):
            try:
                scoring = Scoring.checked(list(context), list(continuation), self.model.config)
                self._scheduler.check(scoring)
            except ValueError as error:
                raise ValueError(f"request {number}: {error}") from None
            # Requests that differ in their last token only, as in multiple choice, are one computation.
            same = scorings.setdefault((scoring.logits_from, tuple(scoring.tokens)), scoring)
            if same is not scoring:
                same.last_tokens += scoring.last_tokens
            members.append((same, len(same.last_tokens) - 1))
        # Sorted by tokens, so that requests with a common prefix follow each other while it is in the cache.
        order = sorted(scorings.values(), key=lambda scoring: scoring.tokens)
        try:
            for scoring in order:
                self._scheduler.add(scoring)
            for scoring in order:
                while not scoring.results:
                    self._events = self.step()
        except BaseException:
            for scoring in order:
                self._scheduler.remove(scoring)
            raise
        return [scoring.score(number) for scoring, number in members]

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt; an empty one becomes the end-of-document token.

        Raises ValueError for a prompt that leaves no room in the context, and for ids that the model does not have.
        """
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("a prompt in text needs a tokenizer: this model was loaded without one")
            tokens = self.tokenizer.encode(prompt)
        else:
            tokens = token_ids(prompt)
        if not tokens:
            tokens = [self.eod or 0]
        context = self.model.config.max_position_embeddings
        if len(tokens) >= context:
            raise ValueError(f"the prompt has {len(tokens)} tokens, the context {context}: shorten the prompt")
        check_tokens(tokens, self.model.config.vocab_size, "the prompt")
        return tokens

    def _new_pool(self, blocks: int) -> KVPool:
        """Allocate the key-value cache; `ShardedEngine` shares it with other processes."""
        return KVPool(self.model.config, blocks, self.weight.device, self.weight.dtype, self.model.heads)

    def _generation(self, prompt: Prompt, sampling: Sampling, stream: bool) -> Generation:
        if sampling.stop and self.tokenizer is None:
            raise ValueError("a stop string needs a tokenizer: this model was loaded without one")
        tokens = self.encode(prompt)
        limit = min(len(tokens) + sampling.max_tokens, self.model.config.max_position_embeddings)
        before = self.tokenizer.decode(tokens) if self.tokenizer and sampling.echo else ""
        streams = self.tokenizer and (stream or sampling.stop)
        text = TextStream(self.tokenizer, sampling.stop, before) if self.tokenizer and streams else None
        sampler = Sampler(sampling, self.num_real_tokens, tokens, self.tokenizer)
        request = Generation(self._submitted, tokens, limit, sampler, text, before)
        self._scheduler.check(request)
        self._submitted += 1
        return request

    def _start(self, request: Generation) -> None:
        self._scheduler.add(request)
        self._requests[request.number] = request

    def _run(self, numbers: dict[int, int], requests: list[Generation]) -> Iterator[Event]:
        try:
            for request in requests:
                self._start(request)
            for number in numbers:
                while number in self._requests:
                    events = self.step()
                    self._events = [event for event in events if event.number not in numbers]
                    for event in events:
                        if event.number in numbers:
                            yield Event(numbers[event.number], event.token, event.text, event.done)
        finally:
            for number in numbers:
                self.cancel(number)

    def _static_step(self) -> bool:
        """Submit a pass of fixed shape where all requests can take it, and accept the tokens of the pass before.

        False where an ordinary step comes next: no pass is in flight then.
        """
        static, scheduler = self._static, self._scheduler
        if static is None:
            return False
        running = [request for request in scheduler.running if isinstance(request, Generation)]
        static.retain(running)
        going = [request for request in running if len(request.tokens) + static.num_in_flight(request) < request.limit]
        able = len(running) == len(scheduler.running) and not scheduler.can_admit and static.can_run(running)
        able = able and all(scheduler.reserve(request, 1 + static.num_in_flight(request)) for request in going)
        if able and going:
            static.submit(going)
        while len(static.in_flight) > int(able and bool(going)):
            for request, token in static.collect():
                if request.number in self._requests:
                    self._accept_sampled(request, token, static)
        if not able:
            for request in running:
                static.write_back(request, request.computed)
        return able

    def _accept_sampled(self, request: Generation, token: int, static: StaticDecoder) -> None:
        """Accept a token that the device sampled."""
        if (request.computed + 1) % BLOCK == 0:
            static.write_back(request, request.computed + 1)  # the prefix cache gets the block
        self._scheduler.advance(request, 1)
        request.logits_from += 1
        if token < 0:
            self.cancel(request.number)
            raise ValueError(NOT_FINITE)
        self._append(request, token)

    def _run_batch(self, batch: list[tuple[Request, int]]) -> None:
        """Compute a batch, then sample from its logits or record log-probabilities."""
        hidden = self._forward(batch)
        rows: list[int] = []  # of hidden states whose logits are needed
        logit_rows, first = [], 0  # of each request
        for request, count in batch:
            needed = range(first + max(0, request.logits_from - request.computed), first + count)
            logit_rows.append(range(len(rows), len(rows) + len(needed)))
            rows += needed
            first += count
        logits = hidden.new_empty(0, self.model.config.vocab_size)
        if rows:
            logits = self._logits(hidden if len(rows) == len(hidden) else hidden[rows])
        scored = []
        for (request, count), numbers in zip(batch, logit_rows, strict=True):
            self._scheduler.advance(request, count - len(request.draft))
            if isinstance(request, Scoring):
                scored.append((request, numbers))
            elif isinstance(request, Generation):
                self._accept(request, logits[numbers.start : numbers.stop])
        Scoring.record(scored, logits)
        for one, _ in scored:
            if one.results:
                self._scheduler.remove(one)

    def _forward(self, batch: list[tuple[Request, int]]) -> Tensor:
        """The final hidden states [N, C] of a batch's tokens, request by request."""
        spans = [Span(request.table, request.computed, count) for request, count in batch]
        tokens = [t for request, count in batch for t in (request.tokens[request.computed :] + request.draft)[:count]]
        return self._decoder(tokens, spans, self._pool) if self._decoder else self._hidden(tokens, spans)

    def _hidden(self, tokens: list[int], spans: list[Span]) -> Tensor:
        """The final hidden states [N, C] by torch; `ShardedEngine` computes them on all processes."""
        cache = KVCache(self._pool, spans, self._window)
        batch = torch.tensor([tokens], device=self.weight.device)
        hidden: Tensor = self.model(batch, positions=cache.positions, cache=cache, head=False)[0]
        return hidden

    def _logits(self, hidden: Tensor) -> Tensor:
        """Logits [R, V] of hidden states [R, C]."""
        logits: Tensor = self._decoder.logits(hidden) if self._decoder else self.model.embed_out(hidden)
        return logits

    def _draft(self) -> None:
        """Give each decoding request with room for it a draft to verify."""
        if self.drafter is None:
            return
        running = [one for one in self._scheduler.running if isinstance(one, Generation) and one.pending == 1]
        rooms = [min(self.draft_tokens, one.limit - 1 - len(one.tokens)) for one in running]
        able = [(one, room) for one, room in zip(running, rooms, strict=True) if room > 0]
        if able:
            drafts = self.drafter([one.tokens for one, _ in able], max(room for _, room in able))
            for (one, room), draft in zip(able, drafts, strict=True):
                known = itertools.takewhile(lambda token: token < self.num_real_tokens, draft[:room])
                one.draft = list(known)

    def _accept(self, request: Generation, logits: Tensor) -> None:
        """Record the prompt's log-probabilities; sample after its last token and after each accepted draft token.

        Logits [R, V] are those from position `logits_from` on.
        """
        draft, request.draft = request.draft, []
        accepted = 0
        for row in logits:
            request.logits_from += 1
            if request.logits_from < len(request.tokens):
                asked = request.sampler.sampling.prompt_alternatives or 0
                token = request.tokens[request.logits_from]
                request.prompt_logprobs.append(token_logprob(token, row, asked, self.num_real_tokens))
                continue
            token = self._sample(request, row)
            if request.number not in self._requests or draft[accepted : accepted + 1] != [token]:
                break
            accepted += 1
        self.stats.drafted += len(draft)
        self.stats.accepted += accepted
        if accepted and request.number in self._requests:
            self._scheduler.advance(request, accepted)

    def _sample(self, request: Generation, logits: Tensor) -> int:
        """Sample the next token of a request from logits [V]; returns it."""
        try:
            token = request.sampler(logits)
        except ValueError:
            self.cancel(request.number)  # the others go on
            raise
        self._append(request, token, logits)
        return token

    def _append(self, request: Generation, token: int, logits: Tensor | None = None) -> None:
        """Append `token` to a request, or finish it."""
        sampling = request.sampler.sampling
        if reason := sampling.finish_reason(token, self.eod):
            self._finish(request, reason, None, "")
            return
        request.tokens.append(token)
        if logits is not None and sampling.logprobs is not None:
            request.logprobs.append(token_logprob(token, logits, sampling.logprobs, self.num_real_tokens))
        text = request.text.push(token) if request.text else ""
        if (request.text and request.text.stopped) or len(request.tokens) >= request.limit:
            self._finish(request, "length", token, text)
        else:
            request.shown.append(text)
            self._events.append(Event(request.number, token, text, None))

    def _finish(self, request: Generation, reason: str, token: int | None, text: str) -> None:
        del self._requests[request.number]
        self._scheduler.remove(request)
        if request.text:
            text += request.text.finish()
            request.shown.append(text)
        done = request.completion(reason, self.tokenizer)
        self._events.append(Event(request.number, token, text, done))

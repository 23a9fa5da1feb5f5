"""Backend of lm-evaluation-harness over our engine; it answers as lm-eval's `hf` backend does."""

import functools
import itertools
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from rich.progress import Progress

from neox.evaluation.answers import is_sampled
from neox.generate import Engine, Sampling, Score
from neox.model.flops import parameters
from neox.system.console import progress_bar

logger = logging.getLogger(__name__)
Pair = tuple[Sequence[int], Sequence[int]]
Keyed = tuple[tuple[str, str], list[int], list[int]]
CHUNK = 256  # requests scored in one call, between two updates of the progress bar
SAMPLING = ("top_k", "top_p", "min_p", "repetition_penalty")  # generation options with the same name in Sampling


class EngineLM(TemplateLM):
    """An engine and its tokenizer as a model for `lm_eval.simple_evaluate(model=...)`.

    It follows lm-eval's rules: contexts are truncated on the left; an empty one becomes the end-of-document token;
    trailing white space of a context belongs to the continuation; longer texts are scored in disjoint windows. Answers
    go to `cache_hook` one by one. Raises ValueError for a model without a tokenizer or an end-of-document token.
    """

    def __init__(self, engine: Engine, progress: bool = True) -> None:
        super().__init__()
        if engine.tokenizer is None:
            raise ValueError("evaluation needs a tokenizer: this model was loaded without one (tokenizer.json)")
        if engine.eod is None:
            raise ValueError("evaluation needs a tokenizer with an <|endoftext|> token: texts begin with it")
        self.engine, self.tokens, self.eod, self.progress = engine, engine.tokenizer, engine.eod, progress
        self._device = engine.weight.device
        # lm-eval encodes the context again for each choice, one after another: cached, they share one list.
        self._encode = functools.lru_cache(maxsize=8)(engine.tokenizer.encode)

    @property
    def eot_token_id(self) -> int:
        return self.eod

    @property
    def max_length(self) -> int:
        return self.engine.model.config.max_position_embeddings

    @property
    def max_gen_toks(self) -> int:
        return 256  # as lm-eval's hf backend has it

    @property
    def tokenizer_name(self) -> str:
        return self.tokens.sha256

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self._encode(string)

    def get_model_info(self) -> dict[str, Any]:
        """Facts about the model that lm-eval adds to the results."""
        count = parameters(self.engine.model.config).total
        return {"model_num_parameters": count, "model_dtype": str(self.engine.weight.dtype)}

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=not self.progress)  # its bar counts encoded requests

    def _loglikelihood_tokens(self, requests: list[Keyed], **kwargs: Any) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        pairs = [self._cut(*request) for request in requests]
        self._count_cuts((context for context, _ in pairs), (context for _, context, _ in requests))
        with self._bar("loglikelihood", len(requests)) as bar:
            for number, score in self._scores(pairs):
                answers[number] = score.logprob, score.is_greedy
                self.cache_hook.add_partial("loglikelihood", requests[number][0], answers[number])
                bar.advance(bar.task_ids[0])
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        pairs: list[Pair] = []
        owners: list[int] = []  # number of the request of each pair
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            pairs += map(make_disjoint_window, windows)
            owners += [number] * (len(pairs) - len(owners))
        answers, missing = [0.0] * len(requests), Counter(owners)
        with self._bar("loglikelihood_rolling", len(pairs)) as bar:
            for number, score in self._scores(pairs):
                owner = owners[number]
                answers[owner] += score.logprob
                missing[owner] -= 1
                if not missing[owner]:
                    self.cache_hook.add_partial("loglikelihood_rolling", requests[owner].args, answers[owner])
                bar.advance(bar.task_ids[0])
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        answers = [""] * len(requests)
        # Seeds count sampled requests only, so that they do not depend on which greedy ones are cached or elsewhere.
        seeds = itertools.count()
        asked = [
            self._sampling(request.args[1], next(seeds) if is_sampled("generate_until", request.args) else 0)
            for request in requests
        ]
        whole = [self.tok_encode(request.args[0]) for request in requests]
        prompts = [
            tokens[-(self.max_length - sampling.max_tokens) :] for tokens, sampling in zip(whole, asked, strict=True)
        ]
        self._count_cuts(prompts, whole)
        # In sorted order neighbours share the longest prefixes, while these are still in the cache.
        order = sorted(range(len(requests)), key=prompts.__getitem__)
        events = self.engine.events([prompts[n] for n in order], [asked[n] for n in order], stream=False)
        with self._bar("generate_until", len(requests)) as bar:
            for event in events:
                if event.done is None:
                    continue
                number = order[event.number]
                # The tokens, not the completion's text: of overlapping stop strings lm-eval takes the first of its
                # list, the engine the first in the text.
                text = self.tokens.decode(event.done.tokens, skip_special=True)
                answers[number] = postprocess_generated_text(text, list(asked[number].stop), None)
                self.cache_hook.add_partial("generate_until", requests[number].args, answers[number])
                bar.advance(bar.task_ids[0])
        return answers

    def _cut(self, key: tuple[str, str], context: list[int], continuation: list[int]) -> Pair:
        """Truncate a request on the left to the context; returns (context, continuation)."""
        if not 0 < len(continuation) <= self.max_length:
            raise ValueError(
                f"a continuation must have 1 to {self.max_length} tokens, the model's context; {len(continuation)} in "
                f"{key[1][:60]!r}"
            )
        # A context of white space alone is empty once that belongs to the continuation; lm-eval's hf backend fails.
        context = context or [self.prefix_token_id]
        room = self.max_length + 1 - len(continuation)
        # Not truncated, it stays the list that the choices share.
        return context if len(context) <= room else context[-room:], continuation

    def _count_cuts(self, cut: Iterable[Sequence[int]], whole: Iterable[Sequence[int]]) -> None:
        """Warn of truncated prompts."""
        cuts = [len(mine) < len(theirs) for mine, theirs in zip(cut, whole, strict=True)]
        if count := sum(cuts):
            logger.warning(
                "%d of %d prompts lose their beginning: the context is %d", count, len(cuts), self.max_length
            )

    def _scores(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Score]]:
        """Score the pairs in sorted order, so that shared prefixes come together; yields (number, score)."""
        order = sorted(range(len(pairs)), key=pairs.__getitem__)
        for start in range(0, len(order), CHUNK):
            chunk = order[start : start + CHUNK]
            yield from zip(chunk, self.engine.score([pairs[number] for number in chunk]), strict=True)

    def _sampling(self, options: dict[str, Any], seed: int) -> Sampling:
        """Translate lm-eval's generation options. Raises ValueError for those that the engine does not have."""
        options = dict(normalize_gen_kwargs(options, self.max_gen_toks))
        stop = handle_stop_sequences(options.pop("until"), eos=self.tokens.decode([self.eod]))
        length, temperature = options.pop("max_gen_toks"), options.pop("temperature", 0.0)
        if not options.pop("do_sample"):
            temperature = 0.0
        sampled = {name: options.pop(name) for name in SAMPLING if name in options}
        if options.pop("num_beams", 1) != 1 or options:
            raise ValueError(f"generation_kwargs: {', '.join(options) or 'num_beams'} is not supported by the engine")
        if length >= self.max_length:
            raise ValueError(
                f"max_gen_toks = {length} leaves no room for a prompt in the model's context of {self.max_length}"
            )
        return Sampling(
            max_tokens=length,
            temperature=float(temperature),
            seed=seed,
            stop=[text for text in stop if text],
            **sampled,
        )

    def _bar(self, what: str, total: int) -> Progress:
        bar = progress_bar("count", "rate", show=self.progress)
        bar.add_task(what, total=total)
        return bar

"""Speculative decoding: draft tokens that the engine verifies, several in one pass.

A draft is deterministic. The engine samples each token from the model's own distribution, with the request's own random
stream, and continues while the sampled token is the draft's. So a draft token x is accepted with probability p(x), else
a token of p without x takes its place: the rejection rule of Leviathan et al. 2023 (arXiv 2211.17192) and Chen et al.
2023 (arXiv 2302.01318) for a draft of probability one. Not only the distribution, the tokens themselves are those
without drafts.
"""

from collections.abc import Sequence

from neox.generate.engine import Engine
from neox.generate.sampling import Sampling
from neox.model.decoder import GPTNeoX

LONGEST = 3  # tokens of a sequence's end to look for


def prompt_lookup(sequences: Sequence[list[int]], limit: int) -> list[list[int]]:
    """Draft the tokens that followed the last earlier occurrence of a sequence's last three, two or one tokens.

    For output that repeats its input: summaries, code, answers with quotations (Saxena 2023, prompt lookup decoding).
    """
    return [_after_the_same(sequence, limit) for sequence in sequences]


def _after_the_same(tokens: list[int], limit: int) -> list[int]:
    longest = start = 0
    for stop in range(len(tokens) - 1, 0, -1):
        if tokens[stop - 1] != tokens[-1]:
            continue
        same = 1
        while same < min(LONGEST, stop) and tokens[stop - 1 - same] == tokens[-1 - same]:
            same += 1
        if same > longest:
            longest, start = same, stop
        if same == LONGEST:
            break
    return tokens[start : start + limit] if longest else []


class DraftModel:
    """Draft the most likely continuation by a smaller model with the same tokenizer.

    It runs in an engine of its own, whose prefix cache keeps the full blocks of a sequence; each draft computes up to
    one block of tokens again.
    """

    def __init__(self, model: GPTNeoX, slots: int = 8, cache_bytes: int | None = None) -> None:
        self.engine = Engine(model, slots=slots, cache_bytes=cache_bytes)

    def __call__(self, sequences: Sequence[list[int]], limit: int) -> list[list[int]]:
        context = self.engine.model.config.max_position_embeddings
        fitting = [number for number, tokens in enumerate(sequences) if len(tokens) < context]
        greedy = Sampling(max_tokens=limit, temperature=0, stop_at_eod=False)
        drafts: list[list[int]] = [[] for _ in sequences]
        done = self.engine.generate([sequences[number] for number in fitting], greedy)
        for number, completion in zip(fitting, done, strict=True):
            drafts[number] = completion.tokens
        return drafts

"""Guesses at what follows, for the engine to verify several tokens in one pass.

A guess is certain, not drawn. The engine draws each token from the model's own distribution, with the request's own
random stream, and goes on while what it draws is what was guessed. A guess x is thus accepted with probability p(x),
and else a token of p without x stands in its place: the rejection rule of Leviathan et al. 2023 (arXiv 2211.17192) and
Chen et al. 2023 (arXiv 2302.01318) for a guess of probability one. Beyond the distribution, the tokens themselves are
those that come without guesses.
"""

from collections.abc import Sequence

from neox.generate.engine import Engine
from neox.generate.sampling import Sampling
from neox.model.decoder import GPTNeoX

LONGEST = 3  # tokens that `prompt_lookup` looks for


def prompt_lookup(sequences: Sequence[list[int]], most: int) -> list[list[int]]:
    """What followed the last earlier occurrence of a sequence's end: of its last three tokens, two or one.

    For output that repeats its input: summaries, code, answers with quotations (Saxena 2023, prompt lookup decoding).
    """
    return [_after_the_same(sequence, most) for sequence in sequences]


def _after_the_same(tokens: list[int], most: int) -> list[int]:
    longest = found = 0
    for stop in range(len(tokens) - 1, 0, -1):
        if tokens[stop - 1] != tokens[-1]:
            continue
        same = 1
        while same < min(LONGEST, stop) and tokens[stop - 1 - same] == tokens[-1 - same]:
            same += 1
        if same > longest:
            longest, found = same, stop
        if same == LONGEST:
            break
    return tokens[found : found + most] if longest else []


class DraftModel:
    """The most likely continuation according to a smaller model with the same tokenizer.

    It runs in an engine of its own, whose prefix tree keeps what of a sequence was seen; only full blocks of it, so a
    guess begins with up to a block of tokens computed again.
    """

    def __init__(self, model: GPTNeoX, slots: int = 8, cache_bytes: int | None = None) -> None:
        self.engine = Engine(model, slots=slots, cache_bytes=cache_bytes)

    def __call__(self, sequences: Sequence[list[int]], most: int) -> list[list[int]]:
        context = self.engine.model.config.max_position_embeddings
        fitting = [number for number, tokens in enumerate(sequences) if len(tokens) < context]
        greedy = Sampling(max_tokens=most, temperature=0, stop_at_eod=False)
        guesses: list[list[int]] = [[] for _ in sequences]
        done = self.engine.generate([sequences[number] for number in fitting], greedy)
        for number, completion in zip(fitting, done, strict=True):
            guesses[number] = completion.tokens
        return guesses

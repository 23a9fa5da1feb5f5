"""One evaluation by several processes: each asks its share of the requests, and all of them know the answers."""

from bisect import bisect_left
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate, pairwise
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from neox.evaluation.answers import Ask, is_drawn, wrapped
from neox.system.processes import Processes

EACH = 16  # what a request costs beside its text, in characters: a pass, a row of logits


def shares(texts: Sequence[str], world: int) -> list[list[int]]:
    """The numbers of the texts that each process asks for: each text once.

    Texts with a common beginning are neighbours in the alphabet, and computed together. So each process has a stretch
    of it; the stretches are about equal in what a prefix tree leaves to compute, the characters that a text does not
    share with the one before it.
    """
    order = sorted(range(len(texts)), key=texts.__getitem__)
    before = ["", *(texts[number] for number in order)]
    costs = [EACH + len(text) - _common(other, text) for other, text in pairwise(before)]
    middles = [end - cost / 2 for end, cost in zip(accumulate(costs), costs, strict=True)]
    cuts = [bisect_left(middles, rank * sum(costs) / world) for rank in range(world)]
    return [order[start:end] for start, end in pairwise([*cuts, len(order)])]


def _common(one: str, other: str) -> int:
    """How many characters both begin with."""
    lengths = range(1, min(len(one), len(other)) + 1)
    return bisect_left(lengths, True, key=lambda length: one[:length] != other[:length])


def shared(model: LM, processes: Processes) -> AbstractContextManager[None]:
    """Inside, `model` is asked for this process' share of the requests, and the others' answers come from them.

    All processes are given the same requests, in the same order. What is drawn at random each asks by itself: which
    number a draw has must not depend on how many processes there are.
    """
    return wrapped(model, lambda method, ask: _divided(ask, processes)) if processes.world > 1 else nullcontext()


def _divided(ask: Ask, processes: Processes) -> Ask:
    import torch.distributed as dist

    def answers(requests: list[Instance], **options: Any) -> list[Any]:
        alike = [n for n, request in enumerate(requests) if not is_drawn(request.request_type, request.args)]
        texts = ["".join(part for part in requests[number].args if isinstance(part, str)) for number in alike]
        parts = [[alike[place] for place in share] for share in shares(texts, processes.world)]
        drawn = sorted(set(range(len(requests))) - set(alike))
        parts = [[*part, *drawn] for part in parts]
        mine = parts[processes.rank]
        own = ask([requests[number] for number in mine], **options) if mine else []
        gathered: list[Any] = [None] * processes.world
        dist.all_gather_object(gathered, own)
        pairs = (pair for part, found in zip(parts, gathered, strict=True) for pair in zip(part, found, strict=True))
        found = dict(pairs)
        return [found[number] for number in range(len(requests))]

    return answers

"""Distribute the requests of an evaluation over processes; every process gets all answers."""

from bisect import bisect_left
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate, pairwise
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from neox.evaluation.answers import Ask, is_sampled, wrapped
from neox.system.processes import Processes

REQUEST_COST = 16  # fixed cost of a request, in characters: a forward pass, a row of logits


def split_requests(texts: Sequence[str], world: int) -> list[list[int]]:
    """Assign each text to one process; returns the numbers of each process's texts.

    Texts with a common prefix are adjacent in sorted order and share computation, so each process gets a contiguous
    part of that order. The parts are balanced by the characters that a prefix cache leaves to compute: those that a
    text does not share with the one before it.
    """
    order = sorted(range(len(texts)), key=texts.__getitem__)
    before = ["", *(texts[number] for number in order)]
    costs = [REQUEST_COST + len(text) - _common(other, text) for other, text in pairwise(before)]
    middles = [end - cost / 2 for end, cost in zip(accumulate(costs), costs, strict=True)]
    cuts = [bisect_left(middles, rank * sum(costs) / world) for rank in range(world)]
    return [order[start:end] for start, end in pairwise([*cuts, len(order)])]


def _common(one: str, other: str) -> int:
    """Length of the common prefix."""
    lengths = range(1, min(len(one), len(other)) + 1)
    return bisect_left(lengths, True, key=lambda length: one[:length] != other[:length])


def distributed(model: LM, processes: Processes) -> AbstractContextManager[None]:
    """Answer only this process's share of the requests inside; the other processes send the rest.

    All processes get the same requests in the same order. Each of them answers sampled requests by itself, because the
    seed of a sampled answer must not depend on the number of processes.
    """
    return wrapped(model, lambda method, ask: _distributed(ask, processes)) if processes.world > 1 else nullcontext()


def _distributed(ask: Ask, processes: Processes) -> Ask:
    import torch.distributed as dist

    def answers(requests: list[Instance], **options: Any) -> list[Any]:
        fixed = [n for n, request in enumerate(requests) if not is_sampled(request.request_type, request.args)]
        texts = ["".join(part for part in requests[number].args if isinstance(part, str)) for number in fixed]
        sampled = sorted(set(range(len(requests))) - set(fixed))
        parts = [[*(fixed[n] for n in share), *sampled] for share in split_requests(texts, processes.world)]
        mine = parts[processes.rank]
        local = ask([requests[number] for number in mine], **options) if mine else []
        gathered: list[Any] = [None] * processes.world
        dist.all_gather_object(gathered, local)
        by_number = {n: a for part, new in zip(parts, gathered, strict=True) for n, a in zip(part, new, strict=True)}
        return [by_number[number] for number in range(len(requests))]

    return answers

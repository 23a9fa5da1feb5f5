"""Tensor-parallel generation: several processes, each with its share of every matrix and of the cache's heads.

Rank 0 runs the engine and its scheduler. The other ranks run `worker_loop`: before each forward pass rank 0 broadcasts
the tokens to compute and the changes to the cache's memory. So they cannot drift apart, and scoring and speculation
work as well. The logits of each slice of the vocabulary are gathered on rank 0, which samples.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from neox.generate.engine import Drafter, Engine
from neox.model.cache import KVCache, KVPool, Span
from neox.model.decoder import GPTNeoX
from neox.tokenizer import Tokenizer

CPU = torch.device("cpu")  # messages go over gloo, whichever backend the tensors take


class ShardedEngine(Engine):
    """The engine on rank 0 of a sharded model (`parallel.inference`), the other ranks being in `worker_loop`.

    Results are those of one process up to rounding.
    """

    def __init__(
        self,
        model: GPTNeoX,
        tokenizer: Tokenizer | None = None,
        slots: int = 8,
        cache_bytes: int | None = None,
        budget: int = 256,
        drafter: Drafter | None = None,
    ) -> None:
        super().__init__(model, tokenizer, slots, cache_bytes, budget, drafter=drafter, static=False)

    def shutdown(self) -> None:
        """End the other ranks' `worker_loop`; between two passes only."""
        _broadcast("end")

    def _new_pool(self, blocks: int) -> KVPool:
        _broadcast("pool", blocks, self.model.heads)
        self._recorded = _RecordingPool(
            self.model.config, blocks, self.weight.device, self.weight.dtype, self.model.heads
        )
        return self._recorded

    def _hidden(self, tokens: list[int], spans: list[Span]) -> Tensor:
        changes, self._recorded.changes = self._recorded.changes, []
        _broadcast("pass", changes, tokens, spans, self._window)
        return super()._hidden(tokens, spans)

    def _logits(self, hidden: Tensor) -> Tensor:
        hidden = hidden.contiguous()
        _broadcast("head", tuple(hidden.shape))
        dist.broadcast(hidden, 0)
        return super()._logits(hidden)


class _RecordingPool(KVPool):
    """A pool that records the changes to its memory; the other ranks repeat them before the next pass."""

    changes: list[tuple[str, tuple[int, ...]]]

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.changes = []

    def clear(self, block: int) -> None:
        super().clear(block)
        self.changes.append(("clear", (block,)))

    def copy(self, source: int, target: int, count: int) -> None:
        super().copy(source, target, count)
        self.changes.append(("copy", (source, target, count)))


@torch.inference_mode()
def worker_loop(model: GPTNeoX) -> None:
    """Repeat rank 0's passes on this rank's share of the model, until rank 0 shuts the engine down."""
    weight = next(model.parameters())
    pool = None
    while True:
        kind, *message = _broadcast()
        if kind == "end":
            return
        if kind == "pool":
            blocks, heads = message
            pool = KVPool(model.config, blocks, weight.device, weight.dtype, heads)
        elif kind == "pass":
            assert pool is not None
            changes, tokens, spans, window = message
            for change, arguments in changes:
                getattr(pool, change)(*arguments)
            cache = KVCache(pool, spans, window)
            model(torch.tensor([tokens], device=weight.device), positions=cache.positions, cache=cache, head=False)
        else:
            hidden = torch.empty(*message, dtype=weight.dtype, device=weight.device)
            dist.broadcast(hidden, 0)
            model.embed_out(hidden)


def _broadcast(*message: Any) -> Any:
    """Rank 0's message, on all ranks."""
    messages = [message]
    dist.broadcast_object_list(messages, 0, device=CPU)
    return messages[0]

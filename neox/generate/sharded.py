"""Generation by several processes, each with its share of every matrix and its heads' part of the cache.

Rank 0 runs the engine. The others have no schedule and draw nothing: before each forward pass rank 0 tells them what to
compute, in which memory. So they cannot drift apart, and whatever the engine does, scoring and speculation too, is
done by all. The logits of a slice of the vocabulary are one process's and are gathered: rank 0 draws from those of all.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from neox.generate.engine import Engine, Guess
from neox.model.cache import KVCache, KVPool
from neox.model.decoder import GPTNeoX
from neox.tokenizer import Tokenizer

CPU = torch.device("cpu")  # words go over gloo, whatever the tensors take


class Leader(Engine):
    """The engine on rank 0, with a model in parts (`parallel.inference`). The other ranks are in `follow`, until
    `dismiss`. Results are those of one process up to rounding: `invariant` is off."""

    def __init__(
        self,
        model: GPTNeoX,
        tokenizer: Tokenizer | None = None,
        slots: int = 8,
        cache_bytes: int | None = None,
        budget: int = 256,
        guess: Guess | None = None,
    ) -> None:
        super().__init__(model, tokenizer, slots, cache_bytes, budget, invariant=False, guess=guess, static=False)
        _tell("pool", self._scheduler.tree.blocks, self._pool.keys.shape[1])
        self._told = _ToldPool(self._pool)
        self._pool = self._scheduler.pool = self._told
        model.register_forward_pre_hook(self._tell_pass, with_kwargs=True)
        model.embed_out.register_forward_pre_hook(_tell_head)

    def _tell_pass(self, model: nn.Module, arguments: Any, options: dict[str, Any]) -> None:
        changes, self._told.changes = self._told.changes, []
        _tell("pass", changes, arguments[0].tolist(), options["cache"].made)

    def dismiss(self) -> None:
        """Let the others go; between two passes only."""
        _tell("end")


class _ToldPool(KVPool):
    """A pool that keeps what was done to its memory, for the others to do it before the next pass."""

    def __init__(self, pool: KVPool) -> None:
        self.keys, self.values = pool.keys, pool.values
        self.changes: list[tuple[str, tuple[int, ...]]] = []

    def clear(self, block: int) -> None:
        super().clear(block)
        self.changes.append(("clear", (block,)))

    def copy(self, source: int, target: int, count: int) -> None:
        super().copy(source, target, count)
        self.changes.append(("copy", (source, target, count)))


@torch.inference_mode()
def follow(model: GPTNeoX) -> None:
    """Compute what rank 0 computes, until it says that this is all."""
    weight = next(model.parameters())
    pool = None
    while True:
        kind, *what = _tell()
        if kind == "end":
            return
        if kind == "pool":
            blocks, heads = what
            pool = KVPool(model.config, blocks, weight.device, weight.dtype, heads)
        elif kind == "pass":
            assert pool is not None
            changes, tokens, made = what
            for change, where in changes:
                getattr(pool, change)(*where)
            cache = KVCache(pool, *made)
            model(torch.tensor(tokens, device=weight.device), positions=cache.positions, cache=cache, head=False)
        else:
            hidden = torch.empty(*what, dtype=weight.dtype, device=weight.device)
            dist.broadcast(hidden, 0)
            model.embed_out(hidden)


def _tell_head(head: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
    hidden = arguments[0].contiguous()
    _tell("head", tuple(hidden.shape))
    dist.broadcast(hidden, 0)
    return (hidden,)


def _tell(*words: Any) -> Any:
    """What rank 0 says, on all ranks."""
    said = [words]
    dist.broadcast_object_list(said, 0, device=CPU)
    return said[0]

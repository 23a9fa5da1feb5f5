"""The paged key-value cache: a pool of memory in blocks that sequences share, and a forward pass's view of it.

Shapes: L layers, H heads, P positions in the pool, D head_dim, N packed tokens, S positions that a group attends to.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from neox.config import ModelConfig

BLOCK = 16  # positions a block

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Cache(Protocol):
    """The key-value cache of one forward pass, as the model sees it (design D3)."""

    extent: int  # positions of the longest sequence
    positions: Tensor  # [1, N]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, local: bool, attention: Attend) -> Tensor:
        """Store keys and values [1, H, N, D]; returns attention [1, H, N, D] of each query over its own sequence.

        `attention` computes a group: (q [b, H, t, D], k, v [b, H, S, D], mask [b, 1, t, S]) -> [b, H, t, D].
        """
        ...


class KVPool:
    """Keys and values [L, H, P, D] of `blocks` blocks, which the engine's prefix cache allocates.

    `heads` is the number of heads on this process; 0 means all.
    """

    def __init__(
        self,
        config: ModelConfig,
        blocks: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        heads: int = 0,
    ) -> None:
        heads = heads or config.num_attention_heads
        shape = (config.num_hidden_layers, heads, blocks * BLOCK, config.head_dim)
        # Not zeroed: the system gives memory page by page as it is touched, so a large pool costs what is used of it.
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)

    @staticmethod
    def block_bytes(config: ModelConfig, dtype: torch.dtype, heads: int = 0) -> int:
        heads = heads or config.num_attention_heads
        return 2 * BLOCK * config.num_hidden_layers * heads * config.head_dim * dtype.itemsize

    def clear(self, block: int) -> None:
        """Zero a block: a masked position has weight zero, and zero times uninitialized memory may be nan."""
        positions = slice(block * BLOCK, (block + 1) * BLOCK)
        self.keys[:, :, positions] = 0
        self.values[:, :, positions] = 0

    def copy(self, source: int, target: int, count: int) -> None:
        """Copy the first `count` positions of block `source` to block `target`."""
        for memory in (self.keys, self.values):
            memory[:, :, target * BLOCK :][:, :, :count] = memory[:, :, source * BLOCK :][:, :, :count]


@dataclass(frozen=True)
class Span:
    """New tokens of one sequence: `count` of them from position `start` on."""

    table: Sequence[int]  # the sequence's blocks, from its first position on
    start: int
    count: int


class _Group(NamedTuple):
    """Spans of equal height, attended to together."""

    rows: Tensor  # [b, t]: the packed token of each query
    blocks: Tensor | slice  # [b, S / BLOCK], or the pool's positions where one sequence is contiguous
    mask: Tensor  # [b, 1, t, S]
    local_mask: Tensor | None


class KVCache:
    """The pool in one forward pass: spans of several sequences, packed one after the other in one row.

    Each token attends to its own sequence, up to its own position.
    """

    def __init__(self, pool: KVPool, spans: Sequence[Span], window: int = 0) -> None:
        self.pool = pool
        device = pool.keys.device
        self.extent = max(span.start + span.count for span in spans)
        positions, slots = [], []
        together: dict[tuple[int, int], list[tuple[int, Span]]] = {}
        first = 0
        for number, span in enumerate(spans):
            positions.append(torch.arange(span.start, span.start + span.count))
            slots.append(torch.tensor(span.table)[positions[-1] // BLOCK] * BLOCK + positions[-1] % BLOCK)
            # A contiguous sequence is read in place, by itself; the others of its height are gathered together.
            together.setdefault((span.count, number + 1 if _is_contiguous(span) else 0), []).append((first, span))
            first += span.count
        self.positions = torch.cat(positions)[None].to(device)
        self.slots = torch.cat(slots).to(device)
        self.groups = [_group(height, members, window, device) for (height, _), members in together.items()]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, local: bool, attention: Attend) -> Tensor:
        """`Cache.attend`, by groups of spans."""
        keys, values = self.pool.keys[layer], self.pool.values[layer]
        keys[:, self.slots] = k[0].to(keys.dtype)
        values[:, self.slots] = v[0].to(values.dtype)
        out = torch.empty_like(q)
        for group in self.groups:
            mask = group.local_mask if local and group.local_mask is not None else group.mask
            queries = q[0][:, group.rows].transpose(0, 1)
            result = attention(queries, _read(keys, group.blocks), _read(values, group.blocks), mask)
            out[0][:, group.rows] = result.transpose(0, 1)
        return out


def _visible(span: Span) -> int:
    """Blocks that the span's last token attends to."""
    return -(-(span.start + span.count) // BLOCK)


def _is_contiguous(span: Span) -> bool:
    table = span.table[: _visible(span)]
    return list(table) == list(range(table[0], table[0] + len(table)))


def _group(height: int, members: list[tuple[int, Span]], window: int, device: torch.device) -> _Group:
    offsets = torch.arange(height)
    rows = offsets + torch.tensor([[first] for first, _ in members])
    positions = offsets + torch.tensor([[span.start] for _, span in members])
    longest = max(_visible(span) for _, span in members)
    blocks: Tensor | slice
    if len(members) == 1 and _is_contiguous(span := members[0][1]):
        blocks = slice(span.table[0] * BLOCK, (span.table[0] + longest) * BLOCK)
    else:
        # A shorter sequence's first block stands in for what it does not have; nothing of it is seen.
        tables = [list(span.table[: _visible(span)]) for _, span in members]
        blocks = torch.tensor([table + table[:1] * (longest - len(table)) for table in tables], device=device)
    distance = positions[:, None, :, None] - torch.arange(longest * BLOCK)
    mask = distance >= 0
    local_mask = (mask & (distance < window)).to(device) if window else None
    return _Group(rows.to(device), blocks, mask.to(device), local_mask)


def _read(memory: Tensor, blocks: Tensor | slice) -> Tensor:
    """Keys or values [b, H, S, D] of one layer's memory [H, P, D]."""
    if isinstance(blocks, slice):
        return memory[None, :, blocks]
    heads, _, width = memory.shape
    gathered = memory.view(heads, -1, BLOCK, width).index_select(1, blocks.flatten())
    return gathered.view(heads, blocks.shape[0], -1, width).transpose(0, 1)

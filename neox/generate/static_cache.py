"""The static key-value cache, for passes of fixed shapes and addresses (`static_decode.py`).

Shapes: H heads, D head_dim, b rows, S extent.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from neox.model.cache import BLOCK, Attend, KVPool


class StaticCache:
    """The static cache: keys and values of a fixed number of sequences, each in its own row, copied from the pool.

    Shapes and addresses stay, and a pass's inputs are tensors: so a pass of one token a row can be captured as a CUDA
    graph, and its attention reads each key once. The owner assigns rows to sequences.
    """

    def __init__(self, pool: KVPool, rows: int, extent: int, window: int = 0) -> None:
        self.pool, self.window = pool, window
        layers, heads, _, width = pool.keys.shape
        # Zeroed: a masked position has weight zero, and zero times uninitialized memory may be nan. One more position,
        # that nothing reads, is for rows without a token.
        self.keys = pool.keys.new_zeros(layers, rows, heads, extent + 1, width)
        self.values = torch.zeros_like(self.keys)
        self.view(torch.zeros(rows, dtype=torch.long, device=pool.keys.device), extent)

    @staticmethod
    def bytes(pool: KVPool, rows: int, extent: int) -> int:
        layers, heads, _, width = pool.keys.shape
        return 2 * layers * rows * heads * (extent + 1) * width * pool.keys.dtype.itemsize

    def clear(self) -> None:
        """Zero all rows in place: values that are not finite would reach the next sequence."""
        self.keys.zero_()
        self.values.zero_()

    @property
    def longest(self) -> int:
        """Positions of a row."""
        return self.keys.shape[3] - 1

    def view(self, positions: Tensor, extent: int) -> "StaticCache":
        """Prepare a pass over one token a row, at `positions` [b] below `extent`; -1 for a row without a token."""
        self.extent, self.positions = extent, positions.clamp(min=0)[None]
        self._places = torch.where(positions < 0, self.longest, positions)
        distance = self.positions[0][:, None] - torch.arange(extent, device=positions.device)
        self._mask = (distance >= 0)[:, None, None]  # [b, 1, 1, S]
        self._local_mask = self._mask & (distance < self.window)[:, None, None] if self.window else self._mask
        return self

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, local: bool, attention: Attend) -> Tensor:
        """`Cache.attend` for q, k, v [1, H, b, D], one token a row."""
        rows = q.shape[2]
        keys, values = self.keys[layer, :rows], self.values[layer, :rows]
        positions = self._places[:, None, None, None].expand(rows, q.shape[1], 1, q.shape[3])
        for memory, new in ((keys, k), (values, v)):
            memory.scatter_(2, positions, new[0].transpose(0, 1)[:, :, None].to(memory.dtype))
        queries = q[0].transpose(0, 1)[:, :, None]  # [b, H, 1, D]
        mask = self._local_mask if local else self._mask
        result = attention(queries, keys[:, :, : self.extent], values[:, :, : self.extent], mask)
        return result[:, :, 0].transpose(0, 1)[None]

    def load(self, row: int, table: Sequence[int], start: int, stop: int) -> None:
        """Copy positions of a sequence with the blocks `table` from the pool."""
        positions = torch.arange(start, stop)
        places = (torch.tensor(table)[positions // BLOCK] * BLOCK + positions % BLOCK).to(self.keys.device)
        self.keys[:, row, :, start:stop] = self.pool.keys[:, :, places]
        self.values[:, row, :, start:stop] = self.pool.values[:, :, places]

    def store(self, row: int, block: int, start: int, stop: int) -> None:
        """Copy positions, of one block, to the pool's `block`."""
        target = slice(block * BLOCK + start % BLOCK, block * BLOCK + start % BLOCK + stop - start)
        self.pool.keys[:, :, target] = self.keys[:, row, :, start:stop]
        self.pool.values[:, :, target] = self.values[:, row, :, start:stop]

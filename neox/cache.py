"""The key-value cache: data that the engine owns and the model reads and appends to.

Shapes: L layers, B rows (one sequence each), H heads, S stored positions, D head_dim, T new tokens.
"""

import copy

import torch
from torch import Tensor

from neox.config import ModelConfig


class KVCache:
    """Keys and values [L, B, H, S, D] of B sequences that advance independently of each other.

    `extent` is how many positions attention looks at: the engine sets it to the largest position in use plus one before
    each forward pass, so that short sequences do not pay for the room that was reserved. Positions that a row has not
    written are never seen, because a query at position p sees keys 0 .. p only.
    """

    def __init__(
        self,
        config: ModelConfig,
        rows: int,
        length: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (config.num_hidden_layers, rows, config.num_attention_heads, length, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.extent = 0

    def rows(self, start: int, stop: int) -> "KVCache":
        """The same memory, rows start .. stop - 1 of it."""
        view = copy.copy(self)
        view.keys, view.values = self.keys[:, start:stop], self.values[:, start:stop]
        return view

    def move(self, source: int, target: int) -> None:
        """Copy what row `source` has stored to row `target`."""
        if source != target:
            self.keys[:, target] = self.keys[:, source]
            self.values[:, target] = self.values[:, source]

    @property
    def length(self) -> int:
        """Positions that there is room for."""
        return self.keys.shape[3]

    def append(self, layer: int, keys: Tensor, values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values [B, H, T, D] at positions [B, T]; return all of the layer's, [B, H, extent, D]."""
        rows = torch.arange(positions.shape[0], device=positions.device)[:, None]
        self.keys[layer][rows, :, positions] = keys.transpose(1, 2).to(self.keys.dtype)
        self.values[layer][rows, :, positions] = values.transpose(1, 2).to(self.values.dtype)
        return self.keys[layer, :, :, : self.extent], self.values[layer, :, :, : self.extent]

"""How many rows a matrix product must have for each of them to be rounded as if it were alone (design D16).

Products of one, two or three rows take other code paths than those of many, and threads that share rows make few of
many. Which numbers are safe depends on processor, library and kind of weights, so it is tried on the model's own
layers: where code paths differ, random values differ in some of a product's many results.
"""

import torch
from torch import nn

from neox.model import GPTNeoX

CANDIDATES = (1, 4, 8, 16, 32, 64)


@torch.inference_mode()
def row_tile(model: GPTNeoX, most: int) -> int:
    """The smallest candidate such that products of its multiples, up to about `most` rows, give equal rows bit for bit;
    `most` itself, a single height, where none does."""
    parameter = next(model.parameters())
    layers: dict[tuple[object, int, int], nn.Module] = {}
    for module in model.modules():
        width, height = getattr(module, "in_features", None), getattr(module, "out_features", None)
        if isinstance(width, int) and isinstance(height, int):
            layers.setdefault((type(module), width, height), module)
    tile = 1
    for (_, width, _), layer in layers.items():
        x = torch.randn(most, width, generator=torch.Generator().manual_seed(0)).to(parameter)
        tile = next((rows for rows in CANDIDATES if rows >= tile and rows < most and _holds(layer, x, rows)), most)
    return tile


def _holds(layer: nn.Module, x: torch.Tensor, rows: int) -> bool:
    whole = layer(x)
    # At several places, as a row's place in its product must not matter either.
    places = [(start, height) for height in (rows, 2 * rows, 3 * rows) for start in (0, 1, 5)]
    fitting = [(start, start + height) for start, height in places if start + height <= len(x)]
    return all(torch.equal(layer(x[start:stop]), whole[start:stop]) for start, stop in fitting)

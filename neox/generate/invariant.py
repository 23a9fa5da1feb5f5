"""How many rows a matrix product must have for each of them to be rounded as if it were alone (design D16), and how
many keys attention must read for a query to be rounded as it is among others.

Products of one, two or three rows take other code paths than those of many, and threads that share rows make few of
many. Which numbers are safe depends on processor, library and kind of weights, so it is tried on the model's own
layers: where code paths differ, random values differ in some of a product's many results.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neox.model.cache import BLOCK
from neox.model.decoder import GPTNeoX

CANDIDATES = (1, 4, 8, 16, 32, 64)
KEYS = 512  # attention on a CPU reads keys in parts of so many


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


@torch.inference_mode()
def key_steps(model: GPTNeoX) -> tuple[int, int]:
    """(a, b): a query's attention over S keys is rounded alike for every S up to a, and for multiples of b.

    What is masked adds zero, but a product over fewer keys than KEYS may be cut in halves, the sooner the shorter it
    is. b is the model's whole context where even multiples of KEYS differ.
    """
    context = model.config.max_position_embeddings
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(3, 1, 1, 3 * KEYS, model.config.head_dim, generator=generator).to(next(model.parameters()))
    whole = [_attended(draw, visible, KEYS) for visible in range(BLOCK, KEYS + 1, BLOCK)]
    same = [torch.equal(_attended(draw, (n + 1) * BLOCK, (n + 1) * BLOCK), one) for n, one in enumerate(whole)]
    longer = all(torch.equal(_attended(draw, (n + 1) * BLOCK, 3 * KEYS), one) for n, one in enumerate(whole))
    return (same.index(False) if False in same else len(same)) * BLOCK, KEYS if longer else context


def _attended(draw: Tensor, visible: int, keys: int) -> Tensor:
    """Attention of four queries over `keys` keys of which the first so many are visible."""
    q, k, v = draw
    mask = (torch.arange(keys, device=draw.device) < visible).expand(1, 1, 4, keys)
    return F.scaled_dot_product_attention(q[:, :, :4], k[:, :, :keys], v[:, :, :keys], attn_mask=mask)

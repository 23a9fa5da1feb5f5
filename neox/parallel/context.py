"""Context parallelism: each process holds a part of every sequence and attends over all of it.

Shapes: B batch, H heads, T time, D head_dim, n processes, c = T / 2n.

A sequence is cut into 2n slices of c tokens. Process r has slices r and 2n-1-r: its queries see r+1 and 2n-r slices
of keys, 2n+1 in all, as many as any other's. Keys and values are gathered; their gradients, summed, go back to where
they belong (all-gather, reduce-scatter), which is exact and needs no kernel but the usual ones.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from neox.config import ModelConfig
from neox.model.decoder import Attention, GPTNeoX, attention_masks
from neox.parallel import collectives


def own_slices(x: Tensor, rank: int, size: int, dim: int = 1) -> Tensor:
    """The two slices along `dim` of process `rank` of `size`."""
    slices = x.chunk(2 * size, dim)
    return torch.cat((slices[rank], slices[2 * size - 1 - rank]), dim)


def ordered(x: Tensor, size: int, dim: int) -> Tensor:
    """Restore a sequence's order from the parts of all processes, concatenated."""
    slices = x.chunk(2 * size, dim)
    return torch.cat(slices[::2] + slices[1::2][::-1], dim)


def split_batch(batch: Any, rank: int, size: int) -> Any:
    """Cut a batch to the tokens, labels, positions and segments of process `rank`."""
    return replace(
        batch,
        tokens=own_slices(batch.tokens, rank, size),
        labels=own_slices(batch.labels, rank, size),
        positions=own_slices(batch.positions, rank, size),
        segments=None if batch.segments is None else own_slices(batch.segments, rank, size),
    )


def split_sequences(model: GPTNeoX, group: ProcessGroup) -> None:
    """Make the model, or a part of it, take batches cut by `split_batch`."""
    model.masks = partial(_masks, group=group)
    for block in model.layers:
        attention = block.attention
        assert isinstance(attention, Attention)
        # Of the instance: the method stands for one process.
        attention.__dict__["attend"] = partial(_attend, scale=attention.scale, group=group)


def _masks(
    config: ModelConfig, positions: Tensor, segments: Tensor | None, group: ProcessGroup
) -> tuple[Tensor | None, Tensor | None]:
    """`attention_masks`' rows for local queries, [B, 1, T / n, T]; keys stand in the sequence's order."""
    rank, size = group.rank(), group.size()
    order = torch.arange(positions.shape[1] * size, device=positions.device)[None]
    if segments is not None:
        segments = ordered(collectives.gather_from_sequence_region(segments, 1, group), size, 1)
    masks = attention_masks(config, order, segments)
    global_mask, local_mask = (None if mask is None else own_slices(mask, rank, size, dim=2) for mask in masks)
    if global_mask is None:
        # A causal kernel wants queries that begin where keys do. Ours sits at the end of the keys that it sees.
        own = own_slices(order, rank, size)
        global_mask = (own[:, :, None] >= order[:, None, :])[:, None]
    return global_mask, local_mask


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scale: float | None, group: ProcessGroup
) -> Tensor:
    """Attention of local queries over all keys and values; each [B, H, T / n, D]."""
    assert mask is not None, "made by _masks"
    rank, size = group.rank(), group.size()
    k, v = ordered(collectives.gather_from_sequence_region(torch.stack((k, v)), 3, group), size, 3)
    c = q.shape[2] // 2
    outputs = []
    for own, place in ((slice(0, c), rank), (slice(c, 2 * c), 2 * size - 1 - rank)):
        seen = (place + 1) * c  # none of the keys after it
        keys, values, seen_by = k[:, :, :seen], v[:, :, :seen], mask[:, :, own, :seen]
        outputs.append(F.scaled_dot_product_attention(q[:, :, own], keys, values, attn_mask=seen_by, scale=scale))
    return torch.cat(outputs, dim=2)

"""Weights in the order in which the kernels read them, and back: the definition of every kind, in plain torch.

Shapes: N outputs, K inputs, P = ceil(N / 16) panels, G = ceil(K / 128) groups. A panel holds 16 outputs side by side,
so that one lane of a vector register is one output.

    fp32, fp16, bf16   weights [P, K, 16]
    int8               weights int8 [P, 32 G, 16, 4], the last axis 4 neighbours in k; scales fp32 [N]
    int4               weights uint8 [P, 16 G, 16, 4]: w + 8 of 4 neighbours in the low half of a byte, of the next 4 in
                       the high half; scales bf16 [P, G, 16]

int8 is symmetric, its scale the row's largest magnitude / 127. int4 is symmetric in groups of 128 of a row: -8 .. 7
times a scale, of a few candidates the one with the least squared error.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

Kind = Literal["fp32", "fp16", "bf16", "int8", "int4"]
KINDS: tuple[Kind, ...] = get_args(Kind)  # in the order of the C source
FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LANES, GROUP = 16, 128
CHUNK = 512  # outputs that are packed or unpacked at a time: their float32 copies are all the memory it takes
# Shares of the group's largest magnitude that -8 stands for. What is beyond 7 / 8 on the other side is cut off.
CANDIDATES = (1.0, 0.93, 0.86, -1.0, -0.93, -0.86)


class Packed(NamedTuple):
    """A weight [outputs, inputs] as its kind stores it."""

    kind: Kind
    outputs: int
    inputs: int
    weights: Tensor
    scales: Tensor | None  # None for the float kinds


def pack(weight: Tensor, kind: Kind, name: str = "a weight") -> Packed:
    """Store weight [N, K], of any floating type, on the CPU. Temporary memory: a few float32 copies of 512 rows.

    Raises ValueError naming the weight where a value is not finite, or does not fit float16.
    """
    parts = [_pack_rows(rows.detach().float(), kind, name) for rows in weight.split(CHUNK)]
    weights = torch.cat([part[0] for part in parts])
    scales = torch.cat([part[1] for part in parts if part[1] is not None]) if kind.startswith("int") else None
    return Packed(kind, weight.shape[0], weight.shape[1], weights, scales)


def unpack(packed: Packed) -> Tensor:
    """The weight [N, K] in float32 that the kernels compute with."""
    return torch.cat([rows for _, rows in unpacked_chunks(packed)])


def unpacked_chunks(packed: Packed) -> Iterator[tuple[int, Tensor]]:
    """(number of the first output, float32 rows) of `unpack`, at most CHUNK outputs at a time."""
    panels = CHUNK // LANES
    for first in range(0, packed.weights.shape[0], panels):
        weights, start = packed.weights[first : first + panels], first * LANES
        count = min(CHUNK, packed.outputs - start)
        if packed.kind == "int8":
            assert packed.scales is not None
            rows = _by_output(weights)[:count] * packed.scales[start : start + count, None]
        elif packed.kind == "int4":
            assert packed.scales is not None
            halves = torch.stack((weights & 15, weights >> 4), dim=2).to(torch.int8) - 8  # [P, 16 G, 2, 16, 4]
            scales = packed.scales[first : first + panels].transpose(1, 2).reshape(-1, packed.scales.shape[1], 1)
            rows = (_by_output(halves.flatten(1, 2)).unflatten(1, (-1, GROUP)) * scales.float()).flatten(1)[:count]
        else:
            rows = weights.transpose(1, 2).flatten(0, 1)[:count].float()
        yield start, rows[:, : packed.inputs]


def round_activations(x: Tensor) -> Tensor:
    """x [M, K] as the integer kinds see it: in each group of 128 of a row, -127 .. 127 times the group's scale.

    A group with a value that is not finite becomes nan.
    """
    groups = _padded(x, 1, GROUP).unflatten(1, (-1, GROUP))
    largest = groups.abs().amax(-1, keepdim=True)
    largest = largest.where(largest.isfinite(), torch.nan)
    steps = (groups * (127 / largest)).round().where(largest != 0, 0.0)
    return (steps * (largest / 127)).flatten(1)[:, : x.shape[1]]


def checked(weight: Tensor, kind: Kind, name: str) -> Tensor:
    """`weight` in the type of a float kind, or as it is for an integer kind.

    Raises ValueError naming it where a value is not finite, or does not fit float16.
    """
    if not weight.isfinite().all():
        raise ValueError(f"{name} holds values that are not finite: the checkpoint is damaged, or its training failed")
    stored = weight.to(FLOATS.get(kind, weight.dtype))
    if not stored.isfinite().all():
        raise ValueError(f"{name} holds values beyond {kind}'s range: use bf16 or fp32")
    return stored


def _pack_rows(rows: Tensor, kind: Kind, name: str) -> tuple[Tensor, Tensor | None]:
    stored = checked(rows, kind, name)
    if kind in FLOATS:
        return _panels(_padded(stored, LANES, 1)).transpose(1, 2).contiguous(), None
    if kind == "int8":
        scales = rows.abs().amax(1) / 127
        whole = (rows / scales[:, None]).nan_to_num(0.0).round().to(torch.int8)  # a row of zeros stays one
        return _by_panel(_padded(whole, LANES, GROUP)), scales
    groups = _padded(rows, LANES, GROUP).unflatten(1, (-1, GROUP))
    codes, scales = _four_bits(groups)
    halves = _by_panel(codes.flatten(1)).unflatten(1, (-1, 2))  # [P, 16 G, 2, 16, 4]
    return halves[:, :, 0] | halves[:, :, 1] << 4, _panels(scales).transpose(1, 2).contiguous()


def _four_bits(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Codes 0 .. 15 (uint8) and scales (bfloat16, [N, G]) of groups [N, G, 128]."""
    largest = groups.abs().amax(-1)
    best = torch.full_like(largest, torch.inf)
    chosen = torch.zeros_like(largest, dtype=torch.bfloat16)
    for share in CANDIDATES:
        scale = (largest * (share / 8)).bfloat16()
        error = (_rounded(groups, scale) * scale[..., None].float() - groups).square_().sum(-1)
        better = error < best
        best, chosen = error.where(better, best), scale.where(better, chosen)
    return (_rounded(groups, chosen) + 8).to(torch.uint8), chosen


def _rounded(groups: Tensor, scale: Tensor) -> Tensor:
    return (groups / scale[..., None].float()).nan_to_num_(0.0).round_().clamp_(-8, 7)


def _padded(x: Tensor, rows: int, columns: int) -> Tensor:
    return F.pad(x, (0, -x.shape[1] % columns, 0, -x.shape[0] % rows))


def _panels(rows: Tensor) -> Tensor:
    return rows.unflatten(0, (-1, LANES))  # [P, 16, columns]


def _by_panel(rows: Tensor) -> Tensor:
    return _panels(rows).unflatten(2, (-1, 4)).transpose(1, 2).contiguous()  # [P, K / 4, 16, 4]


def _by_output(weights: Tensor) -> Tensor:
    return weights.transpose(1, 2).flatten(2).flatten(0, 1)  # [16 P, K]

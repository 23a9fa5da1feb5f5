"""Packing and unpacking of weights in the kernels' order, in plain torch: the definition of every kind.

Shapes: N outputs, K inputs, P = ceil(N / 16) panels, G = ceil(K / 128) groups. A panel holds 16 outputs side by side,
so that one lane of a vector register is one output.

    fp32, fp16         weights [P, K, 16, 1]
    bf16, w16a16       weights [P, K / 2, 16, 2], the last axis 2 neighbours in k, zeros behind an odd K
    int8               weights int8 [P, 32 G, 16, 4], 4 neighbours in k; scales fp32 [N]
    int4               weights uint8 [P, 16 G, 16, 4]: w + 8 of 4 neighbours in the low half of a byte, of the next 4 in
                       the high half; scales bf16 [P, G, 16]

w16a16 differs from bf16 in a product's input: it is rounded to bfloat16 too, as in a model of that type; int8 and int4
round it to 8 bits. int8 is symmetric, its scale the row's largest magnitude / 127. int4 is symmetric in groups of
128 of a row: -8 .. 7 times a scale, of a few candidates the one with the least squared error.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from neox.quantization.kinds import FORMATS, GROUP, Kind

FLOATS: dict[Kind, torch.dtype] = {
    kind: getattr(torch, form.dtype) for kind, form in FORMATS.items() if form.scales == "none"
}
LANES = 16
CHUNK = 128  # outputs that are packed or unpacked at a time: their float32 copies are all the memory it takes
# The scales that a group of 4 bits tries, in units of its largest magnitude: -8 stands for that, or a little less, at
# the one end or the other; what lies further out is cut off.
CANDIDATES = tuple(share / -8 for share in (1.0, 0.93, 0.86, -1.0, -0.93, -0.86))


class Packed(NamedTuple):
    """A weight [outputs, inputs] as its kind stores it."""

    kind: Kind
    outputs: int
    inputs: int
    weights: Tensor
    scales: Tensor | None  # None for the float kinds


def allocate(kind: Kind, outputs: int, inputs: int) -> Packed:
    """A weight of zeros."""
    panels, groups = -(-outputs // LANES), -(-inputs // GROUP)
    if kind == "int8":
        return Packed(
            kind, outputs, inputs, torch.zeros(panels, 32 * groups, LANES, 4, dtype=torch.int8), torch.zeros(outputs)
        )
    if kind == "int4":
        weights = torch.full((panels, 16 * groups, LANES, 4), 0x88, dtype=torch.uint8)
        return Packed(kind, outputs, inputs, weights, torch.zeros(panels, groups, LANES, dtype=torch.bfloat16))
    count = FORMATS[kind].neighbours
    weights = torch.zeros(panels, -(-inputs // count), LANES, count, dtype=FLOATS[kind])
    return Packed(kind, outputs, inputs, weights, None)


def chunk(packed: Packed, first: int) -> Packed:
    """CHUNK outputs of `packed` from `first` on, the start of a panel: a view of its memory."""
    count = min(CHUNK, packed.outputs - first)
    panels = slice(first // LANES, first // LANES + -(-count // LANES))
    scales = packed.scales
    if scales is not None:
        scales = scales[first : first + count] if packed.kind == "int8" else scales[panels]
    return Packed(packed.kind, count, packed.inputs, packed.weights[panels], scales)


def chunks(packed: Packed) -> Iterator[tuple[int, Packed]]:
    """(first output, part) of all parts in order: few enough rows that their float32 copies are little memory."""
    return ((first, chunk(packed, first)) for first in range(0, packed.outputs, CHUNK))


def pack_rows(rows: Tensor, into: Packed) -> None:
    """Store float32 rows, all finite, in a packed weight of as many outputs."""
    kind = into.kind
    if kind in FLOATS:
        count = FORMATS[kind].neighbours
        into.weights.copy_(_by_panel(_padded(rows.to(FLOATS[kind]), LANES, count), count))
        return
    assert into.scales is not None
    if kind == "int8":
        into.scales.copy_(rows.abs().amax(1) / 127)
        whole = (rows / into.scales[:, None]).nan_to_num(0.0).round().to(torch.int8)  # a row of zeros stays one
        into.weights.copy_(_by_panel(_padded(whole, LANES, GROUP)))
        return
    codes, scales = _four_bits(_padded(rows, LANES, GROUP).unflatten(1, (-1, GROUP)))
    halves = _by_panel(codes.flatten(1)).unflatten(1, (-1, 2))  # [P, 16 G, 2, 16, 4]
    into.weights.copy_(halves[:, :, 0] | halves[:, :, 1] << 4)
    into.scales.copy_(_panels(scales).transpose(1, 2))


def unpack(packed: Packed) -> Tensor:
    """The weight [N, K] in float32 that the kernels compute with."""
    return torch.cat([unpack_rows(part) for _, part in chunks(packed)])


def unpack_rows(packed: Packed) -> Tensor:
    """`unpack` for a part."""
    if packed.kind in FLOATS:
        return _by_output(packed.weights)[: packed.outputs, : packed.inputs].float()
    assert packed.scales is not None
    if packed.kind == "int8":
        rows = _by_output(packed.weights)[: packed.outputs] * packed.scales[:, None]
    else:
        halves = torch.stack((packed.weights & 15, packed.weights >> 4), dim=2).to(torch.int8) - 8
        scales = packed.scales.transpose(1, 2).reshape(-1, packed.scales.shape[1], 1).float()
        rows = (_by_output(halves.flatten(1, 2)).unflatten(1, (-1, GROUP)) * scales).flatten(1)[: packed.outputs]
    return rows[:, : packed.inputs]


def round_activations(x: Tensor, kind: Kind) -> Tensor:
    """Round a product's input x [M, K], float32, as a kind does.

    The integer kinds round each group of 128 of a row to -127 .. 127 times the group's scale, or to nan where a value
    of the group is not finite.
    """
    if FORMATS[kind].activations > 8:
        return x.bfloat16().float() if FORMATS[kind].activations == 16 else x
    groups = _padded(x, 1, GROUP).unflatten(1, (-1, GROUP))
    largest = groups.abs().amax(-1, keepdim=True)
    largest = largest.where(largest.isfinite(), torch.nan)
    steps = (groups * (127 / largest)).round().where(largest != 0, 0.0)
    return (steps * (largest / 127)).flatten(1)[:, : x.shape[1]]


def check(weight: Tensor, kind: Kind, name: str) -> None:
    """Raise ValueError naming the weight where a value is not finite, or too large for a float kind's type."""
    # A sum is several times faster than a look at each value, and is not finite where a value is not.
    if not weight.sum(dtype=torch.float32).isfinite() and not weight.isfinite().all():
        raise ValueError(f"{name} holds values that are not finite: the checkpoint is damaged, or its training failed")
    target = FLOATS.get(kind, weight.dtype)
    if target != weight.dtype and torch.stack(weight.aminmax()).abs().max() > torch.finfo(target).max:
        raise ValueError(f"{name} holds values beyond {kind}'s range: use bf16 or fp32")


def _four_bits(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Codes 0 .. 15 (uint8) and scales (bfloat16, [N, G]) of groups [N, G, 128]."""
    largest = groups.abs().amax(-1)
    best = torch.full_like(largest, torch.inf)
    chosen = torch.zeros_like(largest, dtype=torch.bfloat16)
    for share in CANDIDATES:
        scale = (largest * share).bfloat16()
        error = (_rounded(groups, scale) * scale[..., None].float() - groups).square_().sum(-1)
        better = error < best
        best, chosen = error.where(better, best), scale.where(better, chosen)
    return (_rounded(groups, chosen) + 8).to(torch.uint8), chosen


def _rounded(groups: Tensor, scale: Tensor) -> Tensor:
    inverse = (1 / scale.float()).nan_to_num(0.0, posinf=0.0, neginf=0.0)
    return (groups * inverse[..., None]).clamp_(-8, 7).round_()


def _padded(x: Tensor, rows: int, columns: int) -> Tensor:
    return F.pad(x, (0, -x.shape[1] % columns, 0, -x.shape[0] % rows))


def _panels(rows: Tensor) -> Tensor:
    return rows.unflatten(0, (-1, LANES))  # [P, 16, columns]


def _by_panel(rows: Tensor, neighbours: int = 4) -> Tensor:
    return _panels(rows).unflatten(2, (-1, neighbours)).transpose(1, 2).contiguous()  # [P, K / 4, 16, 4]


def _by_output(weights: Tensor) -> Tensor:
    return weights.transpose(1, 2).flatten(2).flatten(0, 1)  # [16 P, K]

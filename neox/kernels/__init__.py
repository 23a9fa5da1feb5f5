"""Products with stored weights on a CPU: fp32, fp16, bf16, int8, int4, at the speed at which weights can be read.

y [M, N] = x [M, K] times a packed weight [N, K], transposed, plus a bias. With the compiled kernels a row of y is a
function of its row of x alone, bit for bit: of no other row, nor of their number, nor of the threads' (design D16).
Where they are absent (no compiler, another processor, a GPU) plain torch gives the same values within rounding, 1e-5 of
the largest, without that promise and slower.
"""

from torch import Tensor
from torch.nn import functional as F

from neox.kernels import native
from neox.kernels.layout import (
    FLOATS,
    KINDS,
    LANES,
    Kind,
    Packed,
    checked,
    pack,
    round_activations,
    unpack,
    unpacked_chunks,
)

__all__ = [
    "FLOATS",
    "KINDS",
    "LANES",
    "Kind",
    "Packed",
    "checked",
    "compiled",
    "linear",
    "pack",
    "plain_linear",
    "unpack",
]


def compiled() -> bool:
    """Whether the compiled kernels serve this processor; the first call compiles them."""
    return native.library() is not None


def linear(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """y [..., N], of x's type, for x [..., K] and a float32 bias [N]. No gradient passes."""
    loaded = native.library() if x.device.type == "cpu" else None
    rows = x.detach().reshape(-1, packed.inputs).float().contiguous()
    if loaded is None:
        y = plain_linear(rows, packed, bias)
    else:
        y = native.linear(loaded, KINDS.index(packed.kind), rows, packed.weights, packed.scales, bias, packed.outputs)
    return y.view(*x.shape[:-1], packed.outputs).to(x.dtype)


def plain_linear(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """The same in plain torch, x [M, K] float32: the kernels' definition, and what stands in for them."""
    if packed.kind not in FLOATS:
        x = round_activations(x)
    y = x.new_empty(x.shape[0], packed.outputs)
    for first, rows in unpacked_chunks(packed):
        part = None if bias is None else bias[first : first + len(rows)]
        y[:, first : first + len(rows)] = F.linear(x, rows, part)
    return y

"""Matrix products with packed weights on a CPU, in 32 to 4 bits, bound by memory bandwidth.

y [M, N] = x [M, K] times a packed weight [N, K], transposed, plus a bias. With the compiled kernels a row of y is a
function of its row of x alone, bit for bit: of no other row, nor of their number, nor of the threads' (design D16).
Where they are absent (no compiler, another processor, a GPU) plain torch gives the same values within rounding, 1e-5 of
the largest, without that promise and slower.
"""

from torch import Tensor
from torch.nn import functional as F

from neox.quantization.kernels import layout, native
from neox.quantization.kernels.layout import FLOATS, LANES, Packed, check, unpack
from neox.quantization.kinds import KINDS, Kind

__all__ = [
    "FLOATS",
    "KINDS",
    "LANES",
    "Kind",
    "Packed",
    "check",
    "compiled",
    "linear",
    "pack",
    "plain_linear",
    "unpack",
]


def compiled() -> bool:
    """True where the compiled kernels serve this processor; the first call compiles them."""
    return native.library() is not None


def pack(weight: Tensor, kind: Kind, name: str = "a weight") -> Packed:
    """Store weight [N, K], of any floating type, on the CPU. Temporary memory: float32 copies of a few rows.

    Raises ValueError naming the weight where a value is not finite, or does not fit float16.
    """
    loaded, packed = native.library(), layout.allocate(kind, *weight.shape)
    for first, part in layout.chunks(packed):
        rows = weight[first : first + part.outputs].detach().cpu().float().contiguous()
        check(rows, kind, name)
        if loaded is None:
            layout.pack_rows(rows, part)
        else:
            native.pack_rows(loaded, rows, part)
    return packed


def linear(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """y [..., N], of x's type, for x [..., K] and a float32 bias [N]. No gradient passes."""
    loaded = native.library() if x.device.type == "cpu" else None
    rows = x.detach().reshape(-1, packed.inputs).float().contiguous()
    y = plain_linear(rows, packed, bias) if loaded is None else native.linear(loaded, rows, packed, bias)
    return y.view(*x.shape[:-1], packed.outputs).to(x.dtype)


def plain_linear(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """`linear` in plain torch for x [M, K] float32: the kernels' definition and fallback."""
    x = layout.round_activations(x, packed.kind)
    y = x.new_empty(x.shape[0], packed.outputs)
    for first, part in layout.chunks(packed):
        own = None if bias is None else bias[first : first + part.outputs]
        y[:, first : first + part.outputs] = F.linear(x, layout.unpack_rows(part), own)
    return y

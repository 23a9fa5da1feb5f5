"""Packed layers in place of nn.Linear and nn.Embedding, for fast inference on a CPU.

`quantization.kinds` lists the kinds. A tied head reads the embedding's own 16 bits. Norms, biases and the activations
between the layers are float32.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neox.model.decoder import GPTNeoX
from neox.quantization import kernels
from neox.quantization.kernels import Kind, Packed
from neox.quantization.kinds import FORMATS

LARGEST_FP16 = torch.finfo(torch.float16).max


class PackedLinear(nn.Module):
    """nn.Linear with a packed weight: x [..., inputs] -> [..., outputs], without a backward pass."""

    packed: Tensor
    scales: Tensor | None
    bias: Tensor | None

    def __init__(self, packed: Packed, bias: Tensor | None) -> None:
        super().__init__()
        self.kind, self.out_features, self.in_features = packed.kind, packed.outputs, packed.inputs
        self.register_buffer("packed", packed.weights)
        self.register_buffer("scales", packed.scales)
        self.register_buffer("bias", None if bias is None else bias.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            raise ValueError("packed weights have no backward pass: load the model without quantizing it to train it")
        return kernels.linear(x, self.stored, self.bias)

    @property
    def stored(self) -> Packed:
        """The weight as kernels take it."""
        return Packed(self.kind, self.out_features, self.in_features, self.packed, self.scales)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.kind}, bias={self.bias is not None}"


class StoredEmbedding(nn.Module):
    """nn.Embedding kept in 16 bits: token ids -> float32 rows."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight).float()


class TiedEmbedding(nn.Module):
    """An embedding that reads the rows of a head's packed weight: one copy serves both."""

    packed: Tensor

    def __init__(self, head: PackedLinear) -> None:
        super().__init__()
        assert head.kind in kernels.FLOATS
        self.register_buffer("packed", head.packed)  # [panel, inputs / neighbours, 16, neighbours]
        self.width = head.in_features

    def forward(self, tokens: Tensor) -> Tensor:
        rows = self.packed[tokens // kernels.LANES, :, tokens % kernels.LANES]
        return rows.flatten(-2)[..., : self.width].float()


def replace(module: nn.Module, kind: Kind, name: str = "the module") -> nn.Module:
    """Pack an nn.Linear or nn.Embedding; returns its replacement, which shares no memory with a packed weight.

    An embedding takes 16 bits where kind has fewer. fp32 leaves an embedding as it is, and without compiled kernels a
    linear layer too. Raises ValueError naming the weight where a value is not finite, or does not fit float16.
    """
    assert isinstance(module, nn.Linear | nn.Embedding)
    if kind == "fp32" and (isinstance(module, nn.Embedding) or not kernels.compiled()):
        return module
    if isinstance(module, nn.Linear):
        return PackedLinear(kernels.pack(module.weight, kind, f"{name}.weight"), module.bias)
    sixteen = _sixteen(module.weight, kind)
    kernels.check(module.weight, sixteen, f"{name}.weight")
    return StoredEmbedding(module.weight.detach().to(kernels.FLOATS[sixteen]))


def packing(kind: Kind) -> Callable[[str, nn.Module], nn.Module]:
    """(name, layer) -> packed layer, for `checkpoint.load(transform=)`; `quantize` packs the rest."""
    return lambda name, module: replace(module, kind_of(name, kind), name)


def kind_of(name: str, kind: Kind) -> Kind:
    """The kind of the module `name` in a model of that kind: a head may keep more bits than the blocks."""
    return (FORMATS[kind].head or kind) if name == "embed_out" else kind


@torch.no_grad()
def quantize(model: GPTNeoX, kind: Kind) -> GPTNeoX:
    """Pack the model's weights in place, a layer at a time; it is returned, and can no longer be trained.

    Layers that `checkpoint.load(transform=packing(kind))` packed while reading stay as they are.

    Raises ValueError as `replace` does; the model is then partly packed.
    """
    tied = model.config.tie_word_embeddings
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear | nn.Embedding) and not (tied and name == "embed_in"):
            own = _sixteen(module.weight, kind) if tied and name == "embed_out" else kind_of(name, kind)
            model.set_submodule(name, replace(module, own, name))
    if tied and isinstance(model.embed_out, PackedLinear):
        model.embed_in = TiedEmbedding(model.embed_out)
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    return model.requires_grad_(False).eval()


def lossless(dtype: torch.dtype) -> Kind | None:
    """The kind that stores weights of `dtype` exactly; None without compiled kernels.

    Without them torch's own float32 products are the fastest exact ones.
    """
    exact = (kind for kind, stored in kernels.FLOATS.items() if stored == dtype and FORMATS[kind].activations == 32)
    return next(exact, "fp32") if kernels.compiled() else None


def _sixteen(weight: Tensor, kind: Kind) -> Kind:
    """The 16-bit kind of a weight that `kind` does not store in fewer bits."""
    if kind in kernels.FLOATS:
        return kind
    return "bf16" if weight.dtype == torch.bfloat16 or weight.abs().max() > LARGEST_FP16 else "fp16"

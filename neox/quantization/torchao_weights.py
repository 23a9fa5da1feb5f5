"""Quantized linear layers on CUDA, by torchao: the kinds of `packed` under the same names.

    kind      blocks                          head     activations
    int8      a scale a row                   int8     bfloat16
    int4      a scale and zero for 128        int8     bfloat16
    float8    e4m3, a scale a row             float8   e4m3, a scale a token

Embeddings, norms, biases and activations between layers are bfloat16. An int8 weight is widened inside the product's
own kernel only where that is compiled (`compile_products`): torchao writes such kernels for torch.compile.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import nn

from neox.model.decoder import Block, GPTNeoX
from neox.system.optional import optional

Kind = Literal["int8", "int4", "float8"]
KINDS: tuple[Kind, ...] = get_args(Kind)
GROUPS = (128, 64, 32)
"""Weights that share a scale in int4: the first that divides the width."""


def packing(kind: Kind, device: torch.device) -> Callable[[str, nn.Module], nn.Module]:
    """(name, layer) -> quantized layer, for `checkpoint.load(transform=)` with dtype bf16.

    Raises ValueError where torchao is not installed, or the device has no such products.
    """
    quantize_ = optional("torchao.quantization", f"weights={kind} on a GPU", "gpu").quantize_
    least = {"int8": (0, 0), "int4": (8, 0), "float8": (8, 9)}[kind]
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < least:
        raise ValueError(
            f"weights={kind}: this GPU has no such products, they begin at compute capability "
            f"{least[0]}.{least[1]}: take another of {', '.join(KINDS)}"
        )

    def pack(name: str, module: nn.Module) -> nn.Module:
        if not isinstance(module, nn.Linear):
            return module
        holder = nn.Sequential(module.requires_grad_(False))
        quantize_(holder, _config("int8" if name == "embed_out" and kind == "int4" else kind, module, name))
        return holder[0]

    return pack


def _config(kind: Kind, module: nn.Linear, name: str) -> Any:
    from torchao import quantization as ao

    # Its settings for inductor are for a whole compiled model, and hold for the process.
    plain = {"set_inductor_config": False}
    if kind == "int8":
        return ao.Int8WeightOnlyConfig(**plain)
    if kind == "float8":
        return ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow(), **plain)
    group = next((group for group in GROUPS if module.in_features % group == 0), None)
    if group is None:
        raise ValueError(f"{name}: int4 wants a width that {GROUPS[-1]} divides, not {module.in_features}: take int8")
    return ao.Int4WeightOnlyConfig(group_size=group, int4_packing_format="tile_packed_to_4d", **plain)


def compile_products(model: GPTNeoX) -> GPTNeoX:
    """Compile the linear layers in place: one graph for one token and one for more, shared by the blocks.

    Attention and the cache around them are not compiled.
    """
    for block in model.layers:
        assert isinstance(block, Block)
        for module in (block.mlp, block.attention.query_key_value, block.attention.dense):
            module.compile()
    model.embed_out.compile()
    return model

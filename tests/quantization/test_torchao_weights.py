"""torchao's int8 products on a CPU against the values that they stand for."""

import copy

import pytest
import torch
from torch import nn

from neox.generate import Engine, Sampling
from neox.generate.rate import bytes_read
from neox.quantization import torchao_weights
from tests.generate.conftest import random_model
from tests.tiny import GPT_J, relative, tokens

pytest.importorskip("torchao")
CPU = torch.device("cpu")


def packed(model: nn.Module) -> nn.Module:
    pack = torchao_weights.packing("int8", CPU)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear | nn.Embedding):
            model.set_submodule(name, pack(name, module))
    return model


@pytest.fixture(scope="module", params=[{}, GPT_J], ids=["gpt_neox", "gptj"])
def models(request):
    """A model in int8, and one with the values that its weights stand for."""
    model = random_model(**request.param).bfloat16()
    int8, plain = packed(copy.deepcopy(model)), model
    for name, module in int8.named_modules():
        if isinstance(module, nn.Linear):
            values = module.weight.qdata.double() * module.weight.scale.double()
            parameter = plain.get_submodule(name).weight
            # A scale a row: 127 steps from zero to the largest; the scale itself is rounded to bfloat16.
            largest = parameter.double().abs().amax(1, keepdim=True)
            assert ((values - parameter).abs() / largest).max() < 0.51 / 127 + 2**-8
            parameter.copy_(values)
    return int8, plain


def test_products_are_those_of_the_rounded_weights(models):
    int8, plain = models
    ids = tokens()
    assert relative(int8(ids).float(), plain.float()(ids)) < 0.03  # bfloat16's own rounding, over two blocks
    plain.bfloat16()


def test_an_engine_takes_it_in_passes_of_any_kind(models):
    int8, plain = models
    sampling = Sampling(max_tokens=8, temperature=0, stop_at_eod=False)
    assert Engine(int8, static=True).generate([[3, 4]], sampling) == Engine(int8, static=False).generate(
        [[3, 4]], sampling
    )
    linear = sum(module.weight.numel() for module in plain.modules() if isinstance(module, nn.Linear))
    assert bytes_read(plain) - 1.1 * linear < bytes_read(int8) < bytes_read(plain) - 0.7 * linear


def test_a_head_keeps_eight_bits_where_the_blocks_have_four():
    layer = nn.Linear(192, 8)
    asked = torchao_weights._config("int4", layer, "a layer")
    assert (asked.group_size, asked.int4_packing_format) == (64, "tile_packed_to_4d")
    head = torchao_weights.packing("int4", CPU)("embed_out", layer)
    assert head.weight.qdata.dtype == torch.int8
    with pytest.raises(ValueError, match="a layer: int4 wants a width that 32 divides, not 40: take int8"):
        torchao_weights._config("int4", nn.Linear(40, 8), "a layer")


@pytest.mark.slow
def test_compiled_products_are_the_same(models):
    int8, _ = models
    ids = tokens()
    expected = int8(ids), int8(ids[:1, :1])
    compiled = torchao_weights.compile_products(copy.deepcopy(int8))
    for values, ids_ in zip(expected, (ids, ids[:1, :1]), strict=True):
        assert relative(compiled(ids_).float(), values.float()) < 0.03


@pytest.mark.gpu
@pytest.mark.parametrize("kind", torchao_weights.KINDS)
def test_every_kind_stays_near_the_weights_it_was_made_from(kind):
    device = torch.device("cuda")
    torch.manual_seed(0)
    plain = nn.Linear(1024, 512).to(device, torch.bfloat16)
    layer = torchao_weights.packing(kind, device)("a layer", copy.deepcopy(plain))
    for rows in (1, 5, 64):
        x = torch.randn(rows, 1024, device=device, dtype=torch.bfloat16)
        error = (layer(x) - plain(x)).float().norm() / plain(x).float().norm()
        assert error < {"int8": 0.02, "int4": 0.15, "float8": 0.06}[kind]

"""Norms by part: each against float64, all of them against the global norm, the parts against the table of counts."""

import math

import pytest
import torch

from neox.model.flops import parameters
from neox.parallel.loss import cross_entropy
from neox.train.norms import PARTS, copies, norms, part_of, update_norms
from neox.train.optim import clip_gradients
from tests.tiny import GPT_J, GPT_NEO, ours, tokens

MODELS = [{}, {"tie_word_embeddings": True, "head_bias": True}, GPT_J, GPT_NEO]


@pytest.mark.parametrize("flags", MODELS)
def test_each_parameter_is_of_the_part_that_counts_it(flags):
    model = ours(**flags)
    sizes = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        sizes[part_of(name)] += parameter.numel()
    assert sizes == {part: getattr(parameters(model.config), part) for part in PARTS}


@pytest.mark.parametrize("loss_scale", [1.0, 4096.0])
@pytest.mark.parametrize("flags", MODELS)
def test_norms_of_a_step(flags, loss_scale):
    """1e-6: float32 against float64."""
    model, ids = ours(**flags), tokens()
    cross_entropy(model(ids, head=False), model.embed_out, ids.roll(-1, 1), scale=loss_scale / ids.numel()).backward()
    found = norms([model], loss_scale)
    for part in PARTS:
        members = [p for name, p in model.named_parameters() if part_of(name) == part]
        for key, tensors in (
            (f"gradient_norms/{part}", [p.grad / loss_scale for p in members]),
            (f"parameter_norms/{part}", [p.detach() for p in members]),
        ):
            assert (key in found) == bool(members)
            if members:
                expected = math.hypot(*(tensor.double().norm().item() for tensor in tensors))
                assert found[key] == pytest.approx(expected, rel=1e-6)
    together = math.hypot(*(value for key, value in found.items() if key.startswith("gradient_norms/")))
    assert together == pytest.approx(clip_gradients([model], 1.0, loss_scale).item(), rel=1e-6)


def test_a_component_without_gradients_has_no_norm():
    model = ours()
    model.embed_out.weight.grad = torch.full_like(model.embed_out.weight, 2.0)
    model.final_layer_norm.bias.grad = torch.full_like(model.final_layer_norm.bias, math.nan)
    found = norms([model])
    assert found["gradient_norms/head"] == pytest.approx(2 * math.sqrt(model.embed_out.weight.numel()))
    assert math.isnan(found["gradient_norms/norms"])
    assert {key for key in found if key.startswith("gradient")} == {"gradient_norms/head", "gradient_norms/norms"}


@pytest.mark.parametrize("flags", MODELS)
def test_norms_of_an_update(flags):
    """1e-5: the difference of two float32 numbers, against float64."""
    model = ours(**flags)
    before, plain = copies([model]), {name: p.detach().double() for name, p in model.named_parameters()}
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter += 0.1 * (number + 1) * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    found = update_norms([model], before)
    for part in PARTS:
        members = [p.double() - plain[name] for name, p in model.named_parameters() if part_of(name) == part]
        assert (f"update_norms/{part}" in found) == bool(members)
        if members:
            expected = math.hypot(*(tensor.norm().item() for tensor in members))
            assert found[f"update_norms/{part}"] == pytest.approx(expected, rel=1e-5)

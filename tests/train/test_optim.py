"""Optimizers: who decays and who does not, clipping, Muon against torch's and a float64 derivation."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neox.config import OptimConfig
from neox.train.optim import Muon, build_optimizers, clip_gradients, orthogonalize, set_lr
from tests.tiny import GPT_J, GPT_NEO, ours, relative

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024


def groups_by_name(model, config):
    """{parameter name: (optimizer's class, group)}; each parameter is in exactly one group."""
    names = {p: name for name, p in model.named_parameters()}
    found = {}
    for optimizer in build_optimizers([model], config):
        for group in optimizer.param_groups:
            for p in group["params"]:
                assert names[p] not in found
                found[names[p]] = (type(optimizer), group)
    assert set(found) == set(names.values())
    return found


@pytest.mark.parametrize("flags", [{}, {"tie_word_embeddings": True, "head_bias": True}, GPT_J, GPT_NEO])
def test_layer_norms_and_biases_do_not_decay_and_all_else_does(flags):
    model = ours(**flags)
    config = OptimConfig(weight_decay=0.07, lr=3e-4)
    spared = {
        f"{name}.{leaf}"
        for name, module in model.named_modules()
        for leaf, _ in module.named_parameters(recurse=False)
        if isinstance(module, torch.nn.LayerNorm) or leaf == "bias"
    }
    for name, (kind, group) in groups_by_name(model, config).items():
        assert kind is torch.optim.AdamW
        assert group["weight_decay"] == (0 if name in spared else 0.07), name
        assert group["lr"] == group["peak_lr"] == 3e-4


def test_muon_takes_the_matrices_of_the_blocks_only():
    model = ours(**GPT_NEO)
    config = OptimConfig(name="muon", muon_lr=0.03, muon_momentum=0.9, lr=1e-3, weight_decay=0.2)
    for name, (kind, group) in groups_by_name(model, config).items():
        matrix = name.startswith("layers.") and name.endswith("weight") and "layernorm" not in name
        assert kind is (Muon if matrix else torch.optim.AdamW), name
        assert group["peak_lr"] == (0.03 if matrix else 1e-3)
        assert group["weight_decay"] == (0 if name.endswith("bias") or "norm" in name else 0.2)
        assert not matrix or group["momentum"] == 0.9


def test_set_lr_scales_every_group_from_its_own_peak():
    optimizers = build_optimizers([ours()], OptimConfig(name="muon", muon_lr=0.04, lr=1e-3))
    for factor in (0.5, 0.25):
        set_lr(optimizers, factor)
        assert {group["lr"] for o in optimizers for group in o.param_groups} == {0.04 * factor, 1e-3 * factor}


@pytest.mark.parametrize("loss_scale", [1.0, 4096.0, 0.5])
@pytest.mark.parametrize("limit", [0.0, 0.1, 1e9])
def test_gradients_are_divided_by_the_loss_scale_and_clipped_as_torch_does(limit, loss_scale):
    mine, theirs = ours(), ours()
    generator = torch.Generator().manual_seed(0)
    for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
        q.grad = torch.randn(p.shape, generator=generator)
        p.grad = q.grad * loss_scale
    expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), limit or float("inf"))
    norm = clip_gradients([mine], limit, loss_scale)
    assert norm.item() == pytest.approx(expected.item(), rel=1e-6)
    for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=0)  # a rounding more or less in float32


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_gradients_that_overflowed_are_told_by_their_norm_and_left_alone(value):
    model = ours()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model.embed_in.weight.grad[3, 5] = value
    assert not clip_gradients([model], 1.0, 4096.0).isfinite()
    assert (model.embed_out.weight.grad == 1).all()


def polynomial(matrix: torch.Tensor, steps: int) -> torch.Tensor:
    """Muon's polynomial on the singular values themselves, in float64; `orthogonalize` has products only."""
    a, b, c = COEFFICIENTS
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / matrix.double().norm()
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ vt


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    count=st.integers(1, 3),
    steps=st.integers(1, 5),
    size=st.sampled_from((1e-4, 1.0, 1e4)),
    seed=st.integers(0, 99),
)
def test_orthogonalize_is_the_polynomial_of_the_singular_values(rows, columns, count, steps, size, seed):
    matrices = torch.randn(count, rows, columns, generator=torch.Generator().manual_seed(seed)) * size
    result = orthogonalize(matrices, COEFFICIENTS, steps, 1e-7)
    for ours_, matrix in zip(result, matrices, strict=True):
        assert relative(ours_.double(), polynomial(matrix, steps)) < 1e-5
    if steps == 5 and min(rows, columns) < max(rows, columns) / 2:
        # Far from square, no singular value is near zero, and five steps bring all of them near one.
        assert (torch.linalg.svdvals(result) - 1).abs().max() < 0.35


def test_a_gradient_of_zero_stays_zero():
    assert not orthogonalize(torch.zeros(2, 3, 5), COEFFICIENTS, 5, 1e-7).any()


SHAPES = [(48, 16), (16, 48), (24, 24), (48, 16), (7, 3)]


def descend(kind, steps=4, **options):
    """Parameters after a few steps along fixed gradients."""
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.randn(shape, generator=generator).requires_grad_() for shape in SHAPES]
    optimizer = kind(parameters, **options)
    for _ in range(steps):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return parameters, optimizer


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nesterov": False, "momentum": 0.5},
        {"weight_decay": 0.0, "ns_steps": 3},
        {"adjust_lr_fn": "match_rms_adamw"},
    ],
)
def test_muon_takes_the_steps_of_torchs_muon(options):
    options = {"lr": 0.02, "weight_decay": 0.1, **options}
    mine, optimizer = descend(Muon, **options)
    torchs, reference = descend(torch.optim.Muon, **options)
    start, _ = descend(Muon, steps=0, **options)
    for a, b, c in zip(mine, torchs, start, strict=True):
        # torch iterates in bfloat16, 8 bits, and each of 5 steps multiplies an error by up to 3.4.
        assert relative(a - c, b - c) < 0.03
        assert torch.allclose(
            optimizer.state[a]["momentum_buffer"], reference.state[b]["momentum_buffer"], rtol=1e-6, atol=1e-7
        )
    assert optimizer.state_dict()["param_groups"] == reference.state_dict()["param_groups"]


def test_muon_takes_the_steps_of_a_float64_derivation():
    lr, decay, momentum = 0.02, 0.1, 0.9
    parameters, _ = descend(Muon, steps=3, lr=lr, weight_decay=decay, momentum=momentum)
    generator = torch.Generator().manual_seed(0)
    expected = [torch.randn(shape, generator=generator).double() for shape in SHAPES]
    buffers = [torch.zeros(shape).double() for shape in SHAPES]
    for _ in range(3):
        for i, shape in enumerate(SHAPES):
            gradient = torch.randn(shape, generator=generator).double()
            buffers[i] = momentum * buffers[i] + (1 - momentum) * gradient
            direction = polynomial((1 - momentum) * gradient + momentum * buffers[i], 5)
            scale = max(1, shape[0] / shape[1]) ** 0.5
            expected[i] = (1 - lr * decay) * expected[i] - lr * scale * direction
    for p, value in zip(parameters, expected, strict=True):
        assert relative(p.double(), value) < 1e-5


def test_muon_passes_over_what_has_no_gradient():
    a, b = torch.ones(3, 4, requires_grad=True), torch.ones(3, 4, requires_grad=True)
    optimizer = Muon([a, b], lr=0.1)
    a.grad = torch.ones(3, 4)
    before = copy.deepcopy(b)
    optimizer.step()
    assert torch.equal(b, before)
    assert not torch.equal(a, before)
    assert b not in optimizer.state

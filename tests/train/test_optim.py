"""Optimizers and schedule: who decays and who does not, Muon against torch's and a float64 derivation, the formula."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neox.config import OptimConfig, ScheduleConfig
from neox.train.optim import Muon, build_optimizers, lr_factor, orthogonalize, set_lr
from tests.tiny import GPT_J, GPT_NEO, ours, relative

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024


def groups_by_name(model, config):
    """{parameter name: (optimizer's class, group)}; each parameter is in exactly one group."""
    names = {p: name for name, p in model.named_parameters()}
    found = {}
    for optimizer in build_optimizers(model, config):
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
    optimizers = build_optimizers(ours(), OptimConfig(name="muon", muon_lr=0.04, lr=1e-3))
    for factor in (0.5, 0.25):
        set_lr(optimizers, factor)
        assert {group["lr"] for o in optimizers for group in o.param_groups} == {0.04 * factor, 1e-3 * factor}


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


@given(
    lr=st.floats(1e-6, 1),
    share=st.floats(0, 1),
    warmup=st.floats(0, 1),
    steps=st.integers(1, 5000),
    data=st.data(),
)
def test_lr_factor_is_the_closed_formula(lr, share, warmup, steps, data):
    """As percentages of the way: a ramp to the peak, then half a cosine wave down to min_lr."""
    step = data.draw(st.integers(0, steps))
    low = lr * share
    factor = lr_factor(ScheduleConfig(warmup=warmup, min_lr=low), lr, step, steps)
    ramp = warmup * steps
    if step < ramp:
        expected = lr * min(1, max(step, 1) / ramp)
    else:
        expected = low + (lr - low) * math.cos(math.pi / 2 * (step - ramp) / max(1, steps - ramp)) ** 2
    assert math.isclose(factor * lr, expected, rel_tol=1e-9, abs_tol=1e-12)
    assert 0 <= factor <= 1 + 1e-12


def test_lr_starts_above_zero_peaks_after_the_warmup_and_ends_at_the_floor():
    schedule = ScheduleConfig(warmup=0.1, min_lr=1e-4)
    factors = [lr_factor(schedule, 1e-3, step, 100) for step in range(101)]
    assert factors[0] == factors[1] == 0.1
    assert factors[10] == max(factors) == 1
    assert math.isclose(factors[100], 0.1)
    assert all(a >= b for a, b in itertools.pairwise(factors[10:]))

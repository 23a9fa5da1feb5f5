"""Sampling against transformers' warpers and against the distribution that it claims to draw from."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from neox.generate import Sampler, Sampling, distribution


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.1, 3),
    top_k=st.integers(0, 40),
    top_p=st.floats(0.05, 1),
)
def test_distribution_equals_transformers(seed, temperature, top_k, top_p):
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(seed)) * 3
    warped = TemperatureLogitsWarper(temperature)(None, logits)
    if 0 < top_k < 40:
        warped = TopKLogitsWarper(top_k)(None, warped)
    if top_p < 1:
        warped = TopPLogitsWarper(top_p)(None, warped)
    expected = warped.softmax(-1)[0]
    found = distribution(logits[0], Sampling(temperature=temperature, top_k=top_k, top_p=top_p))
    border = logits[0].div(temperature).softmax(-1).sort(descending=True).values.cumsum(0)
    if top_p < 1 and not top_k and (border - top_p).abs().min() < 1e-5:
        return  # the cumulative sums are rounded in different orders there
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_draws_follow_the_distribution():
    """Chi-square of 20,000 draws over 8 tokens at the 1e-4 level (7 degrees of freedom: 29.9)."""
    sampling = Sampling(temperature=1.3, top_k=7)
    logits = torch.linspace(-1, 2, 8)
    sampler = Sampler(sampling, usable=8)
    counts = torch.bincount(torch.tensor([sampler(logits) for _ in range(20_000)]), minlength=8)
    expected = distribution(logits, sampling) * 20_000
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    assert ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum() < 29.9


def test_padding_rows_are_never_drawn():
    logits = torch.zeros(16)
    logits[12:] = 50.0
    assert Sampler(Sampling(temperature=0), usable=12)(logits) < 12
    sampler = Sampler(Sampling(), usable=12)
    assert max(sampler(logits) for _ in range(200)) < 12


def test_the_seed_decides():
    logits = torch.randn(50)

    def draws(seed: int) -> list[int]:
        sampler = Sampler(Sampling(seed=seed), usable=50)
        return [sampler(logits) for _ in range(20)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)


@pytest.mark.parametrize("wrong", [{"top_p": 0.0}, {"top_p": 1.1}, {"temperature": -1.0}, {"max_tokens": 0}])
def test_senseless_values_are_refused(wrong):
    with pytest.raises(ValueError, match=f"generate.{next(iter(wrong))}"):
        Sampling(**wrong)

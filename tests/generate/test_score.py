"""Log-probabilities over windows against one forward pass a token, and bits per byte against its definition."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neox.generate import bits_per_byte, token_logprobs


@settings(max_examples=20, deadline=None)
@given(
    length=st.integers(0, 90),
    window=st.integers(1, 40),
    stride=st.integers(1, 40),
    batch=st.integers(1, 5),
    with_first=st.booleans(),
)
def test_each_token_is_scored_once_with_the_context_described(model, length, window, stride, batch, with_first):
    stride = min(stride, window)
    tokens = torch.randint(97, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    scores = token_logprobs(model, tokens, window, stride, batch, first=3 if with_first else None)
    assert scores.shape == (length,)
    ids = [3, *tokens] if with_first else tokens
    shift = 0 if with_first else 1
    if length and not with_first:
        assert scores[0].isnan()
    for i in range(len(ids) - 1):
        start = 0 if i < window else math.ceil((i - window + 1) / stride) * stride
        logits = model(torch.tensor([ids[start : i + 1]]))[0, -1]
        assert scores[i + shift].item() == pytest.approx(logits.log_softmax(-1)[ids[i + 1]].item(), abs=2e-5)


def test_bits_per_byte():
    assert bits_per_byte(torch.full((8,), math.log(1 / 4)), 16) == pytest.approx(1.0)


def test_a_stride_beyond_the_window_is_refused(model):
    with pytest.raises(ValueError, match="stride 9"):
        token_logprobs(model, [1, 2, 3], window=8, stride=9)

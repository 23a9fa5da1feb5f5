"""Blending: against the greedy rule in a plain loop, against digests of what gpt-neox's helper gives."""

import hashlib
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neox.data import blend
from neox.data.blend import Blend, shares


def slow(weights: list[float], count: int) -> tuple[list[int], list[int]]:
    """The rule, sample by sample, in Python's floats, which are the same float64."""
    normal = [weight / sum(weights) for weight in weights]
    normal = (np.array(normal) / np.sum(np.array(normal))).tolist()
    counts = [0] * len(normal)
    datasets, indices = [], []
    for i in range(count):
        behind = [weight * float(max(i, 1)) - float(given) for weight, given in zip(normal, counts, strict=True)]
        first_of_equals = behind.index(max(behind))
        datasets.append(first_of_equals)
        indices.append(counts[first_of_equals])
        counts[first_of_equals] += 1
    return datasets, indices


any_weights = st.lists(
    st.one_of(st.floats(1e-6, 1e6), st.sampled_from([1.0, 0.5, 0.25, 1 / 3, 0.1])), min_size=1, max_size=9
)


@settings(deadline=None, max_examples=80)
@given(
    weights=any_weights,
    count=st.integers(1, 700),
    segment=st.sampled_from([4, 16, 64]),
    side_by_side=st.sampled_from([1, 3, 16]),
    data=st.data(),
)
def test_blend_equals_the_greedy_rule(weights, count, segment, side_by_side, data) -> None:
    """Short segments: many guesses, most of them wrong, in few samples."""
    datasets, indices = slow(weights, count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blend, "SEGMENT", segment)
        patch.setattr(blend, "SIDE_BY_SIDE", side_by_side)
        blended = Blend(weights)
        some = data.draw(st.lists(st.integers(0, count - 1), max_size=5))  # in any order, before all of them
        found = blended(some)
        assert found[0].tolist() == [datasets[i] for i in some]
        assert found[1].tolist() == [indices[i] for i in some]
        found = blended(np.arange(count))
    assert found[0].dtype == np.uint8
    assert found[1].dtype == np.int64
    assert found[0].tolist() == datasets
    assert found[1].tolist() == indices


PILE = [18.11, 14.40, 12.12, 10.01, 8.96, 7.59, 6.12, 5.13, 3.87, 2.16, 1.53]
PILE += [1.24, 0.97, 0.93, 0.65, 0.95, 0.73, 0.38, 0.19, 0.46, 0.3, 0.14]


@pytest.mark.parametrize(
    ("weights", "digest"),
    [([0.7, 0.2, 0.1], "26b1b195957b49a9"), ([1, 1, 1], "400fba2e1240a6f8"), (PILE, "996a8f55ac97f611")],
)
def test_blend_equals_gpt_neox_code(weights, digest) -> None:
    """The digests are of the first 2000 samples that gpt-neox's C++ helper gave."""
    hashed = hashlib.sha256(b"".join(array.astype("<i8").tobytes() for array in Blend(weights)(np.arange(2000))))
    assert hashed.hexdigest()[:16] == digest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weights", "digest"),
    [([0.7, 0.2, 0.1], "60d4b1f632354878"), (PILE, "6d1bfea792d0000c"), ([1, 1e-7, 3e-5, 2], "3221a226ce079e9e")],
)
def test_blend_equals_gpt_neox_over_three_million_samples(weights, digest) -> None:
    hashed = hashlib.sha256(b"".join(array.astype("<i8").tobytes() for array in Blend(weights)(np.arange(3_000_000))))
    assert hashed.hexdigest()[:16] == digest


def test_blend_guesses_need_few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule forgets wrong guesses: a million samples in a few thousand steps side by side, not a million."""
    steps = []
    follow = Blend._follow
    monkeypatch.setattr(Blend, "_follow", lambda self, *state: (steps.append(blend.SEGMENT), follow(self, *state))[1])
    for weights in (PILE, [0.7, 0.2, 0.1], [1.0, 1.0], [1.0, 1e-5]):
        steps.clear()
        Blend(weights)([2**20 - 1])
        assert sum(steps) <= 8 * blend.SEGMENT


@settings(deadline=None, max_examples=50)
@given(weights=any_weights, num_samples=st.integers(1, 10**9))
def test_blend_shares_have_half_a_percent_of_margin(weights, num_samples) -> None:
    total = sum(map(Fraction, weights))
    for count, weight in zip(shares(weights, num_samples), weights, strict=True):
        exact = num_samples * Fraction(weight) / total * Fraction(1005, 1000)
        assert exact * (1 - Fraction(1, 10**14)) <= count < exact * (1 + Fraction(1, 10**14)) + 1


def test_blend_share_is_the_number_in_pythias_index_files() -> None:
    """pile_20B_tokenizer_text_document_train_0_indexmap_147164160ns_2048sl_1234s: 143000 steps of 1024, weight 1."""
    assert shares([1.0], 143000 * 1024) == [147164160]


def test_blend_progress_bar_for_long_work(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(blend, "SIDE_BY_SIDE", 1)
    monkeypatch.setattr(blend, "SHOWN", 2)
    Blend([1.0, 2.0])([4000])
    Blend([1.0, 2.0], progress=True)([2000])
    assert capsys.readouterr().err == ""
    Blend([1.0, 2.0], progress=True)([4000])
    assert "blend" in capsys.readouterr().err


def test_blend_refuses_bad_weights() -> None:
    Blend([1.0] * 254)
    with pytest.raises(ValueError, match=r"data\.weights: 255 entries; at most 254 can be blended"):
        Blend([1.0] * 255)

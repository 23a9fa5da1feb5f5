"""The keyed permutation: a bijection in each epoch, different between epochs and seeds, uniform, exact in 64 bits."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neox.data import PermutedOrder, SequentialOrder

seeds = st.integers(0, 2**63 - 1)
WORD = 2**64


def slow(n: int, seed: int, sample: int) -> int:
    """The order's description in Python integers: SplitMix64 round functions, Feistel, cycle walking."""
    golden = 0x9E3779B97F4A7C15

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % WORD
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % WORD
        return x ^ (x >> 31)

    half = 1
    while 4**half < n:
        half += 1
    epoch, x = divmod(sample, n)
    key = mix((mix((seed + golden) % WORD) + (epoch + 1) * golden) % WORD)
    while True:
        left, right = divmod(x, 2**half)
        for number in range(1, 9):
            f = mix((right + mix((key + number * golden) % WORD)) % WORD)
            left, right = right, left ^ (f % 2**half)
        x = left * 2**half + right
        if x < n:
            return x


@settings(deadline=None)
@given(n=st.one_of(st.integers(1, 40), st.integers(1, 5000)), seed=seeds, epoch=st.integers(0, 10**6))
def test_permuted_order_is_a_bijection_in_each_epoch(n: int, seed: int, epoch: int) -> None:
    windows = PermutedOrder(n, seed)(np.arange(epoch * n, (epoch + 1) * n))
    assert windows.dtype == np.int64
    np.testing.assert_array_equal(np.sort(windows), np.arange(n))


@settings(deadline=None)
@given(n=st.one_of(st.integers(1, 100), st.integers(1, 2**50)), seed=seeds, data=st.data())
def test_permuted_order_equals_the_description(n: int, seed: int, data: st.DataObject) -> None:
    samples = data.draw(st.lists(st.integers(0, min(2**62, 1000 * n)), max_size=5))
    assert PermutedOrder(n, seed)(np.array(samples, dtype=np.int64)).tolist() == [slow(n, seed, s) for s in samples]


@settings(deadline=None)
@given(n=st.integers(50, 5000), seed=seeds, epoch=st.integers(0, 1000))
def test_permuted_order_differs_by_epoch_and_seed(n: int, seed: int, epoch: int) -> None:
    order = PermutedOrder(n, seed)
    first = order(np.arange(epoch * n, epoch * n + n))
    # Two random permutations agree in one place on average (Poisson with mean 1): 20 places are out of reach.
    assert np.sum(first == order(np.arange((epoch + 1) * n, (epoch + 2) * n))) < 20
    assert np.sum(first == PermutedOrder(n, seed ^ 1)(np.arange(epoch * n, epoch * n + n))) < 20
    assert np.sum(first == np.arange(n)) < 20


@settings(deadline=None)
@given(n=st.integers(1, 5000), seed=seeds, samples=st.lists(st.integers(0, 10**6), min_size=1, max_size=30))
def test_permuted_order_one_by_one_equals_all_at_once(n: int, seed: int, samples: list[int]) -> None:
    order = PermutedOrder(n, seed)
    together = order(np.array(samples))
    assert together.tolist() == [int(order(np.array(s))) for s in samples]
    assert order(np.array(samples).reshape(1, -1)).shape == (1, len(samples))


@pytest.mark.parametrize("n", [5, 16, 33, 64, 100])
def test_permuted_order_is_uniform(n: int) -> None:
    """Chi-square on (place, window) over many epochs; the bounds are 5 standard deviations of the statistic."""
    epochs = 100 * n
    table = np.zeros((n, n))
    for start in range(0, epochs, 1000):
        count = min(1000, epochs - start)
        windows = PermutedOrder(n, 7)(np.arange(start * n, (start + count) * n)).reshape(count, n)
        for place in range(n):
            table[place] += np.bincount(windows[:, place], minlength=n)
    expected = epochs / n
    statistic = ((table - expected) ** 2 / expected).sum()
    freedom = (n - 1) ** 2
    assert abs(statistic - freedom) < 5 * np.sqrt(2 * freedom)


def test_permuted_order_neighbours_look_independent() -> None:
    n = 2**40
    windows = PermutedOrder(n, 11)(np.arange(100_000)) / n
    np.testing.assert_allclose(windows.mean(), 0.5, atol=5 * np.sqrt(1 / 12 / 1e5))
    # For independent uniform numbers the lag-1 correlation has standard deviation 1 / sqrt(count).
    assert abs(np.corrcoef(windows[:-1], windows[1:])[0, 1]) < 5 / np.sqrt(1e5)
    counts = np.bincount((windows * 64).astype(int), minlength=64)
    statistic = ((counts - 1e5 / 64) ** 2 / (1e5 / 64)).sum()
    assert abs(statistic - 63) < 5 * np.sqrt(2 * 63)


@pytest.mark.parametrize("n", [2**40, 2**40 + 1, 2**62 - 1])
def test_permuted_order_takes_no_memory(n: int) -> None:
    samples = np.array([0, 1, n - 1, n, 2**63 - 1], dtype=np.int64)
    tracemalloc.start()
    windows = PermutedOrder(n, 0)(samples)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
    assert np.all((windows >= 0) & (windows < n))
    assert windows.tolist() == [slow(n, 0, int(s)) for s in samples]


def test_sequential_order_wraps() -> None:
    assert SequentialOrder(3)(np.arange(7)).tolist() == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("n", [0, -1])
def test_order_without_windows(n: int) -> None:
    for make in (lambda: PermutedOrder(n, 0), lambda: SequentialOrder(n)):
        with pytest.raises(ValueError, match="at least one window"):
            make()


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_order_seed_out_of_range(seed: int) -> None:
    with pytest.raises(ValueError, match=rf"train\.seed = {seed}"):
        PermutedOrder(1, seed)


def test_order_refuses_negative_samples() -> None:
    for order in (PermutedOrder(3, 0), SequentialOrder(3)):
        with pytest.raises(AssertionError):
            order(np.array([-1]))

"""Order of windows over a run: pure functions of (seed, sample number), without index arrays.

`permuted` shuffles by a keyed permutation: a balanced Feistel network (Luby and Rackoff 1988) on the smallest domain
of 4^k that holds all windows, with cycle walking (Black and Rogaway 2002) for the numbers outside, and SplitMix64's
finaliser (Steele, Lea and Flood 2014) as its round function. Each epoch has a key of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
ROUNDS = 8
Samples = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]


def mix(x: Keys) -> Keys:
    """SplitMix64's finaliser, a bijection of 64-bit words; any shape, arrays only (numpy wraps these silently)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class SequentialOrder:
    """Sequential order: sample s is window s % num_windows. Validation uses it."""

    def __init__(self, num_windows: int) -> None:
        self.num_windows = _positive(num_windows)

    def __call__(self, samples: Samples) -> Samples:
        """Window numbers of sample numbers, both int64 of any one shape."""
        return _checked(samples) % self.num_windows

    def inverse(self, windows: Samples, epoch: int) -> Samples:
        """Sample numbers at which these windows are read in that epoch."""
        return epoch * self.num_windows + windows


class PermutedOrder:
    """Pseudorandom order: each window once an epoch, each epoch with its own permutation.

    Sample s is window permutation_(seed, s // n)(s % n) of n = num_windows.

    Memory is O(1) in n; n and the sample numbers may be as large as int64 holds.
    """

    def __init__(self, num_windows: int, seed: int) -> None:
        self.num_windows = _positive(num_windows)
        if not 0 <= seed < 2**63:
            raise ValueError(f"train.seed = {seed}: must be from 0 to 2**63 - 1")
        self.seed = seed
        self._half = np.uint64(max(1, -(-(num_windows - 1).bit_length() // 2)))
        self._mask = (np.uint64(1) << self._half) - np.uint64(1)

    def __call__(self, samples: Samples) -> Samples:
        """Window numbers of sample numbers, both int64 of any one shape."""
        samples = _checked(samples)
        flat = samples.reshape(-1)
        keys = self._keys(flat // self.num_windows)
        x = (flat % self.num_windows).astype(np.uint64)
        return self._walk(x, keys, self._permute).reshape(samples.shape)

    def inverse(self, windows: Samples, epoch: int) -> Samples:
        """Sample numbers [n] at which these windows [n] are read in that epoch, O(1) each."""
        keys = self._keys(np.full(len(windows), epoch, np.int64))
        x = np.asarray(windows, np.int64).astype(np.uint64)
        return epoch * self.num_windows + self._walk(x, keys, self._restore)

    def _walk(self, x: Keys, keys: Keys, step: Callable[[Keys, Keys], Keys]) -> Samples:
        """Repeat `step` until the number is that of a window."""
        x = step(x, keys)
        while (outside := np.flatnonzero(x >= np.uint64(self.num_windows))).size:
            x[outside] = step(x[outside], keys[outside])
        return x.astype(np.int64)

    def _keys(self, epochs: Samples) -> Keys:
        """One key an epoch, from the seed and the epoch."""
        seed = mix(np.full(epochs.shape, self.seed, np.uint64) + GOLDEN)
        return mix(seed + (epochs.astype(np.uint64) + np.uint64(1)) * GOLDEN)

    def _permute(self, x: Keys, keys: Keys) -> Keys:
        left, right = x >> self._half, x & self._mask
        for number in range(1, ROUNDS + 1):
            left, right = right, left ^ self._round(right, keys, number)
        return (left << self._half) | right

    def _restore(self, x: Keys, keys: Keys) -> Keys:
        left, right = x >> self._half, x & self._mask
        for number in range(ROUNDS, 0, -1):
            left, right = right ^ self._round(left, keys, number), left
        return (left << self._half) | right

    def _round(self, half: Keys, keys: Keys, number: int) -> Keys:
        round_key = mix(keys + np.full(keys.shape, number, np.uint64) * GOLDEN)
        return mix(half + round_key) & self._mask


def _positive(num_windows: int) -> int:
    if num_windows < 1:
        raise ValueError(f"an order needs at least one window, not {num_windows}")
    return int(num_windows)


def _checked(samples: Samples) -> Samples:
    samples = np.asarray(samples, dtype=np.int64)
    assert not samples.size or samples.min() >= 0, "sample numbers start at 0"
    return samples

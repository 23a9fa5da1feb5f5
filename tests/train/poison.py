"""Training text with something in it that does harm, and what is to be seen afterwards."""

from pathlib import Path

import numpy as np

from neox.config import load_config
from neox.data import Loader, TokenWriter
from neox.data.order import PermutedOrder
from tests.train.helpers import TINY

B, T, SEED = 4, 32, 1234  # of TINY, and train.seed
COMMON, RARE = 32, 63  # tokens 0 to 31, and one that only the harmful document has
WATCHED = ("lr=3e-3", "schedule.name=constant", "schedule.warmup=0", "spike_window=16", "checkpoint.every=5")


def poisoned(prefix: Path, steps: range = range(0), tokens: int = 20_000) -> Path:
    """Tokens drawn at random, but for the samples of these steps (counted from 0), which repeat one rare token."""
    ids = np.random.default_rng(5).integers(0, COMMON, tokens)
    order = PermutedOrder((tokens - 1) // T, SEED)
    for window in order(np.arange(steps.start * B, steps.stop * B)):
        ids[window * T : (window + 1) * T] = RARE
    with TokenWriter(prefix, np.uint16) as writer:
        writer.add_document(ids)
    return prefix


def settings(folder: Path, out: str, *options: str):
    return load_config(overrides=(*TINY, *WATCHED, f"data.train={folder / 'train'}", f"out={folder / out}", *options))


class Without(Loader):
    """A slow re-derivation: all sample numbers in order, those of the ranges struck out."""

    def __init__(self, loader: Loader, *ranges: tuple[int, int]) -> None:
        super().__init__(loader.dataset, loader.sizes)
        self.left = [n for n in range(100_000) if not any(first <= n < last for first, last in ranges)]

    def samples(self, step):
        return np.array(self.left[self.read(step) : self.read(step + 1)])

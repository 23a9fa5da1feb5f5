"""Checkpoint schedule and retention (keep_last, keep_every), against lists written by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neox.checkpoint import complete_steps, expired, is_due
from neox.config import CheckpointConfig, ConfigError, load_config
from neox.train import Trainer
from tests.train.helpers import TINY, token_pair


def due(last: int, **options: int) -> list[int]:
    return [step for step in range(last + 1) if is_due(CheckpointConfig(**options), step)]


def test_pythias_schedule():
    """154 checkpoints: 0, ten powers of two, and every 1000 up to 143000 (EleutherAI/pythia)."""
    assert due(143000, early=512, every=1000) == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, *range(1000, 143001, 1000)]
    assert len(due(143000, early=512, every=1000)) == 154


def test_without_early_ones():
    assert due(10, every=4) == [4, 8]
    assert due(10, every=0) == []
    assert due(10, every=0, early=5) == [0, 1, 2, 4]


def test_retention_by_hand():
    saved = [0, 1, 2, 4, *range(10, 101, 10)]
    keep = CheckpointConfig(every=10, early=4, keep_last=2, keep_every=40)
    assert expired(keep, saved) == [10, 20, 30, 50, 60, 70]  # 40 and 80 for good, 90 and 100 the newest
    assert expired(CheckpointConfig(keep_last=3), saved) == saved[:-3]
    assert expired(CheckpointConfig(), saved) == []


@given(st.sets(st.integers(0, 200), max_size=30), st.integers(1, 5), st.integers(0, 20), st.integers(0, 64))
def test_the_newest_always_stay(steps, last, every, early):
    gone = expired(CheckpointConfig(keep_last=last, keep_every=every, early=early), steps)
    assert set(gone) <= steps - set(sorted(steps)[-last:])
    assert not any(every and step % every == 0 for step in gone)


def test_keep_last_and_keep_every_of_a_run(tmp_path):
    options = (*TINY, f"data.train={token_pair(tmp_path / 'train')}", "steps=9", f"out={tmp_path / 'run'}")
    kept = ("checkpoint.every=2", "checkpoint.early=1", "checkpoint.keep_last=2", "checkpoint.keep_every=4")
    Trainer(load_config(overrides=(*options, *kept)), quiet=True).fit()
    assert [int(folder.name[5:]) for folder in complete_steps(tmp_path / "run")] == [0, 1, 4, 8, 9]
    assert not [folder for folder in (tmp_path / "run").glob("step_*") if not (folder / ".metadata").exists()]
    again = Trainer(load_config(overrides=(*options, *kept, "steps=10")), resume=True, quiet=True).fit()
    assert again.step == 10


def test_keep_every_alone_says_nothing():
    with pytest.raises(ConfigError, match=r"checkpoint.keep_every: keeps some of .* set checkpoint.keep_last"):
        load_config(overrides=["checkpoint.keep_every=4"])

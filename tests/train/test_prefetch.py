"""Batches made ahead by a thread: the same as without it, its errors where they belong, nothing left behind."""

import threading

import pytest
import torch

from neox.config import load_config
from neox.data import TokenWriter
from neox.train import Trainer
from neox.train.batches import Prefetch
from tests.train.helpers import TINY, VOCAB, rows, token_pair

CPU = torch.device("cpu")


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_the_next_step_is_made_while_this_one_runs():
    made, second = [], threading.Event()

    def make(source, step):
        made.append((step, threading.current_thread().name))
        if step == 1:
            second.set()
        return step * 10

    with Prefetch(make, 3, CPU) as prefetch:
        assert prefetch(None, 0) == 0
        assert second.wait(60), "nothing was made ahead"
        assert [prefetch(None, 1), prefetch(None, 2)] == [10, 20]
    assert [step for step, _ in made] == [0, 1, 2], "each once, and none beyond the last"
    assert not any(name == threading.current_thread().name for _, name in made)
    assert not threads()


def test_steps_in_another_order_are_made_anew():
    with Prefetch(lambda source, step: (step, source), 100, CPU) as prefetch:
        assert [prefetch("a", step)[0] for step in (0, 1, 2, 1, 7, 0)] == [0, 1, 2, 1, 7, 0]
        prefetch("a", 5)
        assert prefetch("b", 6) == (6, "b")  # a rewind replaces the loader: what was made ahead is dropped
        assert prefetch("b", 4) == (4, "b")


def test_an_error_surfaces_in_the_step_that_needs_it():
    def make(source, step):
        if step == 2:
            raise ValueError(f"no step {step}")
        return step

    with Prefetch(make, 10, CPU) as prefetch:
        assert [prefetch(None, 0), prefetch(None, 1)] == [0, 1]
        for _ in range(2):
            with pytest.raises(ValueError, match="no step 2"):
                prefetch(None, 2)
        assert prefetch(None, 3) == 3
    assert not threads()


def settings(tmp_path, *options):
    return load_config(overrides=(*TINY, f"data.train={tmp_path / 'train'}", "steps=6", *options))


def test_a_run_is_that_of_batches_made_when_they_are_needed(tmp_path, monkeypatch):
    token_pair(tmp_path / "train")
    assert Trainer(settings(tmp_path, f"out={tmp_path / 'ahead'}"), quiet=True).fit().finished
    assert not threads()
    monkeypatch.setattr(Prefetch, "__call__", lambda self, source, step: self.make(source, step))
    assert Trainer(settings(tmp_path, f"out={tmp_path / 'plain'}"), quiet=True).fit().finished
    assert rows(tmp_path / "ahead") == rows(tmp_path / "plain")


def test_bad_data_ends_the_run_in_its_own_step_and_leaves_no_thread(tmp_path):
    """The samples before it are trained on, saved and resumable."""
    with TokenWriter(tmp_path / "train", "uint16") as writer:
        writer.add_document([VOCAB if n == 500 else n % VOCAB for n in range(801)])
    config = settings(tmp_path, f"out={tmp_path / 'run'}", "checkpoint.every=1")
    with pytest.raises(ValueError, match=f"token {VOCAB}"):
        Trainer(config, quiet=True).fit()
    assert not threads()
    done = [row["step"] for row in rows(tmp_path / "run")]
    bad = {int(sample) for sample in range(24) if VOCAB in _sample(config, sample)}
    assert done == list(range(1, min(bad) // 4 + 1))


def _sample(config, number):
    from neox.data import build_datasets

    train = build_datasets(config.data, [config.data.train[0]], [], config.train.seed, 24, False).train
    return train.sample([number])

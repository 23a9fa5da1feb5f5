"""Batch sizes that change over a run: on resume, and in a warm-up. Samples count on, and are found again."""

import json

import numpy as np
import pytest
import torch

from neox import cli
from neox.analysis.sample_inspector import SampleInspector
from neox.config import TrainConfig, load_config
from neox.data.loader import Loader, batch_sizes
from neox.planning import show
from neox.train.batches import Batches
from tests.train.helpers import TINY, assert_same_run, complete, cut_back, one_line, token_pair


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_steps_and_samples_are_each_others_inverse():
    """Each sample once, in order, whatever the sizes; ranges that are stepped over are left out."""
    for sizes, over in (
        ([(0, 4)], []),
        ([(0, 2), (3, 5), (4, 1)], []),
        ([(0, 3), (2, 7)], [(4, 9), (20, 21)]),
    ):
        loader = Loader(None, sizes, over)
        taken = np.concatenate([loader.samples(step) for step in range(12)])
        left_out = {sample for first, last in over for sample in range(first, last)}
        assert taken.tolist() == [n for n in range(taken[-1] + 1) if n not in left_out], sizes
        places = [[step, row] for step in range(12) for row in range(loader.size(step))]
        assert loader.steps(taken).tolist() == places, sizes
        assert [loader.read(step) for step in range(13)] == np.cumsum([0, *map(loader.size, range(12))]).tolist(), sizes


def test_sizes_of_a_warmup_and_of_a_resumed_run():
    warmup = TrainConfig(global_batch_size=8, batch_warmup=((2, 10), (4, 20)))
    assert batch_sizes(warmup) == [(0, 2), (10, 4), (20, 8)]
    assert batch_sizes(warmup, batch_sizes(warmup), 15) == [(0, 2), (10, 4), (20, 8)]
    assert batch_sizes(TrainConfig(global_batch_size=6), [(0, 4)], 15) == [(0, 4), (15, 6)]
    assert batch_sizes(TrainConfig(global_batch_size=6), [(0, 4), (15, 9)], 15) == [(0, 4), (15, 6)]
    with pytest.raises(ValueError, match="its steps must ascend"):
        batch_sizes(TrainConfig(batch_warmup=((2, 10), (4, 10))))


@pytest.mark.parametrize("order", ["permuted", "megatron"])
def test_the_batch_size_changes_on_resume(tmp_path, order, monkeypatch):
    """What inspect data says of each step is what the step trained on, before and after the change."""
    trained, plain = {}, Batches.__call__

    def noted(self, loader, step):
        batches, valid = plain(self, loader, step)
        trained[step + 1] = torch.cat([batch.tokens for batch in batches])
        return batches, valid

    monkeypatch.setattr(Batches, "__call__", noted)
    run, data = tmp_path / "run", token_pair(tmp_path / "corpus")
    settings = [*TINY, f"data.train={data}", f"out={run}", f"data.order={order}", "data.num_samples=60"]
    assert cli.main(["train", *settings[: -1 if order == "permuted" else None], "steps=2"]) == 0
    assert cli.main(["train", f"resume={run}", "steps=4", "global_batch_size=7"]) == 0
    assert cli.main(["train", f"resume={run}", "steps=5", "global_batch_size=3", "micro_batch_size=4"]) == 0
    read = [4, 8, 15, 22, 25]
    assert [row["samples"] for row in rows(run)] == read
    assert [row["tokens"] for row in rows(run)] == [32 * samples for samples in read]
    inspector = SampleInspector.of_run(run)
    samples = []
    for step in range(1, 6):
        found = list(inspector.rows(step))
        assert np.array_equal([one.tokens[:-1] for one in found], trained[step]), step
        samples += [one.sample for one in found]
    assert samples == list(range(25))
    assert [inspector.samples_before(step) for step in range(6)] == [0, *read]


def test_a_warmup_goes_on_as_if_it_had_not_been_stopped(tmp_path, capsys):
    data = token_pair(tmp_path / "corpus")
    settings = [*TINY, f"data.train={data}", "batch_warmup=[[1,2],[3,4]]", "steps=6", "checkpoint.every=1"]
    run = tmp_path / "run"
    assert cli.main(["train", *settings, f"out={run}"]) == 0
    assert [row["samples"] for row in rows(run)] == [1, 2, 5, 8, 12, 16]
    for step in (1, 2, 3, 5):  # in the middle of a size, and at its end
        again = cut_back(run, tmp_path / f"cut{step}", step)
        assert cli.main(["train", f"resume={again}"]) == 0
        assert_same_run(again, run, tmp_path)
    assert f"{16 * 32:,}" in show(load_config(overrides=settings)), "tokens in all"
    assert len(complete(run)) == 6
    capsys.readouterr()
    assert cli.main(["train", *settings, "batch_warmup=[[2,3],[1,2]]", f"out={tmp_path / 'other'}"]) == 1
    one_line(capsys.readouterr().err, "train.batch_warmup: its steps must ascend")

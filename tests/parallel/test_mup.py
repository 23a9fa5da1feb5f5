"""muP on several processes: widths are those of the model, not of the shards; and over a resumed run."""

import pytest

from tests.parallel.helpers import compare, config, cut, fit, rows
from tests.train.helpers import assert_same_run

MUP = "model.mup_base_width=16"  # half of the model's width: a shard of two processes is just so wide


@pytest.mark.parametrize("options", [("parallel.tp=2",), ("parallel.zero=3",), ("parallel.pp=2",)])
def test_several_processes_take_the_steps_of_one(tmp_path, options):
    compare(tmp_path, 2, MUP, *options)


def test_a_resumed_run_is_the_same_and_another_than_without(tmp_path):
    whole = config(tmp_path, "whole", MUP, "steps=4")
    fit(whole)
    parted = config(tmp_path, "parted", MUP, "steps=4", "schedule.horizon=4")
    fit(cut(parted, 2))
    fit(parted, resume=True)
    assert_same_run(tmp_path / "parted", tmp_path / "whole", tmp_path)
    fit(config(tmp_path, "standard", "steps=4"))
    standard, losses = ([row["loss"] for row in rows(tmp_path / name)] for name in ("standard", "whole"))
    assert standard != pytest.approx(losses, rel=1e-3)

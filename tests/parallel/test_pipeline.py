"""A pipeline takes the steps that one process takes: same losses, gradients and weights under every schedule."""

import pytest

from tests.parallel.helpers import compare
from tests.train.helpers import token_pair

FOUR = ("num_hidden_layers=4", "hidden_size=16", "micro_batch_size=1")
EIGHT = ("num_hidden_layers=8", *FOUR[1:])
SPLIT = ("interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipev")


@pytest.mark.parametrize(
    ("world", "options"),
    [
        (2, ("parallel.pp=2", "log.norms=true", "parallel.split=[1,1]")),
        (2, ("parallel.pp=2", "global_batch_size=7", "use_parallel_residual=false", "position_embedding=learned")),
        (4, ("parallel.pp=4", "global_batch_size=5", *EIGHT)),
        (4, ("parallel.pp=2", "global_batch_size=7", "log.norms=true", "optim.name=muon")),
    ],
)
def test_stages_equal_one_process(tmp_path, world, options):
    compare(tmp_path, world, *options)


@pytest.mark.parametrize("schedule", SPLIT)
def test_schedules_equal_one_process(tmp_path, schedule):
    valid = (f"data.valid={token_pair(tmp_path / 'valid', 700, seed=9)}", "eval.every=2", "eval.batches=3")
    compare(tmp_path, 2, "parallel.pp=2", f"parallel.schedule={schedule}", *FOUR, *valid)

@pytest.mark.slow
@pytest.mark.parametrize("options", [("parallel.pp=4", "global_batch_size=8", *EIGHT), ("parallel.pp=2", "global_batch_size=8", *FOUR)])
@pytest.mark.parametrize("schedule", SPLIT)
def test_schedules_on_four(tmp_path, schedule, options):
    compare(tmp_path, 4, f"parallel.schedule={schedule}", *options)

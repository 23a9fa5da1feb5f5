"""Many processes take the steps that one alone takes: same losses, gradients and weights, whatever is shared."""

import pytest
import torch

from neox.checkpoint import complete_steps
from neox.parallel import layout
from neox.runtime import Processes
from tests.parallel.helpers import compare, config, cut, fit, together
from tests.train.helpers import rows, token_pair


@pytest.mark.parametrize(
    ("world", "options"),
    [
        (2, ("parallel.zero=1",)),
        (2, ("parallel.zero=2", "optim.name=muon")),
        (2, ("parallel.zero=3", "tie_word_embeddings=true", "use_parallel_residual=false")),
        (4, ("parallel.zero=1", "parallel.dp_replicate=2")),
        (4, ("parallel.zero=3", "activation_checkpointing=selective", "micro_batch_size=1", "global_batch_size=8")),
    ],
)
def test_many_processes_equal_one(tmp_path, world, options):
    compare(tmp_path, world, *options)


@pytest.mark.parametrize(("world", "batch"), [(2, 7), (4, 7)])
def test_a_batch_that_does_not_split_evenly(tmp_path, world, batch):
    compare(tmp_path, world, f"global_batch_size={batch}", "micro_batch_size=2")


def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    """Steps 1 to 3 on one, 4 to 6 on four, 7 to 9 on two: the losses of nine steps on one."""
    whole = ("steps=9", "checkpoint.every=3", "parallel.zero=3", "schedule.min_lr=1e-3")  # a constant rate
    fit(config(tmp_path, "alone", *whole))
    settings = config(tmp_path, "moved", *whole, "checkpoint.keep_last=1")
    fit(cut(settings, 3))
    assert [folder.name for folder in complete_steps(tmp_path / "moved")][-1] == "step_00000003"
    together(4, tmp_path / "ranks", fit, cut(settings, 6), True)
    together(2, tmp_path / "ranks", fit, settings, True)
    for a, b in zip(rows(tmp_path / "alone"), rows(tmp_path / "moved"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-6), a["step"]


def test_validation_is_that_of_one_process(tmp_path):
    options = (f"data.valid={token_pair(tmp_path / 'valid', 700, seed=9)}", "eval.every=3", "eval.batches=3")
    fit(config(tmp_path, "alone", *options))
    together(2, tmp_path / "ranks", fit, config(tmp_path, "many", *options))
    one, many = (rows(tmp_path / run)[-1] for run in ("alone", "many"))
    assert one["valid_loss"] == pytest.approx(many["valid_loss"], abs=1e-6)


@pytest.mark.parametrize("options", [("parallel.dp_replicate=3",), ("parallel.dp_shard=3",)])
def test_axes_that_do_not_make_up_the_processes(tmp_path, options):
    settings = config(tmp_path, "run", *options)
    with pytest.raises(ValueError, match=r"parallel.dp_\w+=3 is 3 processes, 4 run"):
        layout(settings.parallel, Processes(0, 4), torch.device("cpu"))

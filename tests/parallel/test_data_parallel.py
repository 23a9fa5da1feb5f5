"""Many processes take the steps that one alone takes: same losses, gradients and weights, whatever is shared."""

import pytest
import torch

from neox.checkpoint import complete_steps
from neox.parallel import parallel_dims
from neox.system.processes import Processes
from tests.parallel.helpers import compare, config, cut, fit, together
from tests.train.helpers import rows, tensors, token_pair


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
def test_data_parallel_processes_equal_one(tmp_path, world, options):
    compare(tmp_path, world, *options)


def test_dropout_is_drawn_by_sample_not_by_process(tmp_path):
    """Two processes take the two microbatches of the one and drop what it drops; norms are those of the whole."""
    compare(tmp_path, 2, "hidden_dropout=0.1", "attention_dropout=0.2", "parallel.zero=3", "log.norms=true")
    for one, many in zip(rows(tmp_path / "alone"), rows(tmp_path / "many"), strict=True):
        keys = [key for key in one if "_norms/" in key]
        assert len(keys) == 15
        assert [many[key] for key in keys] == pytest.approx([one[key] for key in keys], rel=1e-5)


@pytest.mark.parametrize("zero", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_fp16_overflows_on_all_processes_at_once(tmp_path, zero):
    """Sharded parameters are gathered in fp16, alone they are cast: both round by up to 2^-11 = 5e-4."""
    options = ("dtype=fp16", "loss_scale=4e6", "loss_scale_window=2", "steps=6", f"parallel.zero={zero}")
    fit(config(tmp_path, "alone", *options[:-1]))
    together(2, tmp_path / "ranks", fit, config(tmp_path, "many", *options))
    one, many = rows(tmp_path / "alone"), rows(tmp_path / "many")
    assert [row["skipped"] for row in one] == [row["skipped"] for row in many]
    assert 0 < one[-1]["skipped"] < 6
    for a, b in zip(one, many, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=5e-4)
        assert (a["grad_norm"] or 0) == pytest.approx(b["grad_norm"] or 0, rel=5e-4)
        assert a["loss_scale"] == b["loss_scale"]


@pytest.mark.parametrize("zero", [1, 3])
def test_bf16_products_over_fp32_weights(tmp_path, zero):
    """Gathered in bf16, reduced and kept in fp32: losses follow fp32 to bf16's 8 bits, what is saved has 24."""
    fit(config(tmp_path, "fp32"))
    together(2, tmp_path / "ranks", fit, config(tmp_path, "bf16", "dtype=bf16", f"parallel.zero={zero}"))
    for exact, found in zip(rows(tmp_path / "fp32"), rows(tmp_path / "bf16"), strict=True):
        assert exact["loss"] != found["loss"]
        assert exact["loss"] == pytest.approx(found["loss"], rel=2**-8)
    saved = tensors(complete_steps(tmp_path / "bf16")[-1], tmp_path)
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert any((tensor != tensor.bfloat16()).any() for name, tensor in saved.items() if name.startswith("model."))


@pytest.mark.parametrize(("world", "batch"), [(2, 7), (4, 7)])
def test_a_batch_that_does_not_split_evenly(tmp_path, world, batch):
    compare(tmp_path, world, f"global_batch_size={batch}", "micro_batch_size=2")


def test_a_run_resumes_with_another_number_of_processes(tmp_path):
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
        parallel_dims(settings.parallel, Processes(0, 4), torch.device("cpu"))

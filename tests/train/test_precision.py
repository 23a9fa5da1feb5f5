"""fp32, bf16 and fp16 runs: near each other, resumed bit for bit, and what an overflow changes: the scale alone."""

import json
import math

import pytest
import torch

from neox.checkpoint import read_step
from neox.config import load_config
from neox.train import Trainer, lr_factor
from tests.checkpoint.sealing import seal
from tests.train.helpers import TINY, assert_same_run, complete, cut_back, rows, tensors, token_pair

# fp16 ends at 65504, this model's gradients get there at a scale of about 1.5e6; a window of 2 leads back to it.
OVERFLOWING = ("dtype=fp16", "loss_scale=4e6", "loss_scale_window=2")


def config(tmp_path, *options: str, out: str = "run", steps: int = 8):
    prefix = tmp_path / "train"
    if not prefix.with_suffix(".idx").exists():
        token_pair(prefix)
    fixed = (f"data.train={prefix}", f"steps={steps}", f"out={tmp_path / out}", "checkpoint.every=0", "warmup=1")
    return load_config(overrides=[*TINY, *fixed, *options])


def fit(tmp_path, *options: str, out: str = "run", steps: int = 8, hooks=()) -> list[dict]:
    Trainer(config(tmp_path, *options, out=out, steps=steps), quiet=True, hooks=hooks).fit()
    return rows(tmp_path / out)


def resumed(run, copy, step: int, steps: int) -> None:
    """Cut a finished run back to a checkpoint and let it go on."""
    cut_back(run, copy, step)
    settings = load_config(files=[run / "config.toml"], overrides=[f"out={copy}"])
    assert Trainer(settings, resume=True, quiet=True).fit().step == steps


@pytest.mark.parametrize(
    "options",
    [
        ("dtype=fp32",),
        ("dtype=bf16",),
        ("dtype=fp16",),
        OVERFLOWING,
        ("dtype=fp32", "hidden_dropout=0.1", "attention_dropout=0.1", "optim.name=muon"),
        (*OVERFLOWING, "hidden_dropout=0.1"),
    ],
    ids=lambda options: "+".join(options),
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, options):
    whole = fit(tmp_path, *options, "checkpoint.every=4", "log.norms=true", out="whole")
    resumed(tmp_path / "whole", tmp_path / "again", 4, 8)
    assert_same_run(tmp_path / "again", tmp_path / "whole", tmp_path)
    if "loss_scale=4e6" in options:
        skipped = [row["skipped"] for row in whole]
        assert 0 < skipped[3] < 4  # on both sides of the checkpoint there are steps that are skipped, and others
        assert skipped[3] < skipped[7] < skipped[3] + 4


def test_fp16_follows_fp32_and_keeps_fp32_weights(tmp_path):
    """A product in fp16 is off by up to 2^-11 = 5e-4. Measured: losses 6e-5, norms 3e-4; bf16, 8 bits, exceeds both."""
    low, high = (fit(tmp_path, f"dtype={dtype}", "lr=1e-2", steps=12, out=dtype) for dtype in ("fp16", "fp32"))
    assert [row["loss"] for row in low] != [row["loss"] for row in high]
    assert [row["loss"] for row in low] == pytest.approx([row["loss"] for row in high], rel=1e-4)
    assert [row["grad_norm"] for row in low] == pytest.approx([row["grad_norm"] for row in high], rel=5e-4)
    assert [row["lr"] for row in low] == [row["lr"] for row in high]
    assert {row["loss_scale"] for row in low} == {4096}
    assert "loss_scale" not in high[0]
    assert {tensor.dtype for tensor in tensors(complete(tmp_path / "fp16")[-1], tmp_path).values()} == {torch.float32}


def test_the_loss_scale_is_no_part_of_the_result(tmp_path):
    """A power of two shifts exponents and nothing else, until the smallest gradients leave fp16's range: with scale 1,
    and on some processors with 2^12, by 5e-7."""
    runs = {
        scale: fit(tmp_path, "dtype=fp16", f"loss_scale={scale}", steps=4, out=f"{scale}")
        for scale in (1, 2**12, 2**14, 2**20)
    }
    for key, tolerance in (("loss", 2e-5), ("grad_norm", 1e-4)):
        values = {scale: [row[key] for row in found] for scale, found in runs.items()}
        assert values[2**20] == values[2**14]
        assert values[2**12] == pytest.approx(values[2**14], rel=1e-5)
        assert values[1] == pytest.approx(values[2**14], rel=tolerance)


def test_an_overflow_skips_the_step_and_leaves_all_but_the_scale(tmp_path):
    """Checked at each step: parameters, AdamW's state and counter, learning rate, and the notes in the row."""
    seen = []

    def look(trainer, step):
        state = trainer.optimizers[0].state
        values = [*trainer.model.parameters(), *(v for each in state.values() for v in each.values())]
        seen.append([v.detach().clone() for v in values])

    found = fit(tmp_path, *OVERFLOWING, steps=12, hooks=(look,))
    schedule, applied, scale = config(tmp_path, *OVERFLOWING).schedule, 0, 4e6
    for row, before, after in zip(found, seen, seen[1:], strict=False):
        overflow = row["grad_norm"] is None
        assert row["lr"] == 1e-3 * lr_factor(schedule, 1e-3, applied, 12)
        assert row["loss_scale"] in (scale, scale / 2, scale * 2)
        same = len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert same == overflow
        applied, scale = applied + (not overflow), row["loss_scale"]
        assert row["skipped"] == row["step"] - applied
        assert {int(v) for v in after if v.ndim == 0} <= {applied}
    assert 0 < applied < 12
    state = read_step(complete(tmp_path / "run")[-1])[1]
    assert (state["step"], state["updates"], state["samples"]) == (12, applied, 12 * 4)
    assert state["loss_scaler"]["step"] == 12


def test_a_checkpoint_from_before_the_first_update_can_be_resumed(tmp_path):
    whole = fit(tmp_path, *OVERFLOWING, "checkpoint.every=1", out="whole", steps=5)
    assert (whole[1]["skipped"], whole[4]["grad_norm"] is None) == (2, False)
    resumed(tmp_path / "whole", tmp_path / "again", 2, 5)
    assert_same_run(tmp_path / "again", tmp_path / "whole", tmp_path)


def test_a_run_that_only_overflows_ends_with_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"run: step 2: fp16 gradients overflow at the smallest loss scale") as caught:
        fit(tmp_path, "dtype=fp16", "loss_scale=1e20", "loss_scale_min=1e20")
    assert "\n" not in str(caught.value)
    assert rows(tmp_path / "run")[0]["grad_norm"] is None


@pytest.mark.parametrize(("key", "value"), [("updates", None), ("loss_scaler", 7), ("loss_scaler", {"scale": 1.0})])
def test_a_checkpoint_whose_counters_are_damaged(tmp_path, key, value):
    fit(tmp_path, "dtype=fp16", steps=1)
    file = complete(tmp_path / "run")[-1] / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    seal(file.parent)  # else the digests find the change first
    with pytest.raises(ValueError, match=r"step_00000001/state.json: cannot be read"):
        Trainer(config(tmp_path, "dtype=fp16", steps=2), resume=True, quiet=True).fit()


def test_a_run_may_change_its_precision_when_it_is_resumed(tmp_path):
    fit(tmp_path, "dtype=fp16", steps=2)
    for steps, dtype in ((4, "fp32"), (6, "fp16")):
        Trainer(config(tmp_path, f"dtype={dtype}", steps=steps), resume=True, quiet=True).fit()
    assert [row.get("loss_scale") for row in rows(tmp_path / "run")] == [4096, 4096, None, None, 4096, 4096]


def test_norms_of_the_parts_are_told_where_asked_for(tmp_path):
    for dtype in ("fp32", "fp16"):
        for row in fit(tmp_path, "log.norms=true", "optim.clip=0.1", f"dtype={dtype}", out=dtype, steps=2):
            parts = [value for key, value in row.items() if key.startswith("gradient_norms/")]
            assert len(parts) == 5
            assert math.hypot(*parts) == pytest.approx(row["grad_norm"], rel=1e-6)
            assert row["parameter_norms/norms"] > 0
    assert not [key for key in fit(tmp_path, out="silent", steps=1)[0] if "norms" in key]


def test_dropout_is_drawn_for_each_microbatch_and_never_in_validation(tmp_path):
    valid = token_pair(tmp_path / "valid", seed=9)
    options = (f"data.valid={valid}", "eval.every=1", "eval.batches=1", "lr=1e-30", "min_lr=0")  # nothing is learned
    draws = []

    def look(trainer, step):
        draws.append(torch.get_rng_state())

    dropped = fit(tmp_path, *options, "hidden_dropout=0.5", out="dropped", steps=3, hooks=(look,))
    whole = fit(tmp_path, *options, out="whole", steps=3)
    assert not torch.equal(draws[1], draws[2])
    for a, b in zip(dropped, whole, strict=True):
        assert a.get("valid_loss") == b.get("valid_loss")
        assert "loss" not in a or a["loss"] != b["loss"]

"""Poison in the data, and a weight that turns NaN on one process: all processes leave out, and go back, alike."""

import math
import time

import pytest
import torch
from torch.distributed.tensor import DTensor

from neox.train import Trainer
from tests.parallel.helpers import together
from tests.train.helpers import complete, rows, tensors
from tests.train.poison import poisoned, settings

STEADY = ("optim.eps=1e-3", "rewind_after=3", "steps=20", "log.norms=true")  # rounding alone moves no weight
LAYOUTS = {"fsdp": "parallel.zero=3", "tp": "parallel.tp=2", "pp": "parallel.pp=2"}


def fit(config, flipped: int | None = None):
    """What this process knows at the end. With `flipped` a weight on the last rank alone turns NaN after that step."""
    done = []

    def flip(trainer, step):
        if step == flipped and not done and trainer.processes.rank == trainer.processes.world - 1:
            done.append(step)
            weight = dict(trainer.model_parts[-1].named_parameters())["layers.1.mlp.dense_4h_to_h.weight"]
            local = weight.to_local() if isinstance(weight, DTensor) else weight
            with torch.no_grad():
                local.view(-1)[7] = math.nan

    trainer = Trainer(config, hooks=(flip,), quiet=True)
    assert trainer.fit().finished
    state = trainer.state.save()
    del state["seconds"]
    return state


def same_run(one, many, scratch) -> None:
    """Rows and weights of one process and of several: the same decisions, and numbers within 1e-6 (norms 4e-6)."""
    assert len(rows(one)) == len(rows(many))
    for a, b in zip(rows(one), rows(many), strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            if isinstance(value, float):
                assert b[key] == pytest.approx(value, abs=4e-6 if "norm" in key else 1e-6), (a["step"], key)
            elif key != "skip_reason":  # rounded figures stand in it
                assert b[key] == value
    first, second = (tensors(complete(run)[-1], scratch) for run in (one, many))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("dims", LAYOUTS)
def test_a_document_of_repeated_rare_tokens(tmp_path, dims):
    poisoned(tmp_path / "train", range(14, 18))
    options = (*STEADY, "spike_sigma=5")
    alone = fit(settings(tmp_path, "alone", *options))
    found = together(2, tmp_path / "ranks", fit, settings(tmp_path, "many", *options, LAYOUTS[dims]))
    assert alone["stepped_over"] == [(44, 68)]
    assert [row["step"] for row in rows(tmp_path / "alone") if "skip_reason" in row] == [12]
    for state in found:
        for kind in ("losses", "norms"):
            assert state["spikes"].pop(kind) == pytest.approx(alone["spikes"][kind], abs=4e-6)
        assert {**state, "spikes": {**state["spikes"], "losses": 0, "norms": 0}} == {
            **alone,
            "spikes": {**alone["spikes"], "losses": 0, "norms": 0},
        }
    same_run(tmp_path / "alone", tmp_path / "many", tmp_path)


@pytest.mark.parametrize("dims", LAYOUTS)
def test_a_weight_of_one_process_that_turns_nan(tmp_path, dims):
    poisoned(tmp_path / "train")
    alone = fit(settings(tmp_path, "alone", *STEADY), 7)
    found = together(2, tmp_path / "ranks", fit, settings(tmp_path, "many", *STEADY, LAYOUTS[dims]), 7)
    assert alone["spikes"]["rewinds"] == [(10, 5)]
    assert alone["stepped_over"] == [(20, 40)]
    assert found == [alone, alone]
    same_run(tmp_path / "alone", tmp_path / "many", tmp_path)


def fit_after_a_while(config, seconds: float):
    """Rank 0 takes so long over the text."""
    from neox.corpus import for_training

    plain = for_training.token_files

    def token_files(config, run, quiet):
        if not (run / "slow").exists():
            (run / "slow").touch()
            time.sleep(seconds)
        return plain(config, run, quiet)

    for_training.token_files = token_files
    return Trainer(config, quiet=True).fit().step


@pytest.mark.slow
def test_those_who_wait_for_the_text_do_not_hang(tmp_path):
    poisoned(tmp_path / "train")
    config = settings(tmp_path, "run", "steps=2", "train.timeout=10", "parallel.dp_shard=2")
    assert together(2, tmp_path / "ranks", fit_after_a_while, config, 15) == [2, 2]

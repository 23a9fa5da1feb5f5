"""The profile of some steps holds those steps and what ran in them."""

import gzip
import json

import pytest

from neox.config import load_config
from neox.train import Trainer
from tests.train.helpers import TINY, rows, token_pair


def fit(tmp_path, out, *options):
    settings = (*TINY, f"data.train={token_pair(tmp_path / 'text')}", f"out={tmp_path / out}", "steps=6", *options)
    return Trainer(load_config(overrides=settings)).fit()


def trace(run):
    with gzip.open(run / "profile" / "trace_rank0.json.gz", "rt") as file:
        return json.load(file)["traceEvents"]


def test_the_steps_asked_for_are_profiled(tmp_path, capsys):
    fit(tmp_path, "run", "profile_step=3", "profile_count=2")
    events = trace(tmp_path / "run")
    steps = {event["name"]: event for event in events if event["name"].startswith("step ") and event.get("ph") == "X"}
    assert set(steps) == {"step 3", "step 4"}
    for step in steps.values():
        inside = [
            event["name"]
            for event in events
            if event.get("ph") == "X" and step["ts"] <= event["ts"] and event["ts"] < step["ts"] + step["dur"]
        ]
        # Four products and attention in each of two blocks, in two microbatches.
        assert inside.count("aten::scaled_dot_product_attention") == 4
        assert inside.count("aten::linear") == 16
        assert any("Optimizer.step#AdamW.step" in name for name in inside)
    table = (tmp_path / "run" / "profile" / "operators_rank0.txt").read_text()
    assert "aten::addmm" in table
    assert "Self CPU" in table
    assert str(tmp_path / "run" / "profile" / "trace_rank0.json.gz") in capsys.readouterr().out


def test_it_changes_nothing_and_is_not_there_unless_asked_for(tmp_path):
    fit(tmp_path, "plain")
    fit(tmp_path, "profiled", "profile_step=2", "profile_count=1")
    assert not (tmp_path / "plain" / "profile").exists()
    assert rows(tmp_path / "plain") == rows(tmp_path / "profiled")


def test_a_run_that_ends_before_its_last_profiled_step_leaves_what_it_saw(tmp_path):
    fit(tmp_path, "run", "profile_step=5", "profile_count=10")
    names = {event["name"] for event in trace(tmp_path / "run")}
    assert {"step 5", "step 6"} <= names


def test_a_step_that_never_comes_is_refused():
    with pytest.raises(ValueError, match=r"train\.profile_step: 7 is beyond the last step \(steps=6\)"):
        load_config(overrides=("steps=6", "profile_step=7"))

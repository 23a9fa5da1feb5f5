"""Steps and validations in which no label counts: documents of one token, whose last label is left out."""

import itertools
import json
import math

import numpy as np

from neox import cli
from neox.analysis.sample_inspector import SampleInspector
from neox.config import load_config
from neox.data import TokenWriter
from neox.model import IGNORED
from neox.train import Trainer
from tests.train.helpers import TINY, complete, one_line, tensors, token_pair


def documents(prefix, sizes):
    with TokenWriter(prefix, np.uint16) as writer:
        for size in sizes:
            writer.add_document(np.arange(size) % 60)
    return prefix


def test_an_update_without_labels_is_skipped_and_named(tmp_path):
    """One sequence a step, half of them documents of one token: the weights move in the other steps alone."""
    data = documents(tmp_path / "corpus", [1] * 400 + [70] * 6)
    options = ["global_batch_size=1", "micro_batch_size=1", "data.segments=true", "checkpoint.every=1", "steps=6"]
    settings = [*TINY, *options, f"data.train={data}"]
    inspector = SampleInspector.of_config(load_config(overrides=settings))
    empty = [bool((inspector.loader.batch(step).labels == IGNORED).all()) for step in range(6)]
    assert 0 < sum(empty) < 6
    for number, more in enumerate(([], ["train.guard=false"], ["dtype=fp16"])):
        run = tmp_path / f"run{number}"
        assert cli.main(["train", *settings, *more, f"out={run}"]) == 0, more
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [row.get("skip_reason") == "none of its labels counts" for row in rows] == empty, more
        assert [row["loss"] is None for row in rows] == empty, more
        assert all(math.isfinite(row["grad_norm"]) for row in rows), more
        weights = [tensors(step, tmp_path)["model.embed_in.weight"] for step in complete(run)]
        moved = [not before.equal(after) for before, after in itertools.pairwise(weights)]
        assert moved == [not each for each in empty[1:]], more


def test_a_validation_without_labels_is_refused_before_the_first_step(tmp_path, capsys):
    train, valid = token_pair(tmp_path / "train"), documents(tmp_path / "valid", [1] * 300)
    settings = [*TINY, f"data.train={train}", f"data.valid={valid}", "data.segments=true", f"out={tmp_path / 'run'}"]
    assert cli.main(["train", *settings, "steps=2", "eval.every=1"]) == 1
    one_line(capsys.readouterr().err, "data.valid: no label counts in the first 9 windows", "eval.every=0")
    trainer = Trainer(load_config(overrides=[*settings, "steps=2"]), quiet=True)
    assert trainer.fit().finished
    assert math.isnan(trainer.validate()), "asked for from Python"

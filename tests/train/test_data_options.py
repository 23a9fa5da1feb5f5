"""What the data options mean for a run: orders that are frozen, blends, splits, segments; other text is refused."""

import json

import numpy as np
import pytest

from neox.config import load_config
from neox.data import TokenWriter
from neox.train import Trainer
from tests.data.test_blend import slow
from tests.train.helpers import TINY, VOCAB, assert_same_run, cut_back, rows, token_pair

DOCUMENTS = (7, 1, 40, 33, 90, 12, 65) * 20


def documents(prefix, seed: int = 1):
    """Token files of many documents of different lengths."""
    draw = np.random.default_rng(seed)
    with TokenWriter(prefix, np.uint16) as writer:
        for size in DOCUMENTS:
            writer.add_document(draw.integers(0, VOCAB, size))
    return prefix


def config(tmp_path, *options: str, out: str = "run"):
    prefix = tmp_path / "train"
    if not prefix.with_suffix(".idx").exists():
        documents(prefix)
    return load_config(
        overrides=(*TINY, f"data.train={prefix}", "checkpoint.every=3", f"out={tmp_path / out}", *options)
    )


def fit(tmp_path, *options: str, out: str = "run", resume: bool = False) -> list[dict]:
    assert Trainer(config(tmp_path, *options, out=out), resume=resume, quiet=True).fit().finished
    return rows(tmp_path / out)


@pytest.mark.parametrize(
    "options",
    [("order=megatron",), ("order=megatron", "weights=[1.0]", "segments=true"), ("weights=[2.0]",), ("segments=true",)],
    ids=lambda options: "+".join(options),
)
def test_resumed_bit_for_bit_in_every_order(tmp_path, options):
    fit(tmp_path, *options, "steps=6", out="whole")
    cut_back(tmp_path / "whole", tmp_path / "again", 3)
    settings = load_config(files=[tmp_path / "whole" / "config.toml"], overrides=[f"out={tmp_path / 'again'}"])
    assert Trainer(settings, resume=True, quiet=True).fit().finished
    assert_same_run(tmp_path / "again", tmp_path / "whole", tmp_path)


def test_the_options_change_what_is_read(tmp_path):
    """Each reads its first batch from the same weights: equal losses would mean an option that does nothing."""
    variants = [(), ("order=megatron",), ("segments=true",), ("split=500,500",), ("weights=[1.0]", "train.seed=1235")]
    losses = {fit(tmp_path, *options, "steps=1", out=str(n))[0]["loss"] for n, options in enumerate(variants)}
    assert len(losses) == len(variants)


def test_a_longer_run_keeps_megatrons_order(tmp_path):
    """The order depends on the number of samples that it was made for, which the run's config holds from its start."""
    fit(tmp_path, "order=megatron", "steps=6", "schedule.min_lr=1e-3", out="whole")
    kept = load_config(files=[tmp_path / "whole" / "config.toml"])
    assert kept.data.num_samples == 6 * kept.train.global_batch_size
    fit(tmp_path, "order=megatron", "steps=3", "schedule.min_lr=1e-3", "num_samples=24", out="longer")
    settings = load_config(files=[tmp_path / "longer" / "config.toml"], overrides=["train.steps=6"])
    assert Trainer(settings, resume=True, quiet=True).fit().finished
    assert [row["loss"] for row in rows(tmp_path / "longer")] == [row["loss"] for row in rows(tmp_path / "whole")]


@pytest.mark.parametrize("change", ["train.seed=9", "order=megatron", "seq_length=16", "split=900,100", "other text"])
def test_a_run_keeps_its_order(tmp_path, change):
    fit(tmp_path, "steps=3")
    if change == "other text":
        documents(tmp_path / "train", seed=2)
        with TokenWriter(tmp_path / "train", np.uint16) as writer:
            writer.add_document(np.zeros(999, np.int64))
        change = "steps=6"
    with pytest.raises(
        ValueError, match=r"run: its data would be read in another order than before step 3: a run keeps"
    ):
        fit(tmp_path, change, *([] if change == "steps=6" else ["steps=6"]), resume=True)


def test_a_split_holds_out_text_for_evaluation(tmp_path):
    found = fit(tmp_path, "split=800,200", "eval.every=2", "steps=4", "eval.batches=1")
    assert [row["step"] for row in found if "valid_loss" in row] == [2, 4]


def test_blended_files(tmp_path):
    other = documents(tmp_path / "other", seed=3)
    both = f'data.train=["{tmp_path / "train"}", "{other}"]'
    documents(tmp_path / "train")
    one = fit(tmp_path, both, "weights=[1.0, 3.0]", "steps=2", out="a")
    two = fit(tmp_path, both, "weights=[3.0, 1.0]", "steps=2", out="b")
    assert one[0]["loss"] != two[0]["loss"]


def test_a_resumed_run_on_text_that_is_gone(tmp_path):
    fit(tmp_path, "steps=3")
    token_pair(tmp_path / "x")
    for file in tmp_path.glob("train.*"):
        file.unlink()
    settings = load_config(files=[tmp_path / "run" / "config.toml"], overrides=["train.steps=6"])
    with pytest.raises((ValueError, FileNotFoundError), match="train"):
        Trainer(settings, resume=True, quiet=True).fit()


@pytest.mark.parametrize("order", ["permuted", "megatron"])
def test_weights_changed_on_resume_hold_from_there_on(tmp_path, order):
    """What is read is the old blend up to the step, then the new one's rule from nothing, each file going on; a run cut
    back behind the change goes on alike, and one that is resumed without a change keeps what it has."""
    both = f'data.train=["{documents(tmp_path / "a")}","{documents(tmp_path / "b", seed=2)}"]'
    options = (both, f"order={order}", "steps=12", "schedule.min_lr=1e-3", "schedule.name=constant")
    changed = "weights=[1.0, 9.0]"
    fit(tmp_path, *options, "weights=[3.0, 1.0]", "steps=3", "num_samples=48", out="run")
    found = fit(tmp_path, *options, changed, "num_samples=48", out="run", resume=True)
    assert [row["step"] for row in found] == list(range(1, 13))
    samples = {"a": [], "b": []}
    for steps, weights in ((3, [3.0, 1.0]), (9, [1.0, 9.0])):
        for owner in slow(weights, 4 * steps)[0]:
            for name in samples:
                samples[name].append(name == "ab"[owner])
    whole = {n: sum(DOCUMENTS) / 32 if order == "megatron" else (sum(DOCUMENTS) - 1) // 32 for n in samples}
    for row in found:
        for name, read in samples.items():
            assert row[f"epochs/{name}"] == sum(read[: 4 * row["step"]]) / whole[name]
    state = json.loads((tmp_path / "run" / "step_00000012" / "state.json").read_bytes())
    assert state["blend"] == [[0, [3.0, 1.0]], [12, [1.0, 9.0]]]
    assert state["read"] == [sum(read) for read in samples.values()]
    for step in (3, 6):  # before the change is noted, and after
        out = tmp_path / f"again-{step}"
        cut_back(tmp_path / "run", out, step)
        settings = load_config(files=[tmp_path / "run" / "config.toml"], overrides=[f"out={out}"])
        assert Trainer(settings, resume=True, quiet=True).fit().finished
        assert_same_run(out, tmp_path / "run", tmp_path)


def test_a_change_of_weights_can_be_taken_back_at_its_step():
    from neox.train.state import blend_schedule

    assert blend_schedule([[0, [1, 2]]], (1.0, 2.0), 8) == [(0, (1.0, 2.0))]
    once = blend_schedule([[0, [1, 2]]], (5.0, 2.0), 8)
    assert once == [(0, (1.0, 2.0)), (8, (5.0, 2.0))]
    assert blend_schedule(once, (1.0, 2.0), 8) == [(0, (1.0, 2.0))]
    assert blend_schedule(once, (3.0, 2.0), 8) == [(0, (1.0, 2.0)), (8, (3.0, 2.0))]
    assert blend_schedule(once, (1.0, 2.0), 9) == [*once, (9, (1.0, 2.0))]
    assert blend_schedule(once, (5.0, 2.0), 4) == once  # a rewind went back behind the change, which stays where it was
    assert blend_schedule([[0, [1, 2]]], (2.0, 2.0), 0) == [(0, (1.0, 2.0)), (0, (2.0, 2.0))]

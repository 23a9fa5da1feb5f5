"""Step times on a GPU, and the search for layouts that fit."""

import re

import pytest

from neox import cli
from neox.config import load_config
from neox.model.flops import train_flops_per_token
from neox.planning.dry_run import StepCost
from neox.planning.hardware import GPUS, USABLE, bubble, gpu, stage_flops, step_time, within_host
from neox.planning.propose import candidates, layouts, propose
from neox.planning.run_plan import dry_run_ranks

PAPER = ("parallel.pp=4", "parallel.tp=2", "parallel.dp_shard=12", "dtype=bf16", "activation_checkpointing=full")


def test_stage_flops_add_up_to_those_of_the_model():
    config = load_config("neox-20b", overrides=PAPER)
    ours = sum(stage_flops(config, 11, stage == 3, causal=False, recomputed=False) for stage in range(4)) * 24
    tokens = config.train.global_batch_size * config.data.seq_length
    whole = train_flops_per_token(config.model, config.data.seq_length) * tokens
    assert ours == pytest.approx(whole, rel=1e-9)
    full = sum(stage_flops(config, 11, stage == 3, causal=False) for stage in range(4)) * 24
    assert full == pytest.approx(train_flops_per_token(config.model, 2048, recomputed=1.0) * tokens, rel=1e-9)


def test_pipeline_bubble_is_the_published_one():
    config = load_config("neox-20b", overrides=PAPER)
    assert bubble(config) == pytest.approx(3 / 35)  # Narayanan et al. 2021: (P - 1) / (M + P - 1)
    assert bubble(load_config("neox-20b", overrides=(*PAPER, "parallel.schedule=interleaved_1f1b"))) == 3 / 67
    assert bubble(load_config("neox-20b")) == 0


def test_mesh_axes_within_a_host():
    config = load_config("neox-20b", overrides=PAPER)
    assert within_host(config, "tp")
    assert not within_host(config, "dp_shard")


def test_step_time_is_bound_by_compute_and_by_the_network():
    config, device = load_config("neox-20b", overrides=PAPER), GPUS["a100-40gb"]
    plain = step_time(config, device, 11, False, 10**8, {})
    assert plain.compute == pytest.approx(stage_flops(config, 11, False) / (0.6 * 312e12))
    sent = step_time(config, device, 11, False, 10**8, {("dp_shard", "all-gather"): 10**9})
    assert sent.total - plain.total == pytest.approx(1e9 / (0.75 * 25e9))
    slow = step_time(config, gpu("a100-40gb", network=2.5), 11, False, 10**8, {("dp_shard", "all-gather"): 10**9})
    assert slow.data == pytest.approx(10 * sent.data)


def test_candidate_layouts_use_all_gpus_and_can_run():
    config = load_config("neox-20b", overrides=("dtype=bf16",))
    found = candidates(config, 96, GPUS["a100-40gb"])
    assert [c.seconds for c in found] == sorted(c.seconds for c in found)
    assert {c.config.parallel.processes for c in found} == {96}
    layouts = {(c.config.parallel.tp, c.config.parallel.pp) for c in found}
    assert (2, 4) in layouts  # the paper's
    fits = [c for c in found if c.peak <= USABLE * GPUS["a100-40gb"].memory]
    # 16 bytes a parameter, 329 GB, do not fit a GPU, nor two.
    assert fits
    assert all(c.config.parallel.tp * c.config.parallel.pp > 1 or c.config.parallel.zero > 1 for c in fits)


def test_each_layout_is_proposed_once_with_its_fastest_settings_that_fit():
    config, device = load_config("pythia-12b", overrides=("dtype=bf16",)), GPUS["a100-40gb"]
    found, room = candidates(config, 32, device), USABLE * device.memory
    best = layouts(found, room)
    assert len({c.layout for c in best}) == len(best) == len({c.layout for c in found})
    assert [c.seconds for c in best] == sorted(c.seconds for c in best)
    for one in best:
        others = [c for c in found if c.layout == one.layout]
        if one.peak <= room:
            assert one.seconds <= 1.01 * min(c.seconds for c in others if c.peak <= room)
        else:
            assert one.peak == min(c.peak for c in others)


def test_one_dry_run_serves_pipeline_ranks_of_as_many_layers(monkeypatch):
    """Between the ends: that of the first of them, which keeps the most microbatches."""
    monkeypatch.setattr("neox.planning.run_plan.dry_run", lambda config, rank: StepCost(rank, {}, {}))
    config = load_config("pythia-12b", overrides=("parallel.pp=8", "parallel.stage_layers=[4,4,4,5,5,5,5,4]"))
    ranks = dry_run_ranks(config)
    assert [rank.layers for rank in ranks] == [4, 4, 4, 5, 5, 5, 5, 4]
    assert [rank.cost.parameters for rank in ranks] == [0, 1, 1, 3, 3, 3, 3, 7]
    assert [rank.head for rank in ranks] == [False] * 7 + [True]


def test_propose_says_in_one_line_that_nothing_fits():
    text = propose(load_config("neox-20b", overrides=("dtype=bf16",)), 1, "a100-40gb", GPUS["a100-40gb"])
    assert "\n" not in text
    assert re.search(r"nothing fits 1 x a100-40gb: the closest, tp=1 pp=1 .* takes .* would help", text)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["gpus=8"], "needs gpu="),
        (["gpus=no", "gpu=h100"], "gpus: must be a valid integer, got 'no'"),
        (["gpus=8", "gpu=abacus"], "gpu=abacus: .*choose one of a100-40gb"),
        (["network=fast", "gpu=h100"], "network: must be a valid number"),
    ],
)
def test_show_refuses_wrong_gpu_options(options, words, capsys):
    assert cli.main(["show", "pythia-160m", *options])
    assert re.search(words, capsys.readouterr().err)


@pytest.mark.slow
def test_show_proposes_layouts_and_plans_the_best(capsys):
    options = ["dtype=bf16", "global_batch_size=64", "num_hidden_layers=4", "gpus=8", "gpu=a100-40gb"]
    assert not cli.main(["show", "pythia-2.8b", *options])
    out = capsys.readouterr().out
    rows = re.findall(r"^ +([\d.]+) s +[\d.]+ GB  (tp=\d.*?)(?:: .*)?$", out, re.MULTILINE)
    assert float(rows[0][0]) == min(float(seconds) for seconds, _ in rows)
    assert f"The plan of {rows[0][1]}\nPlan: 8 processes" in out
    assert "Estimate on a100-40gb: not measured" in out
    assert re.search(r"memory: .*: fits", out)

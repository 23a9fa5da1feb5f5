"""Rows: FLOPs by closed formulas and by torch's counter, speed and time left by a clock that we turn."""

import contextlib
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neox.config import ModelConfig, load_config
from neox.data.loader import Loader, batch_sizes
from neox.model import flops
from neox.train.metrics import Meter, make_row


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def row(config, **changes):
    given = {"step": 30, "loss": 2.5, "norm": 0.5, "lr": 1e-3, "seconds": 0.5, "elapsed": 0.75}
    given["loader"] = Loader(None, batch_sizes(config.train))
    return make_row(config, **(given | {"spent": 40.0, "memory": 1 << 30, "peak_flops": 1e12, "now": 1.7e9} | changes))


def test_a_row_by_hand():
    config = load_config(overrides=["steps=100", "global_batch_size=16", "seq_length=128", "hidden_size=64"])
    found = row(config)
    model = config.model
    n, c, layers, length = flops.parameters(model).non_embedding, 64, model.num_hidden_layers, 128
    full = 6 * (n + model.vocab_size * c) + 12 * layers * c * length
    causal = full - 12 * layers * c * (length - (length + 1) / 2)
    rate = 16 * 128 / 0.5
    assert found.pop("mfu") == pytest.approx(rate * full / 1e12, rel=1e-12)
    assert found.pop("mfu_causal") == pytest.approx(rate * causal / 1e12, rel=1e-12)
    assert found == {
        "step": 30,
        "loss": 2.5,
        "lr": 1e-3,
        "grad_norm": 0.5,
        "tokens": 30 * 16 * 128,
        "samples": 480,
        "tokens_per_second": rate,
        "memory": 1 << 30,
        "seconds": 0.5,
        "eta": 70 * 0.75,
        "spent": 40.0,
        "time": 1.7e9,
    }


def test_many_ranks_share_the_utilisation_and_not_the_tokens():
    config = load_config()
    one, eight = row(config), row(config, world_size=8)
    assert eight["mfu"] == pytest.approx(one["mfu"] / 8, rel=1e-12)
    assert eight["tokens_per_second"] == one["tokens_per_second"]


def test_recomputation_shows_as_hfu_and_leaves_mfu():
    modes = ("none", "selective", "full")
    configs = [load_config("pythia-70m", overrides=(f"activation_checkpointing={mode}",)) for mode in modes]
    plain, some, full = map(row, configs)
    assert "hfu" not in plain
    assert plain["mfu"] == some["mfu"] == full["mfu"] < some["hfu"] < full["hfu"]
    share = flops.recomputed_share(configs[1].model, configs[1].data.seq_length, "selective")
    assert some["hfu"] - some["mfu"] == pytest.approx(share * (full["hfu"] - full["mfu"]), rel=1e-9)


def test_recomputed_flops_are_those_of_the_megatron_paper_and_of_gpt_neox():
    """Narayanan et al. 2021, equation 3: 96 B s L h^2 (1 + s / 6h + V / 16Lh); 20B: 0.535 EFLOP, 1538 x 2048 a step."""
    model = load_config("neox-20b").model
    layers, width, length, vocab = 44, 6144, 2048, 50432
    megatron = 96 * layers * width**2 * (1 + length / (6 * width) + vocab / (16 * layers * width))
    vectors = 8 * (13 * layers * width + 2 * width)  # of biases and norms, which the paper leaves out
    assert flops.train_flops_per_token(model, length, recomputed=1.0) == pytest.approx(megatron + vectors, rel=1e-12)
    assert megatron * 1538 * 2048 == pytest.approx(0.5353e18, rel=2e-3)


@pytest.mark.parametrize("kind", ["none", "selective", "full"])
def test_recomputed_flops_are_those_of_our_own_model(kind):
    """Counted by torch, which does not see fused attention; full recomputation stops before a block's last product."""
    from torch.utils.flop_counter import FlopCounterMode

    from neox.model.decoder import GPTNeoX
    from neox.parallel import checkpoint_blocks

    config = ModelConfig(vocab_size=96, hidden_size=64, num_hidden_layers=3)
    tokens, found = 24, {}
    for mode in ("none", kind):
        model = GPTNeoX(config).initialize(1)
        checkpoint_blocks(model, mode)
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, tokens, dtype=torch.long)).sum().backward()
        found[mode] = counter.get_total_flops()
    share = flops.recomputed_share(config, tokens, kind)
    once, more = (flops.train_flops_per_token(config, tokens, recomputed=s) for s in (0.0, share))
    unseen = 0.0
    if kind == "full":
        vectors = flops.parameters(config).non_embedding - 3 * 12 * 64**2
        unseen = 2 * vectors + 3 * (2 * 64 * 256 + 4 * 64 * tokens)
    assert (more - once - unseen) * tokens == pytest.approx(found[kind] - found["none"], abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True])
def test_training_flops_are_those_torch_counts(checkpointed):
    from torch.utils.checkpoint import set_checkpoint_early_stop
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    model = ModelConfig(vocab_size=96, hidden_size=64, num_hidden_layers=3, intermediate_size=256)
    theirs = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=96,
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=256,
            attn_implementation="eager",
        )
    ).train()
    if checkpointed:
        theirs.gradient_checkpointing_enable({"use_reentrant": False})
    tokens = 24
    with FlopCounterMode(display=False) as counter, contextlib.ExitStack() as stack:
        if checkpointed:
            # Else torch stops the second pass before the last product of each block, which the formula counts.
            stack.enter_context(set_checkpoint_early_stop(False))
        theirs(torch.zeros(1, tokens, dtype=torch.long), use_cache=False).logits.sum().backward()
    # The counter sees matrix products only; the convention charges 2 FLOPs a pass for biases and norms as well.
    vectors = sum(weight.numel() for weight in theirs.parameters() if weight.ndim == 1)
    ours = flops.train_flops_per_token(model, tokens, recomputed=float(checkpointed)) * tokens
    assert ours - 2 * vectors * tokens * (4 if checkpointed else 3) == pytest.approx(
        counter.get_total_flops(), abs=1e-3
    )


def test_the_meter_averages_between_rows_and_leaves_pauses_out():
    clock = Clock()
    meter = Meter(torch.device("cpu"), clock)
    for seconds in (1.0, 2.0, 6.0):
        clock.now += seconds
        meter.step()
    with meter.paused():
        clock.now += 50.0
    assert meter.take() == (3.0, 59.0 / 3)
    clock.now += 4.0
    meter.step()
    assert meter.take() == (4.0, 63.0 / 4)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.booleans()), min_size=1, max_size=30))
def test_all_time_is_training_or_pause(spans):
    clock = Clock()
    meter = Meter(torch.device("cpu"), clock)
    training, rows, since = 0.0, 0.0, 0
    for work, pause, logged in [*spans, (1, 0, True)]:
        clock.now += work
        training += work
        meter.step()
        since += 1
        if logged:
            rows += meter.take()[0] * since
            since = 0
        with meter.paused():
            clock.now += pause
    assert math.isclose(rows, training)

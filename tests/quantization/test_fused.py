"""The fused decoder against the model that torch computes, and its batch invariance."""

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neox.generate import Engine, Sampling
from neox.model.cache import BLOCK, KVCache, KVPool, Span
from neox.model.decoder import ACTIVATIONS, GPTNeoX
from neox.quantization import fused
from neox.quantization.kernels import native
from neox.quantization.packed import quantize
from tests import tiny

pytestmark = pytest.mark.skipif(native.target() is None, reason="a processor that the kernels are not for")
HERE = [flags for wanted, flags in native.TARGETS.items() if set(wanted) <= set(native.machine.instruction_sets())]
SHAPES = {
    "neox": {},
    "tanh": {"hidden_act": "gelu_fast"},
    "serial": {"use_parallel_residual": False},
    "odd": {"hidden_size": 36, "num_attention_heads": 3, "intermediate_size": 50, "rotary_pct": 0.5},
    "one head": {"num_attention_heads": 1},
    "wide heads": {"hidden_size": 320, "num_attention_heads": 1, "num_hidden_layers": 1},
    "gpt-j": tiny.GPT_J,
    "gpt-neo": tiny.GPT_NEO,
    **{f"heads of {width}": {"hidden_size": 2 * width} for width in (64, 80, 96, 128, 256)},
}


def pool_of(model: GPTNeoX, blocks: int = 16) -> KVPool:
    pool = KVPool(model.config, blocks)
    # What was there before must not matter.
    pool.keys.fill_(torch.nan), pool.values.fill_(torch.nan)
    return pool


def sequence(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(tiny.VOCAB), k=length)


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
@torch.inference_mode()
def test_hidden_states_are_the_models_on_every_instruction_set(changes):
    model = tiny.ours(**changes)
    tokens = [sequence(37, 1), sequence(5, 2)]
    expected = torch.cat([model(torch.tensor([row]), head=False)[0] for row in tokens])
    packed = quantize(model, "fp32")
    for flags in HERE:
        decoder = fused.Decoder(native.load(flags), packed)
        hidden = decoder(tokens[0] + tokens[1], [Span([9, 2, 4], 0, 37), Span([7], 0, 5)], pool_of(model))
        assert tiny.relative(hidden, expected) < 5e-6, flags


@pytest.mark.parametrize("kind", ["bf16", "fp16", "w16a16", "int8", "int4"])
@torch.inference_mode()
def test_every_kind_is_read_as_the_layers_read_it(kind):
    model = quantize(tiny.ours(hidden_size=128), kind)
    tokens, spans, decoder = sequence(30, 3), [Span([1, 3], 0, 30)], fused.decoder(model)
    pool = KVPool(model.config, 4)
    pool.keys.zero_(), pool.values.zero_()
    cache = KVCache(pool, spans)
    wanted = model(torch.tensor([tokens]), positions=cache.positions, cache=cache, head=False)[0]
    found = decoder(tokens, spans, pool_of(model))
    # Where what enters a product is rounded, a value half-way between two steps may fall to either side.
    most, mean = {"w16a16": (1e-2, 1e-3), "int8": (3e-2, 3e-3), "int4": (3e-2, 3e-3)}.get(kind, (5e-6, 1e-6))
    assert tiny.relative(found, wanted) < most
    assert (found - wanted).abs().mean() < mean * wanted.abs().max()


MODELS = {
    (name, kind): quantize(tiny.ours(**SHAPES[name]), kind)
    for name, kind in itertools.product(("neox", "serial", "gpt-neo"), ("fp32", "w16a16", "int4"))
    if native.target() is not None
}


@settings(max_examples=25, deadline=None)
@given(st.data())
@torch.inference_mode()
def test_batch_invariance_whatever_chunks_batch_threads_and_memory(data):
    """Random sequences in random blocks, computed in random pieces side by side, against each alone at once."""
    model = MODELS[data.draw(st.sampled_from(sorted(MODELS)))]
    decoder, pool = fused.Decoder(native.load(data.draw(st.sampled_from(HERE))), model), pool_of(model)
    lengths = data.draw(st.lists(st.integers(1, tiny.CONTEXT), min_size=1, max_size=4))
    rows = [sequence(length, number) for number, length in enumerate(lengths)]
    alone = [decoder(row, [Span(list(range(4)), 0, len(row))], pool_of(model, 4)) for row in rows]
    blocks = data.draw(st.permutations(range(16)))
    tables = [blocks[number * 4 : number * 4 + 4] for number in range(len(rows))]
    done, found = [0] * len(rows), [[] for _ in rows]
    threads = torch.get_num_threads()
    while any(at < len(row) for at, row in zip(done, rows, strict=True)):
        pending = [number for number, row in enumerate(rows) if done[number] < len(row)]
        chosen = data.draw(st.lists(st.sampled_from(pending), min_size=1, unique=True))
        counts = [data.draw(st.integers(1, len(rows[number]) - done[number])) for number in chosen]
        spans = [Span(tables[number], done[number], count) for number, count in zip(chosen, counts, strict=True)]
        tokens = [token for number, span in zip(chosen, spans, strict=True) for token in new(rows[number], span)]
        torch.set_num_threads(data.draw(st.sampled_from([1, 2, 3])))
        parts = decoder(tokens, spans, pool).split(counts)
        torch.set_num_threads(threads)
        for number, part in zip(chosen, parts, strict=True):
            found[number].append(part)
            done[number] += len(part)
    for own, parts in zip(alone, found, strict=True):
        assert torch.equal(own, torch.cat(parts))


def new(row: list[int], span: Span) -> list[int]:
    return row[span.start : span.start + span.count]


@torch.inference_mode()
def test_keys_and_values_are_those_that_torch_would_keep():
    model = quantize(tiny.ours(), "fp32")
    tokens, spans = sequence(BLOCK + 3, 5), [Span([2, 0], 0, BLOCK + 3)]
    pools: list[KVPool] = []
    for _ in range(2):
        pools.append(KVPool(model.config, 3))
        pools[-1].keys.zero_(), pools[-1].values.zero_()
    cache = KVCache(pools[0], spans)
    model(torch.tensor([tokens]), positions=cache.positions, cache=cache, head=False)
    fused.decoder(model)(tokens, spans, pools[1])
    for theirs, ours in ((pools[0].keys, pools[1].keys), (pools[0].values, pools[1].values)):
        assert tiny.relative(ours, theirs) < 5e-6


def test_a_model_that_is_not_packed_whole_is_left_to_torch():
    assert fused.decoder(tiny.ours()) is None
    half = quantize(tiny.ours(), "fp32")
    half.layers[1].mlp.dense_4h_to_h = tiny.ours().layers[1].mlp.dense_4h_to_h
    assert fused.decoder(half) is None
    assert fused.decoder(quantize(tiny.ours(), "int4")) is not None


@torch.inference_mode()
def test_an_activation_without_a_kernel_is_left_to_torch(monkeypatch):
    monkeypatch.setitem(ACTIVATIONS, "planted", torch.nn.functional.silu)
    shape = tiny.ours().config.model_copy(update={"hidden_act": "planted"})
    model = GPTNeoX(shape).initialize(1).eval()
    expected = model(torch.tensor([[1, 2, 3]]))[0, -1].argmax()
    packed = quantize(model, "fp32")
    assert fused.decoder(packed) is None
    sampling = Sampling(max_tokens=1, temperature=0, stop_at_eod=False)
    assert Engine(packed).generate([1, 2, 3], sampling)[0].tokens == [expected]


def test_a_model_that_is_not_packed_compiles_no_kernels(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: pytest.fail("nothing needs them"))
    assert fused.decoder(tiny.ours()) is None

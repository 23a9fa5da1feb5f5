"""Engines from a folder: kinds of weights, drafters of speculative decoding, and the rate."""

import re

import pytest
import torch

import neox
from neox.generate import Sampling, naive_generate
from neox.generate.benchmark import measure, report
from neox.generate.loading import load_engine
from neox.generate.rate import Rate, bytes_read
from neox.quantization import kernels
from neox.quantization.packed import PackedLinear
from tests import tiny

GREEDY = Sampling(max_tokens=12, temperature=0, stop_at_eod=False)


@pytest.fixture
def folder(tmp_path):
    def saved(dtype: torch.dtype = torch.float32, name: str = "model", **flags):
        neox.save(tiny.ours(**flags).to(dtype), tmp_path / name)
        return tmp_path / name

    return saved


def kinds(engine) -> set[str]:
    return {module.kind for module in engine.model.modules() if isinstance(module, PackedLinear)}


@pytest.mark.skipif(not kernels.compiled(), reason="no compiler here: auto leaves the weights to torch")
@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.float32, "fp32"), (torch.float16, "fp16"), (torch.bfloat16, "bf16")]
)
def test_auto_keeps_what_is_stored_and_loses_nothing(folder, dtype, kind):
    source = folder(dtype)
    engine = load_engine(source, "cpu")
    assert kinds(engine) == {kind}
    plain = load_engine(source, "cpu", weights="torch")
    assert not kinds(plain)
    ids = tiny.tokens()
    with torch.no_grad():
        assert tiny.relative(engine.model(ids), plain.model(ids)) < 1e-5
    assert engine.generate([[1, 2, 3]], GREEDY)[0].tokens == naive_generate(plain.model, [1, 2, 3], GREEDY)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_fewer_bits_are_asked_for(folder, weights):
    engine = load_engine(folder(), "cpu", weights=weights)
    assert weights in kinds(engine)
    assert engine.generate([[1, 2, 3]], GREEDY)[0].tokens == naive_generate(engine.model, [1, 2, 3], GREEDY)


def test_speculative_decoding_gives_the_same_with_every_drafter(folder):
    source, small = folder(), folder(name="small", num_hidden_layers=1)
    expected = load_engine(source, "cpu").generate([[1, 2, 3, 1, 2]], GREEDY)
    for options in ({"speculate": "prompt"}, {"draft": str(small)}, {"draft": str(source)}):
        engine = load_engine(source, "cpu", **options)
        assert engine.generate([[1, 2, 3, 1, 2]], GREEDY) == expected
    assert engine.stats.accepted == engine.stats.drafted > 0, "its own drafts are all right"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": "int3"}, "weights=int3: must be one of auto, torch, fp32"),
        ({"speculate": "always"}, "speculate=always: must be none or prompt"),
        ({"speculate": "prompt", "draft": "other"}, "give speculate= or draft=, not both"),
        ({"weights": "int8", "dtype": "bf16"}, "weights=int8: says how weights are held: leave dtype=bf16 out"),
        ({"weights": "float8"}, "weights=float8: is for CUDA, not for cpu"),
    ],
)
def test_wrong_words(folder, options, words):
    with pytest.raises(ValueError, match=words):
        load_engine(folder(), "cpu", **options)


def test_the_rate_and_what_it_is_held_against(folder, monkeypatch):
    engine = load_engine(folder(), "cpu", weights="torch")
    embedding = engine.model.embed_in.weight.nbytes
    assert bytes_read(engine.model) == sum(p.nbytes for p in engine.model.parameters()) - embedding
    rate = Rate(engine)
    for event in engine.events([[1, 2, 3]], GREEDY):
        rate.count(event)
    assert re.fullmatch(r"12 tokens, the first after \d+\.\d\d s, [\d.]+ tokens/s", rate.line()), rate.line()
    rate.began, rate.first, rate.last = 0.0, 0.5, 1.6
    monkeypatch.setattr("neox.generate.rate.LEAST", 0)
    monkeypatch.setattr("neox.generate.rate.bytes_read", lambda model: 10**9)
    monkeypatch.setattr("neox.generate.rate.read_speed", lambda seconds: 25e9)
    assert rate.line() == (
        "12 tokens, the first after 0.50 s, 10.0 tokens/s, 10.0 of 25.0 GB/s that this machine reads, 40%"
    )


def test_the_table_of_kinds(folder, monkeypatch):
    monkeypatch.setattr("neox.generate.benchmark.read_speed", lambda seconds: 20e9)
    source = folder(torch.float16)
    rows = measure(source, ["torch", "int4"], prompt=8, tokens=8)
    assert [row.weights for row in rows] == ["torch", "int4"]
    assert rows[1].bytes_read < rows[0].bytes_read  # groups of 128 are filled up: a third at real widths
    for row in rows:
        assert row.share == pytest.approx(row.bytes_read * row.decode / 20e9)
    text = report(source, ["fp16"])
    assert re.search(r"^fp16 .*%$", text, re.MULTILINE)
    assert re.search(r"^weights=auto takes (fp16|torch): loses nothing of float16 weights", text, re.MULTILINE)

"""Many prompts to a file: each record against its prompt alone, a file that was cut anywhere against a whole one."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neox.generate import Engine, Sampling
from neox.generate.batch import complete, partial_name, write_completions
from neox.quantization import torchao_weights
from tests.generate.conftest import random_engine, random_model, small_tokenizer


@pytest.fixture(scope="module")
def engine(packed_engine) -> Engine:
    """Its records do not depend on what a continued file has left to generate."""
    return packed_engine


PROMPTS = [("the quick", ""), ("", ""), ("naïve 🙂", ""), ("東京 brown fox the lazy", "")]
SAMPLING = Sampling(max_tokens=12, temperature=0.9, seed=70, stop=("e",), logprobs=1)


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("slots", [1, 3, 20])
def test_records_are_in_order_and_each_is_that_of_its_prompt_alone(engine, slots):
    batched = Engine(engine.model, engine.tokenizer, slots=slots)
    records = list(complete(batched, PROMPTS, SAMPLING, n=3, progress=False))
    assert [(r["index"], r["sample"], r["seed"]) for r in records] == [
        (k // 3, k % 3, 70 + k) for k in range(3 * len(PROMPTS))
    ]
    reasons = set()
    for record in records:
        prompt = PROMPTS[record["index"]][0]
        alone = engine.generate(prompt, SAMPLING.replace(seed=record["seed"]))[0]
        assert record["prompt"] == prompt
        assert (record["text"], record["tokens"]) == (alone.text, len(alone.tokens))
        assert record["finish_reason"] == alone.finish_reason
        assert [one["id"] for one in record["logprobs"]] == alone.tokens
        for one, expected in zip(record["logprobs"], alone.logprobs, strict=True):
            assert one["logprob"] == pytest.approx(expected.logprob, abs=1e-4)
            assert one["token"] == engine.tokenizer.decode([expected.token])
            assert [other["id"] for other in one["top"]] == [token for token, _ in expected.top]
        reasons.add(record["finish_reason"])
    assert {"stop", "length"} <= reasons


def test_nothing_is_said_of_logprobs_that_nobody_asked_for(engine):
    (record,) = complete(engine, [("the", "")], Sampling(max_tokens=2), progress=False)
    assert list(record) == ["index", "sample", "prompt", "text", "tokens", "finish_reason", "seed"]


@pytest.fixture(scope="module")
def whole(engine, tmp_path_factory) -> bytes:
    out = tmp_path_factory.mktemp("whole") / "new" / "out.jsonl"
    assert write_completions(engine, PROMPTS, SAMPLING, out, n=2, progress=False) == 8
    assert [path.name for path in out.parent.iterdir()] == ["out.jsonl"]
    expected = list(complete(engine, PROMPTS, SAMPLING, n=2, progress=False))
    assert lines(out) == expected
    return out.read_bytes()


def interrupt(engine, out, monkeypatch, after: int) -> bytes:
    """The partial file after an interrupted forward pass."""
    calls = 0

    def forward(*arguments):
        nonlocal calls
        calls += 1
        if calls > after:
            raise KeyboardInterrupt
        return Engine._forward(engine, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_forward", forward, raising=False)
        with pytest.raises(KeyboardInterrupt):
            write_completions(engine, PROMPTS, SAMPLING, out, n=2, progress=False)
    assert not out.exists()
    return partial_name(out).read_bytes()


def test_an_interrupted_file_is_partial_and_the_same_call_makes_it_whole(engine, whole, tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    kept = interrupt(engine, out, monkeypatch, after=14)
    assert 1 < kept.count(b"\n") < 9
    again = interrupt(engine, out, monkeypatch, after=6)
    assert again.startswith(kept)
    write_completions(engine, PROMPTS, SAMPLING, out, n=2, progress=False)
    assert out.read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


@pytest.fixture(scope="module")
def partial(engine, whole, tmp_path_factory) -> bytes:
    """The partial file at its longest: the header and every record."""
    out = tmp_path_factory.mktemp("partial") / "out.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        header = interrupt(engine, out, patch, after=0)
    assert header.count(b"\n") == 1
    return header + whole


@settings(max_examples=10, deadline=None)
@given(share=st.floats(0, 1), tail=st.sampled_from([b"", b"\0\0\0\0", b'{"index": 3, "te', b"\xff\n{}\n"]))
def test_a_file_cut_anywhere_continues_after_its_last_whole_record(
    engine, whole, partial, tmp_path_factory, share, tail
):
    """A kill or a power cut leaves a torn line, zeros, or garbage at the end."""
    out = tmp_path_factory.mktemp("cut") / "out.jsonl"
    header = partial.index(b"\n") + 1
    partial_name(out).write_bytes(partial[: header + int(share * (len(partial) - header))] + tail)
    write_completions(engine, PROMPTS, SAMPLING, out, n=2, progress=False)
    assert out.read_bytes() == whole


@pytest.mark.parametrize("size", [0, 1, 30])
def test_a_file_whose_header_was_cut_begins_again(engine, whole, partial, tmp_path, size):
    out = tmp_path / "out.jsonl"
    partial_name(out).write_bytes(partial[:size])
    write_completions(engine, PROMPTS, SAMPLING, out, n=2, progress=False)
    assert out.read_bytes() == whole


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"prompts": PROMPTS[:2]}, "prompts"),
        ({"n": 3}, "n"),
        ({"sampling": SAMPLING.replace(temperature=0.8, stop="x")}, "temperature, stop"),
        ({"sampling": SAMPLING.replace(logit_bias={3: 1}, stop_tokens=(5,))}, "logit_bias, stop_tokens"),
        ({"sampling": SAMPLING.replace(regex="[a-z]*")}, "regex"),
        ({"engine": "another"}, "model"),
    ],
)
def test_what_was_begun_otherwise_is_not_continued(engine, partial, tmp_path, changed, named):
    out = tmp_path / "out.jsonl"
    partial_name(out).write_bytes(partial)
    call = {"engine": engine, "prompts": PROMPTS, "sampling": SAMPLING, "n": 2, **changed}
    if call["engine"] == "another":
        call["engine"] = random_engine()
        with torch.no_grad():
            call["engine"].model.final_layer_norm.bias[0] += 1
    with pytest.raises(ValueError, match=f"out.jsonl.partial: was begun with another {named}; continue with the same"):
        write_completions(**call, out=out, progress=False)
    assert partial_name(out).read_bytes() == partial


def test_what_is_there_already_is_never_touched(engine, tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text("mine")
    with pytest.raises(ValueError, match="out.jsonl: exists already; move it away or give another out="):
        write_completions(engine, PROMPTS, SAMPLING, out, progress=False)
    assert out.read_text() == "mine"
    out.unlink()
    for other in ("mine", "mine\n", '{"prompt": "mine"}\n'):
        partial_name(out).write_text(other)
        with pytest.raises(ValueError, match="out.jsonl.partial: is no partial output of neox generate"):
            write_completions(engine, PROMPTS, SAMPLING, out, progress=False)
        assert partial_name(out).read_text() == other


def test_a_second_writer_is_refused(engine, tmp_path):
    import fcntl

    out = tmp_path / "out.jsonl"
    with open(partial_name(out), "wb") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is writing it"):
            write_completions(engine, PROMPTS, SAMPLING, out, progress=False)


def test_a_prompt_without_room_is_named_before_anything_is_written(engine, tmp_path):
    out = tmp_path / "out.jsonl"
    long = [("fine", "p.txt:1"), ("the " * 80, "p.txt:3")]
    with pytest.raises(ValueError, match=r"^p.txt:3: the prompt has \d+ tokens, the context 64: shorten the prompt$"):
        write_completions(engine, long, SAMPLING, out, progress=False)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="^p.txt:7: .*lone surrogate"):
        complete(engine, [("\ud800", "p.txt:7")], SAMPLING)


def test_disk_full_is_one_line_and_loses_nothing(engine, whole, tmp_path):
    """A limit on the size of files stands in for the disk: write() fails in the middle of a record all the same."""
    import resource

    out = tmp_path / "out.jsonl"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) // 2, before[1]))
    try:
        with pytest.raises(OSError, match="File too large: what was written is kept, the same command") as error:
            write_completions(engine, PROMPTS, SAMPLING, out, n=2, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.value.filename == f"{out}.partial"
    assert len(partial_name(out).read_bytes()) == len(whole) // 2
    write_completions(engine, PROMPTS, SAMPLING, out, n=2, progress=False)
    assert out.read_bytes() == whole


def test_torchao_weights_give_a_file_that_continues(tmp_path, monkeypatch):
    """As on a GPU with weights=int8: torchao's tensors have no `flatten`, but a fingerprint."""
    pytest.importorskip("torchao")
    pack = torchao_weights.packing("int8", torch.device("cpu"))

    def packed(scale: float) -> Engine:
        model = random_model(vocab_size=2 * small_tokenizer().vocab_size, hidden_size=64).bfloat16()
        model.layers[0].mlp.dense_h_to_4h.weight.mul_(scale)
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                setattr(parent, name, pack(name, child))
        return Engine(model, small_tokenizer())

    engine, out = packed(1.0), tmp_path / "out.jsonl"
    interrupt(engine, out, monkeypatch, after=2)
    with pytest.raises(ValueError, match="another model"):
        write_completions(packed(1.1), PROMPTS, SAMPLING, out, n=2, progress=False)
    assert write_completions(engine, PROMPTS, SAMPLING, out, n=2, progress=False) == 8
    assert len(lines(out)) == 8

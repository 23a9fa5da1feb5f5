"""`echo` puts the prompt's text and log-probabilities first, those of transformers."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import neox
from neox import cli
from neox.generate import Engine, Sampling
from tests.tiny import read_by_transformers


@pytest.fixture(scope="module")
def folder(engine, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "hf"
    neox.save(engine.model, folder, engine.tokenizer)
    return folder


@pytest.fixture(scope="module")
def peer(folder):
    return read_by_transformers(folder).double()


@settings(max_examples=25, deadline=None)
@given(
    prompt=st.sampled_from(["", "the", "naïve 🙂 café", "東京 brown fox<|endoftext|>the lazy"]),
    sampling=st.builds(
        Sampling,
        max_tokens=st.integers(1, 12),
        temperature=st.sampled_from([0.0, 0.9]),
        seed=st.integers(0, 99),
        stop=st.sampled_from([(), ("e",), ("the", " q")]),  # also such as the prompt itself holds
        stop_at_eod=st.booleans(),
        logit_bias=st.sampled_from([{}, {0: 100}]),  # ends at once
        logprobs=st.sampled_from([None, 0, 3]),
        prompt_logprobs=st.sampled_from([None, 1]),
    ),
)
def test_the_prompt_stands_before_text_and_logprobs(engine, peer, prompt, sampling):
    plain = engine.generate(prompt, sampling)[0]
    asked = sampling.replace(echo=True)
    done = engine.generate(prompt, asked)[0]
    assert "".join(engine.stream(prompt, asked)) == done.text == (prompt or "<|endoftext|>") + plain.text
    assert (done.tokens, done.finish_reason) == (plain.tokens, plain.finish_reason)
    assert (done.prompt_logprobs is None) == (sampling.prompt_logprobs is None)
    if sampling.logprobs is None:
        assert done.logprobs is None
        return
    ids = engine.encode(prompt) + done.tokens
    expected = peer(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    first, *others = done.logprobs
    assert (first.token, first.logprob, first.top) == (ids[0], None, [])
    assert [one.token for one in others] == ids[1:]
    picked = expected.gather(1, torch.tensor(ids)[1:, None])[:, 0].tolist()
    assert [one.logprob for one in others] == pytest.approx(picked, abs=1e-5)
    for one, row in zip(
        others[len(ids) - 1 - len(done.tokens) :], expected[len(ids) - 1 - len(done.tokens) :], strict=True
    ):
        assert [token for token, _ in one.top] == row[: engine.num_real_tokens].topk(sampling.logprobs).indices.tolist()


def test_a_client_that_scores_by_echo_reads_the_engines_own_score(engine):
    """lm-evaluation-harness sums over HTTP the tokens after the context, without the sampled one."""
    context, continuation = engine.encode("the quick brown"), engine.encode(" fox the")
    asked = Sampling(max_tokens=1, temperature=0, logprobs=1, echo=True, stop_at_eod=False)
    done = engine.generate([context + continuation], asked)[0]
    scored = done.logprobs[len(context) : -1]
    (score,) = engine.score([(context, continuation)])
    assert sum(one.logprob for one in scored) == pytest.approx(score.logprob, abs=1e-5)
    greedy = all(one.logprob == max(logprob for _, logprob in one.top) for one in scored)
    assert greedy == score.is_greedy


def test_without_a_tokenizer_there_are_log_probabilities_only(model):
    done = Engine(model).generate([3, 4, 5], Sampling(max_tokens=2, logprobs=0, echo=True))[0]
    assert [one.token for one in done.logprobs] == [3, 4, 5, *done.tokens]
    assert done.text == ""


def test_the_verb_prints_the_prompt_once(engine, folder, capsys, tmp_path):
    asked = ["generate", str(folder), "prompt=the quick", "max_tokens=5", "stop_at_eod=false"]
    assert cli.main(asked) == 0
    plain = capsys.readouterr().out
    assert plain.startswith("the quick")
    assert cli.main([*asked, "echo=true"]) == 0
    assert capsys.readouterr().out == plain
    assert cli.main([*asked, "echo=true", "n=2"]) == 0
    assert capsys.readouterr().out.count("the quick") == 2
    out = tmp_path / "out.jsonl"
    assert cli.main([*asked, "echo=true", "logprobs=1", f"out={out}"]) == 0
    record = json.loads(out.read_text())
    assert (record["text"] + "\n", record["tokens"]) == (plain, 5)
    ids = [one["id"] for one in record["logprobs"]]
    assert engine.tokenizer.decode(ids) == record["text"]
    assert [one["logprob"] is None for one in record["logprobs"]] == [True] + [False] * (len(ids) - 1)

"""Sampling options through the engine: against the naive loop, transformers' generate, and what they leave out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import neox
from neox.generate import Engine, Sampling, naive_generate
from tests.generate.conftest import random_model


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    bias=st.dictionaries(st.integers(0, 96), st.floats(-5, 5), max_size=4),
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
    stop_tokens=st.lists(st.integers(0, 96), max_size=5),
    eod=st.none() | st.integers(0, 96),
    stop_at_eod=st.booleans(),
)
def test_the_engine_follows_every_option_as_the_naive_loop_does(
    model, seed, bias, presence, frequency, stop_tokens, eod, stop_at_eod
):
    sampling = Sampling(
        max_tokens=20,
        seed=seed,
        logit_bias=bias,
        presence_penalty=presence,
        frequency_penalty=frequency,
        stop_tokens=stop_tokens,
        stop_at_eod=stop_at_eod,
    )
    engine = Engine(model)
    engine.eod = eod
    done = engine.generate([5, 9], sampling)[0]
    assert done.tokens == naive_generate(model, [5, 9], sampling, eod=eod)


@settings(max_examples=20, deadline=None)
@given(cut=st.integers(0, 19), others=st.lists(st.integers(0, 96), max_size=3), as_eod=st.booleans())
def test_a_stop_token_cuts_what_comes_without_it(model, cut, others, as_eod):
    """At its first place, and is left out with all that follows; the end-of-document token is named as itself."""
    engine = Engine(model)
    plain = Sampling(max_tokens=20, temperature=0.8, seed=cut, stop_at_eod=False)
    whole = engine.generate([3], plain)[0].tokens
    stops = [whole[cut], *others]
    engine.eod = whole[cut] if as_eod else None
    sampling = Sampling(max_tokens=20, temperature=0.8, seed=cut, stop_tokens=stops)
    done = engine.generate([3], sampling)[0]
    first = min(whole.index(token) for token in stops if token in whole)
    assert done.tokens == whole[:first]
    assert done.finish_reason == ("eod" if whole[first] == engine.eod else "stop")


def test_stop_tokens_are_those_of_transformers(tmp_path):
    """transformers ends at any of several end-of-sequence ids, which it keeps."""
    from transformers import AutoModelForCausalLM

    model = random_model()
    neox.save(model, tmp_path / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    greedy = {"max_tokens": 24, "temperature": 0, "repetition_penalty": 8.0}
    whole = Engine(model).generate([7, 8], Sampling(**greedy))[0].tokens
    stops = list(dict.fromkeys(whole))[4:7]
    out = theirs.generate(
        torch.tensor([[7, 8]]), max_new_tokens=24, do_sample=False, repetition_penalty=8.0,
        eos_token_id=stops, pad_token_id=0,
    )  # fmt: skip
    done = Engine(model).generate([7, 8], Sampling(**greedy, stop_tokens=stops))[0]
    kept = out[0, 2:].tolist()
    assert len(kept) > 4
    assert kept[-1] in stops
    assert (done.tokens, done.finish_reason) == (kept[:-1], "stop")


def test_a_stop_token_ends_the_text_before_it(engine):
    plain = Sampling(max_tokens=20, seed=4)
    tokens = engine.generate("the quick", plain)[0].tokens
    sampling = Sampling(max_tokens=20, seed=4, stop_tokens=[tokens[6]])
    done = engine.generate("the quick", sampling)[0]
    assert done.text == engine.tokenizer.decode(tokens[: tokens.index(tokens[6])])
    assert "".join(engine.stream("the quick", sampling)) == done.text


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.floats(1, 20), top=st.integers(1, 900), greedy=st.booleans())
def test_padding_rows_are_neither_sampled_nor_among_the_alternatives(engine, seed, scale, top, greedy):
    """However likely the model finds them: half of the rows are padding, and the largest logit is theirs."""
    num_real_tokens = engine.tokenizer.vocab_size
    weight = engine.model.embed_out.weight
    saved = weight[num_real_tokens:].clone()
    generator = torch.Generator().manual_seed(seed)
    weight[num_real_tokens:] = scale * 10 * torch.randn(saved.shape, generator=generator)
    try:
        tokens = torch.tensor([engine.tokenizer.encode("the")])
        assert engine.model(tokens)[0, -1].argmax() >= num_real_tokens
        sampling = Sampling(
            max_tokens=6, seed=seed, temperature=0.0 if greedy else 1.5, logprobs=top, stop_at_eod=False
        )
        completions = engine.generate(["the", "a", ""], sampling)
    finally:
        weight[num_real_tokens:] = saved
    assert [len(done.tokens) for done in completions] == [6, 6, 6]
    assert max(token for done in completions for token in done.tokens) < num_real_tokens
    for record in (one for done in completions for one in done.logprobs):
        assert len(record.top) == min(top, num_real_tokens)
        assert max(token for token, _ in record.top) < num_real_tokens


def test_what_the_engine_cannot_follow_is_refused_before_anything_is_computed(engine, model):
    with pytest.raises(ValueError, match="generate.stop_tokens: 9999 is no token: they are 0 to 318"):
        engine.events(["the"], Sampling(stop_tokens=[9999]))
    with pytest.raises(ValueError, match="generate.logit_bias: ' the' needs a tokenizer"):
        Engine(model).events([[1]], Sampling(logit_bias={" the": 1}))

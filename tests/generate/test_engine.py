"""The cached engine against the naive loop and against transformers' generate."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import neox
from neox.generate import Engine, Sampling, naive_generate
from tests.generate.conftest import needs_kernels, random_model

prompts = st.lists(st.lists(st.integers(0, 96), min_size=1, max_size=63), min_size=1, max_size=6)


@settings(max_examples=25, deadline=None)
@given(
    prompts=prompts,
    slots=st.integers(1, 4),
    max_tokens=st.integers(1, 30),
    temperature=st.sampled_from([0.0, 0.8]),
    eod=st.integers(0, 96),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
)
def test_engine_equals_the_naive_loop(model, prompts, slots, max_tokens, temperature, eod, repetition_penalty):
    """Whatever the prompts' lengths, the number of slots and where a row ends: token for token the oracle's."""
    engine = Engine(model, slots=slots)
    engine.eod = eod
    sampling = Sampling(
        max_tokens=max_tokens, temperature=temperature, top_k=30, top_p=0.95, repetition_penalty=repetition_penalty
    )
    for i, (prompt, done) in enumerate(zip(prompts, engine.generate(prompts, sampling), strict=True)):
        alone = sampling.replace(seed=sampling.seed + i)
        assert done.tokens == naive_generate(model, prompt, alone, eod=eod)
        ended_early = len(prompt) + len(done.tokens) < min(64, len(prompt) + max_tokens)
        assert done.finish_reason == ("eod" if ended_early else "length")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_parallel_residual": False, "tie_word_embeddings": True},
        {"hidden_act": "gelu_fast", "rotary_pct": 1.0},
        {"rotary_pct": 0.25},
    ],
)
def test_greedy_equals_transformers(tmp_path, options):
    from transformers import AutoModelForCausalLM

    model = random_model(**options)
    neox.save(model, tmp_path / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    prompts = [torch.randint(97, (n,)).tolist() for n in (1, 5, 17)]
    ours = Engine(model, slots=2).generate(prompts, Sampling(max_tokens=24, temperature=0, stop_at_eod=False))
    for prompt, done in zip(prompts, ours, strict=True):
        out = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert done.tokens == out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("slots", [1, 3])
def test_local_windows_and_learned_positions_decode_as_they_prefill(slots):
    model = random_model(
        model_type="gpt_neo",
        position_embedding="learned",
        use_parallel_residual=False,
        qkv_bias=False,
        attention_scale=1.0,
        local_window=4,
        local_layers=(1,),
    )
    prompts = [torch.randint(97, (n,)).tolist() for n in (2, 9, 20)]
    sampling = Sampling(max_tokens=20, temperature=0)
    for prompt, done in zip(prompts, Engine(model, slots=slots).generate(prompts, sampling), strict=True):
        assert done.tokens == naive_generate(model, prompt, sampling)


def test_what_cannot_be_continued_is_one_clear_line(model):
    engine = Engine(model)
    with pytest.raises(ValueError, match="64 tokens, the context 64"):
        engine.generate(list(range(64)))
    with pytest.raises(ValueError, match="token 97, the model has 97 rows"):
        engine.generate([97])
    with pytest.raises(ValueError, match="needs a tokenizer"):
        engine.generate("text")
    with pytest.raises(ValueError, match="cache_bytes"):
        Engine(model, cache_bytes=10)


def test_what_never_fits_the_cache_is_refused_before_anything_is_computed(model):
    position = 2 * 2 * 32 * 4  # keys and values, layers, hidden, bytes
    engine = Engine(model, cache_bytes=32 * position)
    with pytest.raises(ValueError, match=r"take 33 positions of cache, there are 32: raise cache_bytes[^\n]*$"):
        engine.generate([[1] * 4, [1] * 20], Sampling(max_tokens=14))
    assert engine.stats.misses == 0
    assert not engine.busy
    assert len(engine.generate([1] * 20, Sampling(max_tokens=13, stop_at_eod=False))[0].tokens) == 13


@pytest.mark.parametrize("penalty", [1.5, 2.0, 3.0])
def test_greedy_with_a_repetition_penalty_equals_transformers(tmp_path, penalty):
    from transformers import AutoModelForCausalLM

    model = random_model()
    neox.save(model, tmp_path / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    prompts = [[7, 7, 7], torch.randperm(97)[:20].tolist(), torch.randperm(97)[:20].tolist()]
    asked = Sampling(max_tokens=40, temperature=0, repetition_penalty=penalty, stop_at_eod=False)
    plain = asked.replace(repetition_penalty=1.0)
    for prompt, done, without in zip(
        prompts, Engine(model).generate(prompts, asked), Engine(model).generate(prompts, plain), strict=True
    ):
        out = theirs.generate(
            torch.tensor([prompt]),
            max_new_tokens=40,
            do_sample=False,
            repetition_penalty=penalty,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert done.tokens == out[0, len(prompt) :].tolist()
        assert done.tokens != without.tokens


@needs_kernels
@settings(max_examples=15, deadline=None)
@given(
    texts=st.lists(st.text("naïve café 🙂東", max_size=12), min_size=1, max_size=5),
    slots=st.integers(1, 4),
    temperature=st.sampled_from([0.0, 1.2]),
)
def test_a_batch_gives_each_prompt_what_it_gets_alone(packed_engine, texts, slots, temperature):
    """Tokens, text, reasons and log-probabilities, bit for bit."""
    asked = [
        Sampling(max_tokens=3 + 5 * i, temperature=temperature, seed=i, logprobs=2, stop=["e", "🙂"][: i % 3])
        for i in range(len(texts))
    ]
    model, tokenizer = packed_engine.model, packed_engine.tokenizer
    many = Engine(model, tokenizer, slots=slots).generate(texts, asked)
    for text, own, together in zip(texts, asked, many, strict=True):
        assert together == Engine(model, tokenizer, slots=1).generate(text, [own])[0]


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 1000),
    temperature=st.sampled_from([0.0, 1.0, 2.5]),
    penalty=st.sampled_from([1.0, 1.5]),
    cuts=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 4)), max_size=3),
    other=st.lists(st.text(min_size=1, max_size=3), max_size=2),
)
def test_streamed_text_is_that_of_generate_cut_at_the_first_stop_string(
    engine, seed, temperature, penalty, cuts, other
):
    """Stop strings are taken out of what comes without them, so that they do occur, over token borders too."""
    plain = Sampling(max_tokens=30, seed=seed, temperature=temperature, repetition_penalty=penalty)
    whole = engine.generate("naïve 🙂 ", plain)[0]
    stop = [whole.text[start : start + size] for start, size in cuts if whole.text[start : start + size]] + other
    asked = plain.replace(stop=stop)
    pieces = list(engine.stream("naïve 🙂 ", asked))
    done = engine.generate("naïve 🙂 ", asked)[0]
    assert all(pieces)
    assert "".join(pieces) == done.text
    assert whole.text.startswith(done.text)
    assert done.tokens == whole.tokens[: len(done.tokens)]
    found = [whole.text.find(one) for one in stop if one in whole.text]
    assert (done.finish_reason == "stop") == bool(found)
    if found:
        assert not any(one in done.text for one in stop)
        # What was drawn reaches just past the stop string: one token less would not hold it.
        assert any(one in engine.tokenizer.decode(done.tokens) for one in stop)
        if done.tokens != whole.tokens:
            assert not any(one in engine.tokenizer.decode(done.tokens[:-1]).rstrip("\ufffd") for one in stop)
    else:
        assert done == whole


@pytest.mark.parametrize("top", [0, 3, 10_000])
def test_logprobs_are_over_the_whole_padded_vocabulary_before_all_filters(engine, top):
    asked = Sampling(
        max_tokens=10, temperature=0.3, top_k=5, top_p=0.5, min_p=0.2, repetition_penalty=1.4, logprobs=top
    )
    prompt, num_real_tokens = [5, 9, 260], engine.tokenizer.vocab_size
    done = engine.generate(prompt, asked)[0]
    assert len(done.tokens) == len(done.logprobs)
    scores = engine.model(torch.tensor([prompt + done.tokens]))[0].double().log_softmax(-1)
    assert scores.shape[-1] == 2 * num_real_tokens
    for place, (token, record) in enumerate(zip(done.tokens, done.logprobs, strict=True), start=len(prompt) - 1):
        assert record.token == token
        assert record.logprob == pytest.approx(scores[place, token].item(), abs=2e-5)
        expected = scores[place, :num_real_tokens].sort(descending=True)
        assert [token for token, _ in record.top] == expected.indices[:top].tolist()
        assert [logprob for _, logprob in record.top] == pytest.approx(expected.values[:top].tolist(), abs=2e-5)


def test_logprobs_are_absent_where_nobody_asks(engine):
    assert engine.generate("the", Sampling(max_tokens=2))[0].logprobs is None


def test_an_end_of_document_is_left_out_and_named(engine):
    asked = Sampling(max_tokens=30, temperature=0, logprobs=0)
    engine.eod, before = engine.generate("the", asked)[0].tokens[4], engine.eod
    try:
        done = engine.generate("the", asked)[0]
        *_, last = engine.events(["the"], asked)
    finally:
        engine.eod = before
    assert done.finish_reason == "eod"
    assert len(done.logprobs) == len(done.tokens) <= 4
    assert (last.token, last.done) == (None, done)


def test_a_stop_string_needs_a_tokenizer(model):
    with pytest.raises(ValueError, match="a stop string needs a tokenizer"):
        Engine(model).generate([1], Sampling(stop="a"))

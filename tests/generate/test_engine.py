"""The cached engine against the naive loop and against transformers' generate."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import neox
from neox.generate import Engine, Sampling, naive_generate
from tests.generate.conftest import random_model

prompts = st.lists(st.lists(st.integers(0, 96), min_size=1, max_size=63), min_size=1, max_size=6)


@settings(max_examples=25, deadline=None)
@given(
    prompts=prompts,
    slots=st.integers(1, 4),
    max_tokens=st.integers(1, 30),
    temperature=st.sampled_from([0.0, 0.8]),
    eod=st.integers(0, 96),
)
def test_engine_equals_the_naive_loop(model, prompts, slots, max_tokens, temperature, eod):
    """Whatever the prompts' lengths, the number of slots and where a row ends: token for token the oracle's."""
    engine = Engine(model, slots=slots)
    engine.eod = eod
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, top_k=30, top_p=0.95, seed=5)
    for i, (prompt, done) in enumerate(zip(prompts, engine.generate(prompts, sampling), strict=True)):
        alone = Sampling(**{**sampling.__dict__, "seed": 5 + i})
        assert done.tokens == naive_generate(model, prompt, alone, eod=eod)
        ended_early = len(prompt) + len(done.tokens) < min(64, len(prompt) + max_tokens)
        assert done.finish_reason == ("stop" if ended_early else "length")


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


def test_cache_bytes_bounds_the_slots(model):
    row = 2 * 2 * 32 * 64 * 4  # keys and values, layers, hidden, context, bytes
    assert Engine(model, cache_bytes=3 * row + 1).slots == 3


def test_streamed_text_is_whole_and_equals_the_batch(trained_tokenizer):
    model = random_model(vocab_size=trained_tokenizer.padded_vocab_size(8), rotary_pct=0.25)
    engine = Engine(model, trained_tokenizer)
    for seed in range(5):
        sampling = Sampling(max_tokens=50, seed=seed, temperature=1.5)
        pieces = list(engine.stream("naïve 🙂 ", sampling))
        assert "".join(pieces) == engine.generate("naïve 🙂 ", sampling)[0].text
        assert all(pieces)


@pytest.fixture(scope="module")
def trained_tokenizer():
    from neox.tokenizer import train_bpe

    return train_bpe(["naïve café 🙂🙃 the quick brown fox 東京\n" * 20], 400, progress=False)

"""Requests that come, go and are cancelled at any time, in a cache too small for them: each gets what the naive loop
gives it."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from neox.generate import Engine, Sampling, naive_generate, prompt_lookup
from neox.model.cache import BLOCK, KVPool
from tests.generate.conftest import random_model, small_tokenizer
from tests.tiny import GPT_J, GPT_NEO

FAMILIES = {"gpt_neox": {}, "gptj": GPT_J, "gpt_neo": GPT_NEO}


def small_cache(model, tokenizer, blocks, **options):
    return Engine(model, tokenizer, cache_bytes=blocks * KVPool.block_bytes(model.config, torch.float32), **options)


def naive(model, tokenizer, prompt, sampling):
    """The oracle's tokens, cut at the first stop string, and the log-probabilities of all tokens in float64."""
    tokens = naive_generate(model, prompt, sampling, tokenizer.vocab_size, tokenizer.eod_id)
    for n in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:n])
        if any(stop in text for stop in sampling.stop):
            tokens = tokens[:n]
            break
    scores = model.double()(torch.tensor([prompt + tokens]))[0].log_softmax(-1)
    model.float()
    return tokens, scores[:-1].gather(1, torch.tensor([prompt + tokens])[0, 1:, None])[:, 0].tolist()


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request):
    tokenizer = small_tokenizer()
    return random_model(vocab_size=2 * tokenizer.vocab_size, **FAMILIES[request.param]), tokenizer


ACTIONS = st.lists(
    st.one_of(
        st.tuples(
            st.just("submit"),
            st.integers(0, 3),  # which of a few beginnings
            st.integers(0, 40),  # how much of it
            st.lists(st.integers(0, 99), min_size=1, max_size=12),  # what is one's own
            st.integers(1, 24),
            st.sampled_from([0.0, 0.9]),
            st.sampled_from([(), ("e",), ("fo", " q"), ("东", "n")]),
        ),
        st.tuples(st.just("cancel"), st.integers(0, 5)),
        st.tuples(st.just("step"), st.integers(1, 6)),
    ),
    min_size=12,
    max_size=30,
)
BLOCKS = 6


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    actions=ACTIONS,
    slots=st.integers(1, 4),
    budget=st.sampled_from([16, 48]),
    drafter=st.sampled_from([None, prompt_lookup]),
    seed=st.integers(0, 9),
)
def test_continuous_batching_gives_each_request_what_the_naive_loop_gives(
    family, actions, slots, budget, drafter, seed
):
    model, tokenizer = family
    engine = small_cache(model, tokenizer, BLOCKS, slots=slots, budget=budget, drafter=drafter)
    generator = torch.Generator().manual_seed(seed)
    beginnings = torch.randint(1, tokenizer.vocab_size, (4, 40), generator=generator).tolist()
    asked, seen, done, alive = {}, {}, {}, []

    def step():
        for event in engine.step():
            assert event.number in alive
            seen[event.number] += event.text
            if event.done:
                done[event.number] = event.done
                alive.remove(event.number)

    for action, *what in actions:
        if action == "submit":
            which, length, own, max_tokens, temperature, stop = what
            prompt = beginnings[which][:length] + own
            sampling = Sampling(
                max_tokens=max_tokens,
                temperature=temperature,
                seed=len(asked),
                stop=stop,
                logprobs=0,
                prompt_logprobs=0,
            )
            if len(asked) % 3:
                sampling = sampling.replace(prompt_logprobs=None)
            number = engine.submit(prompt, sampling)
            asked[number], seen[number] = (prompt, sampling), ""
            alive.append(number)
        elif action == "cancel" and alive:
            number = alive.pop(what[0] % len(alive))
            engine.cancel(number)
            del asked[number]
        elif action == "step":
            for _ in range(what[0]):
                step()
    for _ in range(2000):
        if not engine.busy:
            break
        step()
    assert not engine.busy
    assert done.keys() == asked.keys()
    for number, (prompt, sampling) in asked.items():
        tokens, logprobs = naive(model, tokenizer, prompt, sampling)
        assert done[number].tokens == tokens
        assert seen[number] == done[number].text
        new = [one.logprob for one in done[number].logprobs]
        assert new == pytest.approx(logprobs[len(prompt) - 1 :], abs=1e-5)
        if sampling.prompt_logprobs is not None:
            first = [one.logprob for one in done[number].prompt_logprobs]
            assert first == pytest.approx(logprobs[: len(prompt) - 1], abs=1e-5)
    assert engine._scheduler.tree.available == BLOCKS  # nothing is held by what has gone


def test_prefix_cache_hits_evictions_and_preemption_leave_the_output(family):
    """A fixed load that hits, evicts and preempts."""
    model, tokenizer = family
    engine = small_cache(model, tokenizer, BLOCKS, slots=4, budget=32)
    beginnings = torch.randint(1, tokenizer.vocab_size, (2, 40), generator=torch.Generator().manual_seed(3)).tolist()
    prompts = [[*beginnings[i % 2][: 20 + i], 7 + i] for i in range(12)]
    sampling = Sampling(max_tokens=22, temperature=0.8, stop_at_eod=False, logprobs=0)
    done = engine.generate(prompts, sampling)
    for i, (prompt, one) in enumerate(zip(prompts, done, strict=True)):
        tokens, logprobs = naive(model, tokenizer, prompt, sampling.replace(seed=sampling.seed + i))
        assert one.tokens == tokens
        assert [a.logprob for a in one.logprobs] == pytest.approx(logprobs[len(prompt) - 1 :], abs=1e-5)
    assert sum(len(prompt) + len(one.tokens) for prompt, one in zip(prompts, done, strict=True)) > 2 * BLOCKS * BLOCK
    assert min(engine.stats.hits, engine.stats.evictions, engine.stats.preemptions) > 0


def test_prefix_cache_computes_the_prompt_of_several_samples_once(family):
    model, tokenizer = family
    engine = Engine(model, tokenizer, slots=8)
    prompt = list(range(1, 50))
    engine.generate([prompt] * 8, Sampling(max_tokens=1))
    # What reaches into the last block is each one's own, and so is the token that the first one is drawn after.
    assert engine.stats.misses == len(prompt) + 7 * (len(prompt) % BLOCK)
    assert engine.stats.hits == 7 * (len(prompt) // BLOCK * BLOCK)


def test_prefix_cache_copies_the_common_beginning_of_a_block(family):
    model, tokenizer = family
    engine = Engine(model, tokenizer)
    first, second = list(range(1, 41)), [*range(1, 28), 3, 1, 4, 1, 5]
    engine.generate(first, Sampling(max_tokens=1))
    before = engine.stats.hits
    done = engine.generate(second, Sampling(max_tokens=8, temperature=0))[0]
    assert engine.stats.hits - before == 27
    assert done == Engine(model, tokenizer).generate(second, Sampling(max_tokens=8, temperature=0))[0]


def test_chunked_prefill_does_not_delay_decoding_requests(family):
    model, tokenizer = family
    engine = Engine(model, tokenizer, budget=17)
    short = engine.submit([1, 2, 3], Sampling(max_tokens=30, stop_at_eod=False))
    engine.step()
    long = engine.submit(list(range(1, 61)), Sampling(max_tokens=1))
    for _ in range(3):
        assert [(event.number, event.done) for event in engine.step()] == [(short, None)]
    assert {event.number for event in engine.step()} == {short, long}


def test_closing_the_events_cancels_their_requests(family):
    model, tokenizer = family
    engine = Engine(model, tokenizer)
    events = engine.events(["the quick", "brown"], Sampling(max_tokens=20))
    next(events)
    other = engine.submit("fox", Sampling(max_tokens=3, stop_at_eod=False))
    next(events)
    events.close()
    assert engine.busy
    found = []
    while engine.busy:
        found += engine.step()
    assert {event.number for event in found} == {other}
    assert found[-1].done.tokens == engine.generate("fox", Sampling(max_tokens=3, stop_at_eod=False))[0].tokens


def test_an_interrupted_step_changes_no_output(family, monkeypatch):
    model, tokenizer = family
    sampling = Sampling(max_tokens=12, stop_at_eod=False)
    expected = Engine(model, tokenizer).generate(["the quick brown", "fox"], sampling)
    engine = Engine(model, tokenizer)
    numbers = [
        engine.submit(text, sampling.replace(seed=sampling.seed + i))
        for i, text in enumerate(("the quick brown", "fox"))
    ]
    done, calls = {}, 0
    attend = type(model.layers[1].attention).attend

    def interrupted(*arguments):
        nonlocal calls
        calls += 1
        if calls % 7 == 0:
            raise KeyboardInterrupt
        return attend(*arguments)

    monkeypatch.setattr(type(model.layers[1].attention), "attend", interrupted)
    for _ in range(200):
        try:
            done |= {event.number: event.done for event in engine.step() if event.done}
        except KeyboardInterrupt:
            continue
    assert [done[number] for number in numbers] == expected

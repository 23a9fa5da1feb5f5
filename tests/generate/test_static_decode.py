"""Passes of fixed shape, run as they are written where there is no CUDA: what the naive loop gives, a step late."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from neox.generate import Engine, Sampler, Sampling, naive_generate
from neox.generate.sampling import sample_rows
from neox.generate.static_decode import SMALLEST, StaticDecoder
from neox.model.cache import BLOCK, KVPool
from tests.generate.conftest import random_model, small_tokenizer
from tests.generate.test_continuous import FAMILIES, small_cache
from tests.generate.test_continuous import naive as with_stops

DIALS = st.builds(
    Sampling,
    max_tokens=st.integers(1, 30),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 3, 40, 10_000]),
    top_p=st.sampled_from([1.0, 0.9, 0.3, 1e-6]),
    min_p=st.sampled_from([0.0, 0.05, 1.0]),
    seed=st.integers(0, 999),
    stop_at_eod=st.booleans(),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(DIALS, min_size=1, max_size=6), st.integers(0, 999), st.sampled_from([0.1, 1.0, 30.0]))
def test_rows_are_sampled_as_each_sampler_does(samplings, seed, spread):
    logits = spread * torch.randn(len(samplings), 50, generator=torch.Generator().manual_seed(seed))
    dials = [
        (one.temperature, one.top_k, one.top_p, one.min_p, Sampler(one, 50).uniform() if one.temperature else 0.0)
        for one in samplings
    ]
    expected = [Sampler(one, 50)(row) for one, row in zip(samplings, logits, strict=True)]
    columns = torch.tensor(dials, dtype=torch.float64).T
    assert sample_rows(logits, columns, filtered=True).tolist() == expected
    if not any(one.top_k or one.top_p < 1 or one.min_p for one in samplings):
        assert sample_rows(logits, columns, filtered=False).tolist() == expected
    assert sample_rows(logits, None, filtered=False).tolist() == logits.argmax(-1).tolist()
    logits[0, 7] = math.nan
    logits[-1, 3] = math.inf
    for filtered in (True, False):
        tokens = sample_rows(logits, columns, filtered).tolist()
        assert (tokens[0], tokens[-1]) == (-1, -1)
        assert min(tokens[1:-1], default=0) >= 0


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request):
    tokenizer = small_tokenizer()
    options = {"vocab_size": 2 * tokenizer.vocab_size, "max_position_embeddings": 2 * SMALLEST}
    return random_model(**options, **FAMILIES[request.param]), tokenizer


@pytest.fixture
def passes(monkeypatch):
    """The shapes of the passes that were launched: (rows, extent, kind)."""
    shapes = []
    plain = StaticDecoder._pass

    def counted(self, *shape):
        shapes.append(shape)
        plain(self, *shape)

    monkeypatch.setattr(StaticDecoder, "_pass", counted)
    return shapes


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(0, 2), st.integers(1, 40), DIALS, st.sampled_from([(), ("e", "n")])),
        st.tuples(st.just("cancel"), st.integers(0, 5)),
        st.tuples(st.just("interrupt")),
        st.tuples(st.just("step"), st.integers(1, 12)),
    ),
    min_size=8,
    max_size=20,
)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    actions=ACTIONS, slots=st.integers(1, 4), odd=st.sampled_from([None, {"logprobs": 1}, {"presence_penalty": 1.0}])
)
def test_static_passes_give_each_request_what_the_naive_loop_gives(family, actions, slots, odd):
    """In a cache too small for all, broken off anywhere; some requests are not sampled on the device."""
    model, tokenizer = family
    engine = small_cache(model, tokenizer, 9, slots=slots, budget=32, static=True)
    beginnings = torch.randint(1, tokenizer.vocab_size, (3, 40), generator=torch.Generator().manual_seed(5)).tolist()
    asked, done, alive = {}, {}, []

    def step():
        for event in engine.step():
            assert event.number in alive
            if event.done:
                done[event.number] = event.done
                alive.remove(event.number)

    for action, *what in [*actions, ("step", 10_000)]:
        if action == "submit":
            which, length, sampling, stop = what
            sampling = sampling.replace(stop=stop, **(odd if odd and len(asked) % 3 == 0 else {}))
            number = engine.submit(beginnings[which][:length], sampling)
            asked[number] = beginnings[which][:length], sampling
            alive.append(number)
        elif action == "cancel" and alive:
            engine.cancel(alive[what[0] % len(alive)])
            del asked[alive.pop(what[0] % len(alive))]
        elif action == "interrupt" and alive:
            head = model.embed_out.forward
            model.embed_out.forward = lambda x: (_ for _ in ()).throw(KeyboardInterrupt)
            try:
                for _ in range(3):
                    step()
            except KeyboardInterrupt:
                pass
            finally:
                model.embed_out.forward = head
        elif action == "step":
            for _ in range(what[0]):
                if engine.busy:
                    step()
    assert done.keys() == asked.keys()
    for number, (prompt, sampling) in asked.items():
        assert done[number].tokens == with_stops(model, tokenizer, prompt, sampling)[0]
    assert engine._scheduler.tree.available == 9


def test_a_long_load_of_all_shapes(passes):
    """Passes of one row and many, short and long, greedy and not; the prefix cache serves the next call."""
    tokenizer = small_tokenizer()
    model = random_model(vocab_size=2 * tokenizer.vocab_size, max_position_embeddings=2 * SMALLEST)
    engine = Engine(model, tokenizer, slots=4, static=True)
    greedy = Sampling(max_tokens=SMALLEST, temperature=0, stop_at_eod=False)
    prompts = [[5 + i] * (10 + 20 * i) for i in range(4)]
    samplings = [greedy.replace(max_tokens=30 * (i + 1)) for i in range(4)]
    long = [*range(1, 100)]
    for given_prompts, given_samplings in (
        (prompts, samplings),
        (prompts, [one.replace(temperature=0.9, seed=i) for i, one in enumerate(samplings)]),
        ([long], [greedy]),
    ):
        done = engine.generate(given_prompts, given_samplings)
        for prompt, sampling, one in zip(given_prompts, given_samplings, done, strict=True):
            assert one.tokens == naive_generate(model, prompt, sampling, tokenizer.vocab_size, tokenizer.eod_id)
    assert {(4, SMALLEST, "greedy"), (4, 2 * SMALLEST, "greedy"), (4, 2 * SMALLEST, "plain")} <= set(passes)
    assert {(1, SMALLEST, "greedy"), (1, 2 * SMALLEST, "greedy")} <= set(passes)
    hits = engine.stats.hits
    known = [*long, *done[0].tokens]
    again = engine.generate([known[:200]], greedy)[0]
    assert engine.stats.hits - hits >= 200 - 200 % BLOCK - BLOCK
    assert again.tokens == naive_generate(model, known[:200], greedy, tokenizer.vocab_size, tokenizer.eod_id)


def test_a_stop_is_found_a_pass_late_and_a_full_length_is_not(passes):
    engine = Engine(random_model(), static=True)
    plain = Sampling(max_tokens=20, temperature=1.5, stop_at_eod=False)
    whole = engine.generate([3], plain)[0].tokens
    assert len(passes) == 19  # the first token is the prompt's
    passes.clear()
    last = next(i for i, token in enumerate(whole) if token not in whole[:i] and i > 5)
    assert engine.generate([3], plain.replace(stop_tokens=[whole[last]]))[0].tokens == whole[:last]
    assert len(passes) == last + 1


def test_events_of_a_step_are_those_of_the_pass_before():
    engine = Engine(random_model(), static=True)
    engine.submit([3], Sampling(max_tokens=3, temperature=0, stop_at_eod=False))
    assert [len(engine.step()) for _ in range(4)] == [1, 0, 1, 1]
    assert not engine.busy


def exhaust(engine) -> dict:
    done = {}
    while engine.busy:
        done |= {event.number: event.done for event in engine.step() if event.done}
    return done


@pytest.mark.parametrize("moment", range(1, 6))
def test_random_numbers_of_dropped_passes_are_used_again(moment):
    """Broken off in the middle of a pass, with another one not read yet."""
    model = random_model()
    engine = Engine(model, static=True)
    sampling = Sampling(max_tokens=12, temperature=1.5, stop_at_eod=False)
    numbers = [engine.submit([3 + i], sampling.replace(seed=i)) for i in range(2)]
    for _ in range(moment):
        engine.step()
    head = model.embed_out.forward

    def interrupted(x):
        raise KeyboardInterrupt

    model.embed_out.forward = interrupted
    try:
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    finally:
        model.embed_out.forward = head
    done = exhaust(engine)
    for i, number in enumerate(numbers):
        assert done[number].tokens == naive_generate(model, [3 + i], sampling.replace(seed=i))


def test_logits_that_are_not_finite_end_their_request_alone():
    model = random_model()
    engine = Engine(model, static=True)
    good, bad = engine.submit([3], Sampling(max_tokens=8, seed=1)), engine.submit([7], Sampling(max_tokens=8))
    head = model.embed_out.forward
    model.embed_out.forward = lambda x: head(x).index_fill(0, torch.tensor([1]), math.nan)
    try:
        with pytest.raises(ValueError, match="logits are not finite: try dtype=fp32"):
            exhaust(engine)
    finally:
        model.embed_out.forward = head
    done = exhaust(engine)
    assert bad not in done
    assert done[good].tokens == naive_generate(model, [3], Sampling(max_tokens=8, seed=1))


def test_values_that_are_not_finite_do_not_stay_in_a_row():
    """An activation that overflows leaves keys and values that are nan, and zero times nan is nan."""
    model = random_model()
    engine, head = Engine(model, static=True), model.embed_out.forward

    def overflow(x: torch.Tensor) -> torch.Tensor:
        engine._static._cache.keys.fill_(math.nan)
        engine._static._cache.values.fill_(math.nan)
        return head(x) * math.nan

    engine.submit([7], Sampling(max_tokens=8))
    engine.step()
    model.embed_out.forward = overflow
    try:
        with pytest.raises(ValueError, match="logits are not finite: try dtype=fp32"):
            exhaust(engine)
    finally:
        model.embed_out.forward = head
    asked = Sampling(max_tokens=8, seed=1)
    assert engine.generate([[3]], asked)[0].tokens == naive_generate(model, [3], asked)


def test_requests_without_memory_for_a_static_cache_take_the_ordinary_path(monkeypatch, passes):
    model = random_model()
    expected = Engine(model, static=False).generate([3, 4], Sampling(max_tokens=8))[0]
    monkeypatch.setattr(StaticDecoder, "_reserve_length", lambda self, longest: False)
    assert Engine(model, static=True).generate([3, 4], Sampling(max_tokens=8))[0] == expected
    assert not passes


def test_a_pool_of_half_precision_is_copied_to_and_fro():
    model = random_model().bfloat16()
    engine = Engine(model, static=True, cache_bytes=8 * KVPool.block_bytes(model.config, torch.bfloat16))
    asked = Sampling(max_tokens=40, temperature=0, stop_at_eod=False)
    first = engine.generate([[1, 2, 3]], asked)[0]
    assert engine.generate([[1, 2, 3]], asked)[0] == first


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["greedy", "plain", "filtered"])
def test_a_pass_asks_the_host_for_no_value(family, kind):
    """On tensors that have none."""
    model = random_model(**FAMILIES[family]).to("meta")
    window = model.config.local_window if model.config.local_layers else 0
    decoder = StaticDecoder(model, KVPool(model.config, 4, "meta"), 2, 90, window)
    assert decoder._reserve_length(64)
    decoder._pass(2, 64, kind)


@pytest.mark.gpu
def test_cuda_graphs_sample_what_eager_passes_do():
    """And none waits for the device, where one is under way already and the shape is recorded."""
    model = random_model().to("cuda")
    prompts, samplings = [[3 + i] * (4 + 9 * i) for i in range(3)], []
    for temperature, top_k in ((0.0, 0), (1.0, 0), (0.8, 7)):
        samplings.append(Sampling(max_tokens=24, temperature=temperature, top_k=top_k, stop_at_eod=False))
    expected = [Engine(model, static=False).generate(prompts, one) for one in samplings]
    engine = Engine(model)
    assert [engine.generate(prompts, one) for one in samplings] == expected
    launch = engine._static.launch

    def watched(requests):
        torch.cuda.set_sync_debug_mode("error" if engine._static.in_flight else "default")
        try:
            launch(requests)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    engine._static.launch = watched
    assert engine.generate(prompts, samplings[0]) == expected[0]

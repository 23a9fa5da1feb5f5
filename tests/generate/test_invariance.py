"""Bit for bit: what a request gets does not depend on company, cache, budget or order; and what this rests on."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from neox.generate import Engine, Sampling
from neox.generate.invariant import row_tile
from tests.generate.conftest import random_model
from tests.tiny import GPT_J, GPT_NEO

# Wide enough that products of few rows are rounded otherwise than those of many.
WIDE = {"hidden_size": 96, "num_attention_heads": 6, "vocab_size": 211}
MODELS = {
    "gpt_neox": random_model(**WIDE),
    "gptj": random_model(**WIDE, **GPT_J),
    "gpt_neo": random_model(**WIDE, **GPT_NEO),
}
SAMPLING = Sampling(max_tokens=12, temperature=0.9, stop_at_eod=False, logprobs=3, prompt_logprobs=2)


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", MODELS)
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_company_cache_and_budget_leave_no_trace(threads, kind, data):
    model = MODELS[kind]
    beginning = data.draw(st.lists(st.integers(0, 210), min_size=20, max_size=30))
    ends = data.draw(st.lists(st.lists(st.integers(0, 210), min_size=1, max_size=20), min_size=3, max_size=7))
    prompts = [beginning[: 30 - 3 * i] + end for i, end in enumerate(ends)]
    samplings = [
        Sampling(**{**SAMPLING.__dict__, "seed": i, "prompt_logprobs": 2 if i % 2 else None}) for i in range(len(ends))
    ]
    alone = [Engine(model).generate(p, [s])[0] for p, s in zip(prompts, samplings, strict=True)]
    engine = Engine(model, slots=data.draw(st.integers(1, 6)), budget=data.draw(st.sampled_from([16, 37, 256])))
    assert engine.generate(prompts, samplings) == alone
    order = data.draw(st.permutations(range(len(prompts))))
    again = engine.generate([prompts[i] for i in order], [samplings[i] for i in order])  # from the tree, now
    assert again == [alone[i] for i in order]
    assert engine.stats.hits > 0


@pytest.mark.parametrize("kind", MODELS)
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_scores_are_those_of_a_full_pass_and_know_nothing_of_order_or_cache(threads, kind, data):
    model = MODELS[kind]
    beginning = data.draw(st.lists(st.integers(0, 210), min_size=1, max_size=40))
    few = st.lists(st.integers(0, 210), min_size=1, max_size=12)
    requests = [
        (beginning[:length] + a, b)
        for length, a, b in data.draw(st.lists(st.tuples(st.integers(0, 40), few, few), min_size=1, max_size=8))
    ]
    engine = Engine(model, budget=data.draw(st.sampled_from([16, 37, 256])))
    scores = engine.score(requests)
    order = data.draw(st.permutations(range(len(requests))))
    assert engine.score([requests[i] for i in order]) == [scores[i] for i in order]
    assert [Engine(model).score([request])[0] for request in requests] == scores
    for (context, continuation), score in zip(requests, scores, strict=True):
        expected = model.double()(torch.tensor([context + continuation]))[0].log_softmax(-1)[len(context) - 1 : -1]
        model.float()
        target = torch.tensor(continuation)
        assert score.logprobs == pytest.approx(expected.gather(1, target[:, None])[:, 0].tolist(), abs=1e-5)
        assert score.logprob == sum(score.logprobs)
        assert score.is_greedy == (expected.argmax(-1) == target).all().item()


def long_requests():
    """Contexts of a length at which attention reads its keys in several parts, with a common beginning."""
    draw = torch.Generator().manual_seed(3)
    lengths = (150, 190, 210, 250, 300, 330, 390, 520, 700)
    tokens = torch.randint(211, (700,), generator=draw).tolist()
    return [(tokens[:length], [7, number]) for number, length in enumerate(lengths)]


def test_long_contexts_know_nothing_of_company_cache_or_budget():
    model = random_model(**WIDE | {"num_attention_heads": 2, "max_position_embeddings": 1024})
    requests = long_requests()
    alone = [Engine(model).score([request])[0] for request in requests]
    for budget in (48, 256, 1024):
        engine = Engine(model, budget=budget)
        assert engine.score(requests) == alone
        assert engine.score(requests[::-1]) == alone[::-1]  # from the tree, now
        assert engine.stats.hits > 0


def test_the_most_likely_continuation_is_greedy_and_no_other():
    engine = Engine(MODELS["gpt_neox"])
    done = engine.generate([5, 6], Sampling(max_tokens=6, temperature=0, stop_at_eod=False))[0].tokens
    other = [*done[:5], (done[5] + 1) % 211]
    assert [score.is_greedy for score in engine.score([([5, 6], done), ([5, 6], other)])] == [True, False]


def test_scoring_computes_what_is_common_once_and_the_head_at_continuations_only(monkeypatch):
    engine = Engine(MODELS["gpt_neox"], invariant=False)
    rows = []
    forward = engine.model.embed_out.forward
    monkeypatch.setattr(engine.model.embed_out, "forward", lambda x: rows.append(x.shape[0]) or forward(x))
    context = list(range(48))
    engine.score([([*context, 50 + i], [1, 2]) for i in range(4)])
    assert engine.stats.misses == 48 + 4 * 2
    assert sum(rows) == 4 * 2


def test_continuations_that_differ_in_the_last_token_are_computed_once():
    engine = Engine(MODELS["gpt_neox"])
    context = list(range(30))
    requests = [(context, [end]) for end in (3, 9, 9, 4)] + [(context, [3, end]) for end in (5, 6)]
    requests += [([*context, 3], [5])]  # the same tokens, cut elsewhere: less of them is scored
    scores = engine.score(requests)
    assert scores == [Engine(MODELS["gpt_neox"]).score([request])[0] for request in requests]
    assert engine.stats.misses + engine.stats.hits == 30 + 31 + 31
    assert [len(score.logprobs) for score in scores] == [1, 1, 1, 1, 2, 2, 1]


def test_what_cannot_be_scored_is_one_clear_line():
    engine = Engine(MODELS["gpt_neox"])
    with pytest.raises(ValueError, match=r"^request 1: a context and a continuation have at least one token each$"):
        engine.score([([1], [2]), ([], [1])])
    with pytest.raises(ValueError, match=r"^request 0: 66 tokens, at most 65 can be scored: [^\n]*$"):
        engine.score([([1] * 60, [2] * 6)])
    assert len(engine.score([([1] * 60, [2] * 5)])[0].logprobs) == 5
    with pytest.raises(ValueError, match=r"token 211, the model has 211 rows"):
        engine.score([([1], [211])])
    assert engine.score([]) == []


def test_without_the_rule_company_shows():
    """Or the tests above could not fail."""
    model = MODELS["gpt_neox"]
    if row_tile(model, 256) == 1:
        pytest.skip("this library rounds products of any height alike")
    prompts = torch.randint(211, (6, 20), generator=torch.Generator().manual_seed(1)).tolist()
    samplings = [replace(SAMPLING, seed=i) for i in range(6)]
    alone = [Engine(model, invariant=False).generate(p, [s])[0] for p, s in zip(prompts, samplings, strict=True)]
    assert Engine(model, invariant=False).generate(prompts, samplings) != alone


def test_products_of_few_rows_are_rounded_otherwise_and_the_probe_finds_it():
    """The premise: without it there would be nothing to hold. On a library where it is false, the probe says 1."""
    layer = MODELS["gpt_neox"].layers[0].mlp.dense_4h_to_h
    x = torch.randn(256, layer.in_features)
    with torch.inference_mode():
        single = torch.cat([layer(x[i : i + 1]) for i in range(len(x))])
        same = torch.equal(single, layer(x))
    assert (row_tile(MODELS["gpt_neox"], 256) == 1) == same


class Uneven(nn.Module):
    """Rounds as libraries do: a product of fewer than `least` rows otherwise than one of more."""

    def __init__(self, layer: nn.Linear, least: int) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.least = layer.weight, least

    def forward(self, x):
        exact = (x[:, None] * self.weight).sum(-1)
        return exact * (1 + 1e-6 * (x.shape[0] < self.least))


@pytest.mark.parametrize(("least", "tile"), [(0, 1), (2, 4), (9, 16), (16, 16), (33, 64), (100, 256)])
def test_the_probe_finds_the_smallest_height_that_is_safe(least, tile):
    model = random_model()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Uneven(child, least if name == "dense" else 0))
    assert row_tile(model, 256) == tile

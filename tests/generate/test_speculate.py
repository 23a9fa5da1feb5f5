"""Speculative decoding changes the number of steps, and nothing else."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neox.generate import DraftModel, Engine, Sampling, distribution, prompt_lookup
from neox.model.cache import BLOCK, KVPool
from tests.generate.conftest import needs_kernels, packed, random_model
from tests.tiny import GPT_J, GPT_NEO

FAMILIES = {"gpt_neox": {}, "gptj": GPT_J, "gpt_neo": GPT_NEO}
MODELS = {kind: packed(random_model(**flags)) for kind, flags in FAMILIES.items()}


def oracle(whole, wrong):
    """A drafter that knows the completions `whole`, and gets every `wrong`-th token wrong."""

    def draft(sequences, limit):
        found = []
        for tokens in sequences:
            after = next(one[len(tokens) :][:limit] for one in whole if one[: len(tokens)] == tokens)
            found.append([(t + 1) % 97 if (len(tokens) + i) % wrong == 0 else t for i, t in enumerate(after)])
        return found

    return draft


@needs_kernels
@pytest.mark.parametrize("kind", MODELS)
@settings(max_examples=10, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, 96), min_size=1, max_size=40), min_size=1, max_size=5, unique_by=tuple),
    temperature=st.sampled_from([0.0, 0.7]),
    penalty=st.sampled_from([1.0, 1.4]),
    wrong=st.integers(2, 9),
    draft_tokens=st.integers(1, 9),
    blocks=st.sampled_from([4, 40]),
    eod=st.integers(0, 96),
)
def test_speculative_decoding_leaves_tokens_and_log_probabilities_as_they_are(
    kind, prompts, temperature, penalty, wrong, draft_tokens, blocks, eod
):
    """Bit for bit, greedy or sampled, penalized, ended early, and with a cache that drafts overflow."""
    model = MODELS[kind]
    bytes_ = blocks * KVPool.block_bytes(model.config, torch.float32)
    sampling = Sampling(max_tokens=20, temperature=temperature, repetition_penalty=penalty, logprobs=1)
    plain = Engine(model, slots=3)
    plain.eod = eod
    expected = plain.generate(prompts, sampling)
    whole = [prompt + done.tokens for prompt, done in zip(prompts, expected, strict=True)]
    for drafter in (prompt_lookup, oracle(whole, wrong)):
        engine = Engine(model, slots=3, cache_bytes=bytes_, drafter=drafter, draft_tokens=draft_tokens)
        engine.eod = eod
        assert engine.generate(prompts, sampling) == expected
        assert 0 <= engine.stats.accepted <= engine.stats.drafted


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_right_draft_tokens_save_steps(temperature):
    model = MODELS["gpt_neox"]
    sampling = Sampling(max_tokens=32, temperature=temperature, stop_at_eod=False)
    (done,) = Engine(model).generate([3, 1, 4], sampling)
    engine = Engine(model, drafter=oracle([[3, 1, 4, *done.tokens]], wrong=1000), draft_tokens=7)
    number, steps = engine.submit([3, 1, 4], sampling), 0
    while engine.busy:
        (*_, last), steps = engine.step(), steps + 1
    assert (last.number, last.done) == (number, done)
    assert steps == 1 + math.ceil(31 / 8)
    assert engine.stats.accepted == engine.stats.drafted == 31 - 4


def test_the_same_model_as_a_draft_model_is_always_right_and_another_one_does_no_harm():
    model, sampling = MODELS["gpt_neox"], Sampling(max_tokens=24, temperature=0, stop_at_eod=False)
    prompts = [[1, 2, 3], list(range(40)), [9] * 20]
    expected = Engine(model).generate(prompts, sampling)
    same = Engine(model, drafter=DraftModel(model, slots=3))
    assert same.generate(prompts, sampling) == expected
    assert same.stats.accepted == same.stats.drafted > 0
    other = Engine(model, drafter=DraftModel(random_model(num_hidden_layers=1, max_position_embeddings=32)))
    assert other.generate(prompts, sampling) == expected
    assert other.stats.accepted < other.stats.drafted


def test_the_draft_model_computes_only_what_is_new():
    draft = DraftModel(MODELS["gpt_neox"])
    tokens = list(range(48))
    draft([tokens], 4)
    before = draft.engine.stats.misses
    draft([[*tokens, 5]], 4)
    assert draft.engine.stats.misses - before <= 1 + 4 + BLOCK


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1, 2, 3, 4, 9, 1, 2, 3], [4, 9, 1, 2]),
        ([1, 2, 3, 4, 2, 3, 5, 1, 2, 3], [4, 2, 3, 5]),  # three tokens before two, though two came later
        ([7, 2, 5, 8, 2], [5, 8, 2]),
        ([7, 7, 7], [7]),
        ([1, 2, 3], []),
        ([1], []),
    ],
)
def test_prompt_lookup_finds_what_followed_the_same(tokens, expected):
    assert prompt_lookup([tokens], 4) == [expected]


def sampled(drafter, samples):
    """Counts of each pair of tokens among `samples` on a vocabulary of five; and exact probabilities."""
    model = random_model(vocab_size=5, hidden_size=16, num_attention_heads=2)
    sampling = Sampling(max_tokens=3, temperature=1.3, top_p=0.95, stop_at_eod=False)
    first = distribution(model(torch.tensor([[1, 2]]))[0, -1], sampling)
    seconds = [distribution(model(torch.tensor([[1, 2, a]]))[0, -1], sampling) for a in range(5)]
    engine = Engine(model, slots=64, drafter=drafter, draft_tokens=2)
    counts = torch.zeros(5, 5)
    for done in engine.generate([[1, 2]] * samples, sampling.replace(seed=0)):
        # The second token is the first that a draft can hold: the prompt's pass samples the one before.
        counts[done.tokens[0], done.tokens[1]] += 1
    return counts, torch.stack([first[a] * seconds[a] for a in range(5)]), engine.stats


def chi_squared(counts, probabilities):
    """Pearson's statistic and its degrees of freedom, over cells that are expected at all."""
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = probabilities[possible] * counts.sum()
    return ((counts[possible] - expected) ** 2 / expected).sum().item(), int(possible.sum()) - 1


def constant(sequences, limit):
    return [[3, 3][:limit] for _ in sequences]


def far_beyond(statistic, freedom):
    """Six standard deviations of the chi-squared distribution above its mean."""
    return statistic > freedom + 6 * math.sqrt(2 * freedom)


def test_speculative_decoding_keeps_the_models_distribution():
    counts, probabilities, stats = sampled(constant, 3000)
    assert 0 < stats.accepted < stats.drafted
    assert not far_beyond(*chi_squared(counts, probabilities))


def test_an_acceptance_rule_that_favours_the_draft_is_found_out(monkeypatch):
    sample = Engine._sample

    def partial(self, request, logits):
        if len(request.tokens) > 2:  # past the prompt's own pass, where a draft stands
            logits = logits.clone()
            logits[3] += 1.0
        return sample(self, request, logits)

    monkeypatch.setattr(Engine, "_sample", partial)
    counts, probabilities, _ = sampled(constant, 3000)
    assert far_beyond(*chi_squared(counts, probabilities))

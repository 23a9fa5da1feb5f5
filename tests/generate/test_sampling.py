"""Sampling against transformers' processors and against the distribution that it claims to draw from."""

import math

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from neox.generate import Sampler, Sampling, distribution
from neox.generate.sampling import sample_rows
from tests.tiny import theirs

options = {
    "temperature": st.floats(0.1, 3),
    "top_k": st.integers(0, 40),
    "top_p": st.one_of(st.just(1.0), st.floats(0.05, 1)),
    "min_p": st.one_of(st.just(0.0), st.floats(0, 1)),
    "repetition_penalty": st.one_of(st.just(1.0), st.floats(0.2, 3)),
}


def mask(tokens: list[int], size: int) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.bool).index_fill_(0, torch.tensor(tokens, dtype=torch.long), True)


biases = st.dictionaries(st.integers(0, 39), st.floats(-100, 100), max_size=5)


def bias_row(biases: dict[int, float], size: int) -> torch.Tensor:
    return torch.tensor([biases.get(token, 0.0) for token in range(size)])


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10_000), seen=st.lists(st.integers(0, 39), max_size=50), bias=biases, **options)
def test_distribution_equals_transformers(seed, seen, bias, temperature, top_k, top_p, min_p, repetition_penalty):
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(seed)) * 3
    before = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(repetition_penalty)])
    if bias:
        before.insert(0, SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()]))
    before.append(TemperatureLogitsWarper(temperature))
    if top_k:
        before.append(TopKLogitsWarper(top_k))
    warped = before(torch.tensor([seen], dtype=torch.long), logits)
    # Where a border falls on a token, it is rounding that decides: sums in another order differ by some 1e-7.
    assume(top_p == 1 or (warped[0].softmax(-1).sort(descending=True).values.cumsum(0) - top_p).abs().min() > 1e-6)
    if top_p < 1:
        warped = TopPLogitsWarper(top_p)(None, warped)
    relative = warped[0].softmax(-1) / warped[0].softmax(-1).max()
    assume((relative[relative < 1] - min_p).abs().min(dim=0).values > 1e-6 if (relative < 1).any() else True)
    expected = MinPLogitsWarper(min_p)(None, warped).softmax(-1)[0]
    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
    )
    found = distribution(logits[0], sampling, seen=mask(seen, 40), bias=bias_row(bias, 40))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("penalty", [0.7, 1.6])
def test_the_order_is_that_of_transformers_generate(penalty):
    """Its own scores after all processors, which `generate` puts in order itself, at each of 30 steps."""
    asked = {"temperature": 1.7, "top_k": 20, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": penalty}
    biases = {5: 3.0, 44: -2.0, 90: 4.0}
    prompt = [5, 9, 5, 44]
    torch.manual_seed(1)
    out = theirs().generate(
        torch.tensor([prompt]), do_sample=True, max_new_tokens=30, eos_token_id=None, pad_token_id=0,
        return_dict_in_generate=True, output_scores=True, output_logits=True,
        sequence_bias=[[[token], bias] for token, bias in biases.items()], **asked
    )  # fmt: skip
    tokens = out.sequences[0].tolist()
    survivors = set()
    for step, (logits, scores) in enumerate(zip(out.logits, out.scores, strict=True)):
        seen = mask(tokens[: len(prompt) + step], 97)
        found = distribution(logits[0], Sampling(**asked), seen=seen, bias=bias_row(biases, 97))
        torch.testing.assert_close(found, scores[0].softmax(-1), atol=1e-6, rtol=1e-5)
        survivors.add(int((found > 0).sum()))
    assert len(survivors) >= 3
    assert max(survivors) < 20  # the filters after top-k were at work too


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    prompt=st.lists(st.integers(0, 15), max_size=10),
    output=st.lists(st.integers(0, 11), max_size=30),
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
    repetition=st.floats(0.2, 3),
    temperature=st.floats(0.1, 3),
    bias=st.dictionaries(st.integers(0, 11), st.floats(-10, 10), max_size=4),
)
def test_penalties_are_openais_formula_in_the_order_described(
    seed, prompt, output, presence, frequency, repetition, temperature, bias
):
    """Token by token in double precision; of 16 rows 12 stand for tokens, and prompts do not count for OpenAI's."""
    logits = torch.randn(16, generator=torch.Generator().manual_seed(seed)) * 3
    sampling = Sampling(
        presence_penalty=presence,
        frequency_penalty=frequency,
        repetition_penalty=repetition,
        temperature=temperature,
        logit_bias=bias,
    )
    sampler = Sampler(sampling, 12, prompt)
    for token in output:
        sampler.take(token)
    scores = []
    for token, logit in enumerate(logits.tolist()[:12]):
        score = logit + bias.get(token, 0.0)
        if token in prompt or token in output:
            score = score / repetition if score > 0 else score * repetition
        score -= output.count(token) * frequency + (token in output) * presence
        scores.append(score / temperature)
    expected = torch.tensor(scores, dtype=torch.float64).softmax(-1).float()
    torch.testing.assert_close(sampler.probabilities(logits), expected, atol=1e-5, rtol=1e-4)


def test_what_is_drawn_counts_and_the_prompt_does_not():
    logits = torch.tensor([3.0, 2.5, 0.0])
    greedy = Sampling(temperature=0, frequency_penalty=0.4)
    sampler = Sampler(greedy, 3, prompt=[0, 0, 0])
    assert [sampler(logits) for _ in range(4)] == [0, 0, 1, 0]  # 3.0, 2.6, then 2.2 against 2.5, 2.2 against 2.1
    sampler = Sampler(Sampling(temperature=0, presence_penalty=0.4), 3, prompt=[0, 0, 0])
    assert [sampler(logits) for _ in range(3)] == [0, 0, 0]  # once only: 2.6 stays above 2.5


def test_bias_names_tokens_by_id_or_by_text(trained_tokenizer):
    """A text that is one token, an id, and an id as JSON spells it; at 100 and -100 nothing else is left."""
    (word,) = trained_tokenizer.encode(" quick")
    other = word + 1
    logits = torch.zeros(trained_tokenizer.vocab_size)
    for bias in ({" quick": 100}, {word: 100}, {str(word): 100.0}, {other: -100, " quick": 50}):
        sampler = Sampler(Sampling(logit_bias=bias), trained_tokenizer.vocab_size, tokenizer=trained_tokenizer)
        assert {sampler(logits) for _ in range(20)} == {word}
    banned = Sampling(logit_bias=dict.fromkeys(range(4), -100))
    drawn = Sampler(banned, 6)
    assert {drawn(torch.zeros(6)) for _ in range(50)} == {4, 5}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"logit_bias": {"quick brown": 1}}, r"logit_bias: 'quick brown' is \d+ tokens \[.*\]: give their ids"),
        ({"logit_bias": {"": 1}}, r"generate.logit_bias: '' is 0 tokens"),
        ({"logit_bias": {400: 1}}, "generate.logit_bias: 400 is no token: they are 0 to 399"),
        ({"logit_bias": {-1: 1}}, "generate.logit_bias: -1 is no token"),
        ({"stop_tokens": [3, 400]}, "generate.stop_tokens: 400 is no token: they are 0 to 399"),
    ],
)
def test_what_is_no_token_is_refused(trained_tokenizer, wrong, message):
    with pytest.raises(ValueError, match=message):
        Sampler(Sampling(**wrong), 400, tokenizer=trained_tokenizer)


def test_a_bias_by_text_needs_a_tokenizer():
    with pytest.raises(ValueError, match="' the' needs a tokenizer: this model was loaded without one"):
        Sampler(Sampling(logit_bias={" the": 1}), 10)


def test_draws_follow_the_distribution():
    """Chi-square of 20,000 draws over 8 tokens at the 1e-4 level (7 degrees of freedom: 29.9)."""
    sampling = Sampling(temperature=1.3, top_k=7)
    logits = torch.linspace(-1, 2, 8)
    sampler = Sampler(sampling, num_real_tokens=8)
    counts = torch.bincount(torch.tensor([sampler(logits) for _ in range(20_000)]), minlength=8)
    expected = distribution(logits, sampling) * 20_000
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    assert ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum() < 29.9


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    num_real_tokens=st.integers(1, 16),
    prompt=st.lists(st.integers(0, 15), max_size=8),
    greedy=st.booleans(),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    banned=st.booleans(),
    **options,
)
def test_padding_rows_are_never_sampled(seed, num_real_tokens, prompt, greedy, banned, **asked):
    """However likely they are, in every mode, and also where a prompt holds one."""
    logits = torch.randn(16, generator=torch.Generator().manual_seed(seed))
    logits[num_real_tokens:] = 50.0
    if greedy:
        asked["temperature"] = 0.0
    if banned:  # all that may be drawn
        asked["logit_bias"] = dict.fromkeys(range(num_real_tokens), -100)
    sampler = Sampler(Sampling(seed=seed, **asked), num_real_tokens, prompt)
    assert max(sampler(logits) for _ in range(10)) < num_real_tokens


def test_a_drawn_token_is_penalized_from_then_on():
    logits = torch.tensor([1.0, 3.0, 2.9, -1.0])
    sampler = Sampler(Sampling(temperature=0, repetition_penalty=2.0), num_real_tokens=4, prompt=[3])
    assert [sampler(logits) for _ in range(4)] == [1, 2, 1, 1]  # 3.0, then 1.5 against 2.9, then 1.5 against 1.45
    assert Sampler(Sampling(temperature=0, repetition_penalty=2.0), 2, [1])(torch.tensor([-3.0, -2.0])) == 0


@settings(max_examples=50, deadline=None)
@given(temperature=st.floats(0, 1e30, exclude_min=True), scale=st.sampled_from([1e-30, 1.0, 1e30]))
@example(temperature=5e-324, scale=1e30)
def test_no_temperature_overflows(temperature, scale):
    probabilities = distribution(torch.tensor([-1.0, 3.0, 2.0]) * scale, Sampling(temperature=temperature))
    assert probabilities.sum().item() == pytest.approx(1)
    assert probabilities[1] == probabilities.max()


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_refused(wrong, temperature):
    with pytest.raises(ValueError, match="logits are not finite: try dtype=fp32"):
        Sampler(Sampling(temperature=temperature), num_real_tokens=3)(torch.tensor([1.0, wrong, 2.0]))


def test_the_seed_decides():
    logits = torch.randn(50)

    def draws(seed: int) -> list[int]:
        sampler = Sampler(Sampling(seed=seed), num_real_tokens=50)
        return [sampler(logits) for _ in range(20)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)


SENSELESS = (
    {"top_p": 0.0},
    {"top_p": 1.1},
    {"temperature": -1.0},
    {"temperature": math.nan},
    {"max_tokens": 0},
    {"repetition_penalty": 0.0},
    {"repetition_penalty": 1e-40},
    {"repetition_penalty": 1e30},
    {"repetition_penalty": math.inf},
    {"min_p": -0.1},
    {"min_p": 1.1},
    {"seed": -1},
    {"seed": 2**63},
    {"seed": 2**64},
    {"stop": ["a", ""]},
    {"stop": ""},
    {"logprobs": -1},
    {"presence_penalty": 2.1},
    {"frequency_penalty": math.nan},
    {"logit_bias": {3: 101}},
    {"logit_bias": {" the": -math.inf}},
)


def test_senseless_values_are_refused():
    for wrong in SENSELESS:
        with pytest.raises(ValueError, match=f"generate.{next(iter(wrong))}") as caught:
            Sampling(**wrong)
        assert "\n" not in str(caught.value), wrong


def test_the_smallest_filters_keep_the_most_likely_token():
    """top_p below the smallest float32 emptied the set, whose weights of nan drew the last token."""
    logits = torch.tensor([0.1, 2.0, 0.3, 1.9])
    for options in ({"top_p": 5e-324}, {"top_p": 1e-46}, {"top_p": 1e-10}, {"min_p": 1.0}, {"temperature": 5e-324}):
        sampling = Sampling(**options)
        assert distribution(logits, sampling).tolist() == [0, 1, 0, 0], options
        columns = [[sampling.temperature], [sampling.top_k], [sampling.top_p], [sampling.min_p], [0.999]]
        rows = sample_rows(logits[None], torch.tensor(columns, dtype=torch.float64), filtered=True)
        assert rows.tolist() == [1], options


def test_the_extreme_penalties_that_are_admitted_draw_tokens():
    draw = torch.Generator().manual_seed(0)
    for penalty in (0.01, 100.0):
        for scale in (1e-30, 1.0, 1e30, 1e36):
            logits = torch.randn(40, generator=draw) * scale
            sampling = Sampling(repetition_penalty=penalty, presence_penalty=2, frequency_penalty=-2, temperature=1e-3)
            past = {"seen": torch.arange(40) < 30, "counts": torch.arange(40) % 3.0}
            weights = distribution(logits, sampling, **past)
            assert weights.isfinite().all(), (penalty, scale)
            assert weights.sum().item() == pytest.approx(1), (penalty, scale)


def test_weights_without_a_token_are_an_error():
    nothing = torch.full((4,), -math.inf)
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="no token has a probability above 0"):
            distribution(nothing, Sampling(temperature=temperature))
        sampler = Sampler(Sampling(temperature=temperature, repetition_penalty=2.0), num_real_tokens=4)
        with pytest.raises(ValueError, match="no token has a probability above 0"):
            sampler(nothing)
    settings = torch.tensor([[1.0], [0], [1.0], [0], [0.5]], dtype=torch.float64)
    for row in (nothing, torch.tensor([1.0, math.nan, 0.0, 0.0]), torch.tensor([1.0, math.inf, 0.0, 0.0])):
        assert sample_rows(row[None], settings, filtered=True).tolist() == [-1], row
        assert sample_rows(row[None], None, filtered=False).tolist() == [-1], row
        with pytest.raises(ValueError, match="not finite"):  # greedy, without a penalty: numpy's one pass
            Sampler(Sampling(temperature=0), num_real_tokens=4)(row)


def test_one_stop_string_is_a_list_of_one():
    assert Sampling(stop="ab").stop == ("ab",)
    assert Sampling(stop=["ab", "c"]).stop == ("ab", "c")


def test_the_config_has_the_same_options_with_the_same_defaults():
    from neox.config import GenerateConfig

    assert Sampling.of(GenerateConfig()) == Sampling()
    assert Sampling.of(GenerateConfig(min_p=0.2, stop=("x",), n=3)) == Sampling(min_p=0.2, stop="x")
    given = GenerateConfig(logit_bias={" the": -1, "262": 2}, stop_tokens=[7], stop_at_eod=False)
    assert Sampling.of(given) == Sampling(logit_bias={" the": -1.0, 262: 2.0}, stop_tokens=(7,), stop_at_eod=False)

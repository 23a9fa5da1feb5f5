"""Request by request what lm-eval's own `hf` backend answers, on one tiny random model that `transformers` saved."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance

from neox.evaluation import EngineLM
from neox.generate import Engine
from neox.generate.loading import load_engine
from tests.evaluation.conftest import CONTEXT, TEXT, hf_backend, save_model

LONG = TEXT * 12  # several contexts


def asked(kind: str, many: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, arguments, number) for number, arguments in enumerate(many)]


def assert_alike(ours, theirs, arguments: list[tuple[str, str]]) -> None:
    requests = asked("loglikelihood", arguments)
    mine, reference = ours.loglikelihood(requests), theirs.loglikelihood(requests, disable_tqdm=True)
    for pair, (logprob, greedy), (their_logprob, their_greedy) in zip(arguments, mine, reference, strict=True):
        assert logprob == pytest.approx(their_logprob, abs=1e-4, rel=1e-6), pair
        assert greedy is their_greedy, pair


QUESTION = "Where is the fox?\nThe answer is:"
PAIRS = [
    *((QUESTION, choice) for choice in (" yes", " no", " in 東京", " the naïve café 🙂")),
    *((QUESTION + "  \n ", choice) for choice in ("yes", " yes")),  # white space at the end
    ("", "The answer"),
    ("", "<|endoftext|>The answer"),  # its first token is the context
    ("<|endoftext|>", "The"),
    (LONG, " yes"),  # cut on the left
    (LONG, " yes, said the quick brown fox"),
    (QUESTION, TEXT[:40]),
    *[("twice", " asked")] * 2,
]


def test_loglikelihood_of_choices_contexts_and_lengths(ours, theirs):
    assert_alike(ours, theirs, PAIRS)
    assert ours.loglikelihood([]) == []


@pytest.mark.parametrize("kind", ["gptj", "gpt_neo"])
def test_loglikelihood_of_gptj_and_gpt_neo(kind, tokenizer, tmp_path):
    save_model(tmp_path, tokenizer, kind)
    assert_alike(EngineLM(load_engine(tmp_path, "cpu"), progress=False), hf_backend(tmp_path), PAIRS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_stored_in_16_bits_are_multiplied_in_float32(dtype, tokenizer, tmp_path):
    save_model(tmp_path, tokenizer, dtype=dtype)
    assert_alike(EngineLM(load_engine(tmp_path, "cpu"), progress=False), hf_backend(tmp_path), PAIRS)


def test_greedy_flags(ours, theirs):
    """Random texts are never the most likely ones: here some are, up to their last token, or all."""
    arguments = []
    for context in ("The", "12 + 7 =", "東京"):
        prompt = ours.tok_encode(context)
        tokens = ours.engine.generate([prompt], ours._sampling({"max_gen_toks": 4}, 0))[0].tokens
        arguments += [(prompt, tokens), (prompt, [*tokens[:-1], 5]), (prompt, tokens[:1]), (prompt, [7, *tokens[1:]])]
    keyed = [(("", str(number)), *pair) for number, pair in enumerate(arguments)]
    mine, reference = ours._loglikelihood_tokens(keyed), theirs._loglikelihood_tokens(keyed, disable_tqdm=True)
    assert [greedy for _, greedy in mine] == [greedy for _, greedy in reference] == [True, False, True, False] * 3


texts = st.text(
    st.one_of(st.sampled_from(" \n\t1Aé🙂東ﬁ́"), st.characters(exclude_categories=["Cs"])), min_size=1, max_size=24
)


@settings(max_examples=60, deadline=None)
@given(arguments=st.lists(st.tuples(st.one_of(st.just(""), texts, st.just(LONG)), texts), min_size=1, max_size=4))
def test_loglikelihood_of_any_text(ours, theirs, arguments):
    """Contexts and continuations of any characters; those that have no token of their own are refused by both.

    lm-eval's backend takes no context of white space alone: ours takes it for an empty one.
    """
    requests = asked("loglikelihood", arguments)
    lengths = [len(ours._encode_pair(*pair)[1]) for pair in arguments if pair[0]]
    if min(lengths, default=1):
        blank = [bool(context) and not context.rstrip() for context, _ in arguments]
        assert_alike(ours, theirs, [pair for pair, alone in zip(arguments, blank, strict=True) if not alone])
        moved = [("", "".join(pair)) if alone else pair for pair, alone in zip(arguments, blank, strict=True)]
        assert ours.loglikelihood(requests) == ours.loglikelihood(asked("loglikelihood", moved))
        return
    for model, refused, how in ((ours, ValueError, "must have 1 to"), (theirs, AssertionError, None)):
        with pytest.raises(refused, match=how):
            model.loglikelihood(requests)


def test_rolling_loglikelihood(ours, theirs):
    requests = asked(
        "loglikelihood_rolling", [(text,) for text in (LONG, "fox", "", TEXT, LONG[:300], "<|endoftext|>a")]
    )
    mine, reference = ours.loglikelihood_rolling(requests), theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    assert mine == pytest.approx(reference, rel=1e-6, abs=1e-4)
    assert mine[2] == 0.0
    assert ours.loglikelihood_rolling([]) == []


@pytest.mark.parametrize(
    "options",
    [
        {"until": ["\n\n"], "max_gen_toks": 12},
        {"until": "e", "max_gen_toks": 20, "do_sample": False, "temperature": 0.7},
        {"until": ["fox", "o", " a"], "max_new_tokens": 24, "temperature": 0.0, "num_beams": 1},
        {"max_gen_toks": 8},
    ],
)
def test_generate_until(ours, theirs, options):
    # One by one: lm-eval's backend generates on while a neighbour in its batch does, and may then cut elsewhere.
    contexts = ["The", "12 + 7 =", "Where is the naïve café? ", LONG, "東京 🙂", "<|endoftext|>"]
    requests = asked("generate_until", [(context, dict(options)) for context in contexts])
    reference = [theirs.generate_until([request], disable_tqdm=True)[0] for request in requests]
    mine = ours.generate_until(requests)
    assert mine == reference
    assert any(mine)
    assert ours.generate_until([]) == []


def test_sampled_answers_do_not_depend_on_greedy_requests(ours):
    """Of several processes each has other greedy requests; of a run that goes on some are answered."""
    drawn = [(context, {"do_sample": True, "temperature": 1.0, "max_gen_toks": 8}) for context in ("The", "12 +")]
    greedy = ("The fox", {"max_gen_toks": 4})
    alone = ours.generate_until(asked("generate_until", drawn))
    assert ours.generate_until(asked("generate_until", [greedy, *drawn]))[1:] == alone


def test_prefix_cache_is_used_and_changes_no_bit(folder):
    """To the bit: each request by an engine that has nothing in its cache."""
    shots = TEXT[:90]
    arguments = [
        (shots + question, choice) for question in ("12 +", "Is it", "The") for choice in (" 7", " yes", " a fox")
    ]
    shared = EngineLM(load_engine(folder, "cpu"), progress=False)
    together = shared.loglikelihood(asked("loglikelihood", arguments))
    assert shared.engine.stats.hits > shared.engine.stats.misses
    for pair, answer in zip(arguments, together, strict=True):
        alone = EngineLM(load_engine(folder, "cpu"), progress=False)
        assert alone.loglikelihood(asked("loglikelihood", [pair])) == [answer]
        assert alone.engine.stats.hits == 0


def test_cache_hook_gets_answers_one_by_one(ours, monkeypatch):
    seen = []

    class Hook:
        def add_partial(self, *answer):
            seen.append(answer)

    monkeypatch.setattr(ours, "cache_hook", Hook())
    choices = asked("loglikelihood", [("a", " b"), ("", "c")])
    logprobs = ours.loglikelihood(choices)
    rolled = ours.loglikelihood_rolling(asked("loglikelihood_rolling", [(LONG,)]))
    options = {"max_gen_toks": 3, "until": ["x"]}
    written = ours.generate_until(asked("generate_until", [("The", options)]))
    assert sorted(seen[:2]) == sorted(("loglikelihood", c.args, a) for c, a in zip(choices, logprobs, strict=True))
    assert seen[2:] == [
        ("loglikelihood_rolling", (LONG,), rolled[0]),
        ("generate_until", ("The", {"max_gen_toks": 3, "until": ["x"]}), written[0]),
    ]


def test_truncated_prompts_are_counted(ours, caplog):
    ours.loglikelihood(asked("loglikelihood", [(LONG, " yes"), ("The", " yes"), (LONG, " no")]))
    assert caplog.messages == ["2 of 3 prompts lose their beginning: the context is 64"]
    caplog.clear()
    ours.generate_until(asked("generate_until", [(context, {"max_gen_toks": 3}) for context in (LONG, "The")]))
    assert caplog.messages == ["1 of 2 prompts lose their beginning: the context is 64"]


def test_unsupported_requests_are_errors(ours, folder):
    for options, message in (
        ({"num_beams": 4}, "num_beams is not supported"),
        ({"typical_p": 0.4}, "typical_p is not supported"),
        ({"max_gen_toks": CONTEXT}, "leaves no room"),
    ):
        with pytest.raises(ValueError, match=message):
            ours.generate_until(asked("generate_until", [("The", options)]))
    with pytest.raises(ValueError, match="1 to 64 tokens"):
        ours.loglikelihood(asked("loglikelihood", [("The", LONG)]))
    with pytest.raises(ValueError, match="needs a tokenizer"):
        EngineLM(Engine(ours.engine.model))

"""Output held to a schema, an expression or a grammar: against jsonschema, re, and the language written out in full."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import neox
from neox import cli
from neox.generate import Engine, Sampler, Sampling, naive_generate
from neox.generate.grammar import Constraint, check
from neox.tokenizer import Tokenizer
from tests.generate.conftest import random_model, small_tokenizer

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("llguidance")

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "20B_tokenizer.json"


@pytest.fixture(scope="module", params=["trained", "20B"])
def tokenizer(request) -> Tokenizer:
    if request.param == "trained":
        return small_tokenizer()
    if not REAL.exists():
        pytest.skip("needs ../shared/data/20B_tokenizer.json")
    return Tokenizer.from_file(REAL)


@pytest.fixture(scope="module")
def engine(tokenizer) -> Engine:
    """A random model with room for long outputs, and padding rows."""
    rows = tokenizer.vocab_size + 50
    return Engine(random_model(vocab_size=rows, hidden_size=16, max_position_embeddings=1024), tokenizer)


# --- whatever the model, what ends is whole ---------------------------------------------------------------------------

texts = st.text('aé東🙂" \\\n', max_size=6)
names = st.sampled_from(["a", "é", "name", "東京", "x y", 'q"'])
leaves = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.tuples(st.integers(-50, 50), st.integers(0, 200)).map(
        lambda low: {"type": "integer", "minimum": low[0], "maximum": low[0] + low[1]}
    ),
    st.tuples(st.integers(0, 3), st.integers(0, 3)).map(
        lambda low: {"type": "string", "minLength": low[0], "maxLength": low[0] + low[1]}
    ),
    st.just({"type": "string", "pattern": "^[a-c]{2}-[0-9]é?$"}),
    st.lists(texts, min_size=1, max_size=4, unique=True).map(lambda values: {"enum": values}),
    texts.map(lambda value: {"const": value}),
)


def objects(schemas):
    def schema(properties: dict, required: list[bool]) -> dict:
        wanted = [name for name, one in zip(properties, required, strict=False) if one]
        return {"type": "object", "properties": properties, "required": wanted, "additionalProperties": False}

    return st.builds(schema, st.dictionaries(names, schemas, max_size=3), st.lists(st.booleans(), min_size=3))


def arrays(schemas):
    return schemas.map(lambda items: {"type": "array", "items": items, "maxItems": 2})


schemas = st.recursive(
    leaves,
    lambda inner: objects(inner) | arrays(inner) | st.lists(inner, min_size=1, max_size=2).map(lambda s: {"anyOf": s}),
    max_leaves=5,
)
samplings = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.5, 2.0]),
        "top_k": st.integers(1, 50),
        "top_p": st.floats(0.1, 1),
        "min_p": st.floats(0, 1),
        "repetition_penalty": st.floats(0.5, 2),
        "frequency_penalty": st.floats(0, 2),
    },
)


@settings(max_examples=40, deadline=None)
@given(schema=schemas, seed=st.integers(0, 10_000), options=samplings)
@example(schema={"enum": ["é", "東京", "🙂🙃"]}, seed=1, options={})
def test_json_parses_and_validates(engine, schema, seed, options):
    done = engine.generate("the", Sampling(max_tokens=1000, seed=seed, json_schema=schema, **options))[0]
    assert done.finish_reason == "eod"
    jsonschema.validate(json.loads(done.text), schema)
    specials = set(engine.tokenizer.special_tokens.values())
    assert not specials & set(done.tokens)
    assert max(done.tokens) < engine.tokenizer.vocab_size


# No \d and \w: they are Unicode's in both, but its tables are newer in the one than in the other.
pieces = st.sampled_from(["a", "bc", "é", "東", "🙂", "[0-9]", "[a-cé]", "[^a-z]", r"\.", " ", "/", '"'])
patterns = st.recursive(
    pieces,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda two: f"({two[0]}|{two[1]})"),
        st.tuples(inner, st.sampled_from(["?", "{2}", "{1,3}"])).map(lambda two: f"({two[0]}){two[1]}"),
    ),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(pattern=patterns, seed=st.integers(0, 10_000), options=samplings)
def test_what_a_regex_gives_matches_it_whole(engine, pattern, seed, options):
    done = engine.generate("the", Sampling(max_tokens=1000, seed=seed, regex=pattern, **options))[0]
    assert done.finish_reason == "eod"
    assert re.fullmatch(pattern, done.text)


@pytest.mark.parametrize("seed", range(8))
def test_a_recursive_grammar_is_followed_as_far_as_it_goes(engine, seed):
    """Brackets are counted: at the end all are closed, and where max_tokens cut it none is closed too often."""
    nested = 'start: "(" start ")" | "[" start* "]" | LEAF\nLEAF: /[a-é]{1,3}/'
    done = engine.generate("", Sampling(max_tokens=60, seed=seed, grammar=nested))[0]
    open_ones = []
    for character in done.text:
        if character in "([":
            open_ones.append(character)
        elif character in ")]":
            assert open_ones.pop() + character in ("()", "[]")
        else:
            assert re.fullmatch("[a-é]|\ufffd", character)
    assert done.finish_reason in ("eod", "length")
    assert (done.finish_reason == "eod") <= (not open_ones)


# --- exactly the tokens that may follow -------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(language=st.lists(st.text("abé東🙂 <|>", max_size=4), min_size=1, max_size=4), data=st.data())
@example(language=["<|padding|>", ""], data=None)
def test_allowed_are_the_tokens_that_some_text_of_the_language_goes_on_with(tokenizer, language, data):
    """At every step down to the end, over the whole vocabulary: bytes that begin a character as well as words.

    Where all texts go on alike the library insists on one spelling of what they share.
    """
    vocabulary = tokenizer.bytes_of_tokens
    specials = set(tokenizer.special_tokens.values())
    goals = [text.encode() for text in language]
    pattern = "|".join(f"({re.escape(text)})" for text in language)
    constraint = Constraint("regex", pattern, tokenizer)
    so_far = b""
    while True:
        rest = [goal[len(so_far) :] for goal in goals if goal.startswith(so_far)]
        expected = {
            id
            for id, text in enumerate(vocabulary)
            if text and id not in specials and any(one.startswith(text) for one in rest)
        }
        ending = {tokenizer.eod_id} if b"" in rest else set()
        found = set(constraint.allowed().nonzero().flatten().tolist())
        assert found <= expected | ending
        assert found & ending == ending
        if len({one[:1] for one in rest}) > 1:
            assert found == expected | ending
        if not expected:
            return
        choices = sorted(found - ending)
        token = data.draw(st.sampled_from(choices)) if data else choices[0]
        constraint.take(token)
        so_far += vocabulary[token]


def test_masking_comes_before_the_filters_and_leaves_the_proportions(tokenizer):
    """Frequencies of allowed tokens follow the softmax over these alone."""
    (x, y), size = (tokenizer.encode(letter)[0] for letter in "xy"), tokenizer.vocab_size
    logits = torch.full((size,), 5.0)
    logits[x], logits[y] = -1.0, 1.0
    found = Sampler(Sampling(regex="x|y"), size, tokenizer=tokenizer).probabilities(logits)
    assert found.nonzero().flatten().tolist() == sorted([x, y])
    torch.testing.assert_close(found[[x, y]], torch.tensor([-1.0, 1.0]).softmax(-1))
    # The likeliest of all tokens would leave nothing to draw, had it been looked for first.
    greedy = Sampler(Sampling(regex="x|y", top_k=1, min_p=1.0), size, tokenizer=tokenizer).probabilities(logits)
    assert greedy.nonzero().flatten().tolist() == [y]


def test_the_engine_gives_each_row_its_own_grammar(engine):
    asked = [
        Sampling(max_tokens=50, seed=1, regex="[ab]{5}"),
        Sampling(max_tokens=9, seed=2),
        Sampling(regex="(no|yes)+"),
    ]
    for sampling, done in zip(asked, engine.generate(["the", "quick", ""], asked), strict=True):
        alone = engine.generate(["the", "quick", ""][asked.index(sampling)], sampling)[0]
        assert done == alone
    tokens = engine.encode("the")
    oracle = naive_generate(
        engine.model, tokens, asked[0], engine.num_real_tokens, engine.eod, tokenizer=engine.tokenizer
    )
    assert engine.generate("the", asked[0])[0].tokens == oracle


# --- what is wrong is said in one line --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "source", "message"),
    [
        ("json_schema", '{"type": "strin"}', "Invalid type: strin (at #)"),
        (
            "json_schema",
            '{"$defs": {"x": {"items": {"type": "intege"}}}, "properties": {"a": {"$ref": "#/$defs/x"}}}',
            "Invalid type: intege (at #/$defs/x/items)",
        ),
        ("json_schema", '{"anyOf": [{}, {"not": {}}]}', 'Unimplemented keys: ["not"] (at #/anyOf/1)'),
        ("json_schema", '{"type":\n "string",}', "not JSON, line 2 column 11: "),
        ("json_schema", '{"a":' * 100_000, "not JSON: nested too deeply"),
        ("json_schema", '{"pattern": "(", "type": "string"}', "regex parse error: unclosed group (at #)"),
        ("regex", "a/b|(", "character 5: unclosed group"),
        ("regex", "(?=a)", "character 1: look-around"),
        ("regex", r"\bfoo", "lookarounds not supported yet"),
        ("grammar", 'start: "a" |\n  b c', "line 2, column 5: Expected token ':'"),
        ("grammar", "start: /a(/", "line 1, column 8: invalid regex"),
        ("grammar", "", "Empty grammar"),
    ],
)
def test_a_fault_is_named_with_its_place(option, source, message):
    with pytest.raises(ValueError, match=re.escape(f"generate.{option}: {message}")) as caught:
        Sampling(**{option: source})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ['start: "a" <|padding|>', "start: <|endoftext|>"])
def test_a_grammar_cannot_name_special_tokens(tokenizer, source):
    with pytest.raises(ValueError, match=r"generate.grammar: line 1, column \d+: unknown special token") as caught:
        Constraint("grammar", source, tokenizer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("option", "source"),
    [("grammar", "start: <[1]>"), ("grammar", "start: <[0]>"), ("grammar", "start: start"), ("regex", r"[^\s\S]")],
)
def test_what_nothing_can_be_written_by_is_refused_at_once(tokenizer, option, source):
    with pytest.raises(ValueError, match=f"generate.{option}: no token may come next: it has no end, or names special"):
        Constraint(option, source, tokenizer)


def test_what_goes_beyond_the_librarys_limits_is_one_line(tokenizer):
    constraint = Constraint("regex", "a{1000000000}", tokenizer)
    (a,) = tokenizer.encode("a")
    with pytest.raises(ValueError, match="^generate.regex: lexer error: too many expressions constructed$"):
        constraint.take(a)


def test_a_special_token_by_number_is_refused_when_it_is_next(tokenizer):
    constraint = Constraint("grammar", 'start: "a" <[1]> | "a" "b"', tokenizer)
    (a,), (b,) = tokenizer.encode("a"), tokenizer.encode("b")
    constraint.take(a)
    assert constraint.allowed().nonzero().flatten().tolist() == [b]
    constraint = Constraint("grammar", 'start: "a" <[0]>', tokenizer)
    constraint.take(a)
    with pytest.raises(ValueError, match="generate.grammar: no token may come next"):
        constraint.allowed()


def test_one_of_them_and_to_its_end():
    with pytest.raises(ValueError, match="generate.json_schema and generate.regex: give one of them"):
        Sampling(json_schema={}, regex="a")
    with pytest.raises(ValueError, match="generate.stop_at_eod = false: what generate.regex asks for ends there"):
        Sampling(regex="a", stop_at_eod=False)


def test_without_a_tokenizer_or_an_end_there_is_no_grammar(model):
    with pytest.raises(ValueError, match="generate.regex needs a tokenizer: this model was loaded without one"):
        Engine(model).events([[1]], Sampling(regex="a"))
    bare = json.loads(small_tokenizer()._text)
    bare["added_tokens"] = []
    bare["model"]["vocab"] = {key.replace("endoftext", "else"): id for key, id in bare["model"]["vocab"].items()}
    with pytest.raises(
        ValueError, match="generate.regex needs an end-of-document token, which this tokenizer does not"
    ):
        Constraint("regex", "a", Tokenizer.from_str(json.dumps(bare)))


def test_a_missing_library_is_named(monkeypatch):
    check.cache_clear()
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(
        ValueError, match=r"generate.regex: needs the package llguidance .*: pip install 'neox-lm\[grammar\]'"
    ):
        Sampling(regex="a")


# --- the command line -------------------------------------------------------------------------------------------------


def test_the_guides_examples_work_as_printed(engine, tmp_path, monkeypatch, capsys):
    guide = (Path(__file__).resolve().parents[2] / "docs" / "generation.md").read_text()
    section = guide.partition("## Constrained output\n")[2].partition("\n## ")[0]
    blocks = dict(re.findall(r"```(\w*)\n(.*?)```", section, re.DOTALL))
    monkeypatch.chdir(tmp_path)
    neox.save(engine.model, "hf", engine.tokenizer)
    Path("person.json").write_text(blocks["json"])
    Path("sum.lark").write_text(blocks["lark"])
    outputs = []
    for line in blocks[""].splitlines():
        words = ["hf" if word == "MODEL" else word for word in shlex.split(line)]
        assert cli.main(words[1:]) == 0
        prompt = next(word for word in words if word.startswith("prompt=")).removeprefix("prompt=")
        outputs.append(capsys.readouterr().out.removeprefix(prompt).removesuffix("\n"))
    person, verdict, date, total = outputs
    jsonschema.validate(json.loads(person), json.loads(blocks["json"]))
    assert json.loads(verdict) in ("good", "bad", "mixed")
    assert re.fullmatch("(19|20)[0-9]{2}-[01][0-9]-[0-3][0-9]", date)
    assert re.fullmatch(r"[1-9]\d{0,2}( \+ [1-9]\d{0,2}){1,3}", total)


# --- options ----------------------------------------------------------------------------------------------------------


def test_schemas_come_as_text_or_file_and_grammars_as_files(tmp_path):
    from neox.config import GenerateConfig, load_config

    schema = {"enum": ["é", 1]}
    (tmp_path / "s.json").write_text(json.dumps(schema))
    (tmp_path / "g.lark").write_text('start: "é" | x')
    for given_as in (json.dumps(schema), str(tmp_path / "s.json")):
        config = load_config(overrides=[f"json_schema={given_as}"]).generate
        assert Sampling.of(config) == Sampling(json_schema=schema)
    for pattern in ("[a-c]", "[1]", "12", "{2}a", "a=b"):
        assert load_config(overrides=[f"regex={pattern}"]).generate.regex == pattern
    with pytest.raises(ValueError, match=r'grammar: line 1, column 8: unknown name: "x" \(.*g.lark\)'):
        Sampling.of(GenerateConfig(grammar=str(tmp_path / "g.lark")))
    with pytest.raises(ValueError, match="generate.grammar: absent.lark: No such file or directory; give a file$"):
        Sampling.of(GenerateConfig(grammar="absent.lark"))
    with pytest.raises(ValueError, match=r"absent.json: No such file.*; give a file, or write the schema itself"):
        Sampling.of(GenerateConfig(json_schema="absent.json"))
    (tmp_path / "s.json").write_bytes(b"{\xff")
    with pytest.raises(ValueError, match=r"s.json: not text \(no UTF-8 at byte 1\)"):
        Sampling.of(GenerateConfig(json_schema=str(tmp_path / "s.json")))

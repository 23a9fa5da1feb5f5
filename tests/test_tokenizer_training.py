"""What can be chosen when a tokenizer is trained, and special tokens that are text: ten tokenizers, two readers."""

import json
import re
import unicodedata
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

import neox.tokenizer as module
from neox import cli
from neox.config import TokenizerConfig, load_config
from neox.tokenizer import Tokenizer, train_bpe
from tests.test_tokenizer import adversarial, corpus, real, trained  # noqa: F401  (two are fixtures)

CHAT = ("<|im_start|>", "<|im_end|>", "[TOOL]")
TEN = (
    {},
    {"vocab_size": 281},
    {"vocab_size": 560, "digits": "single"},
    {"space_runs": 0},
    {"space_runs": 3, "digits": "single", "normalizer": "none"},
    {"normalizer": "none"},
    {"special_tokens": CHAT},
    {"special_tokens": CHAT, "digits": "single"},
    {"special_tokens": ("<s>",), "space_runs": 1, "normalizer": "none"},
    {"special_tokens": CHAT[::-1], "space_runs": 60, "vocab_size": 900},
)
EXAMPLES = 10  # for each of the ten
numbers = st.sampled_from(
    ["2024", "3.14159", "a1b22", " 7 8", "\u0663\u0664", "\u00bd\u00b2", "\u2167", "1\n2\n34", "x\n9\nb"]
)
spelled = st.sampled_from(["<|endoftext|>", "<|padding|>", *CHAT, "<s>", "<|endoftext|", "|>"])
mixed = st.lists(st.one_of(adversarial, numbers)).map("".join)
dangerous = st.lists(st.one_of(adversarial, numbers, spelled)).map("".join)


def text_with_digits() -> list[str]:
    return [
        *corpus(documents=120),
        *(f"in {year} it was {year * 7919 % 1000}  or {year}%" for year in range(1900, 2030)),
    ]


class Trained:
    """One of the ten: as trained, as its file is read by us, and as transformers reads it."""

    def __init__(self, options: dict, folder: Path) -> None:
        from transformers import PreTrainedTokenizerFast

        self.options = TokenizerConfig(**{"vocab_size": 500, **options})
        train_bpe(text_with_digits(), progress=False, **self.options.training).save(folder)
        self.tokenizer = Tokenizer.from_file(folder)
        self.theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))

    def expected(self, text: str) -> str:
        return text if self.options.normalizer == "none" else unicodedata.normalize("NFC", text)


@pytest.fixture(scope="module", params=TEN, ids=str)
def one(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(request.param, tmp_path_factory.mktemp("tokenizer"))


# --- ten tokenizers --------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=EXAMPLES)
@given(text=dangerous)
def test_transformers_gives_the_same_ids(one: Trained, text: str) -> None:
    assert one.tokenizer.encode(text) == one.theirs.encode(text, add_special_tokens=False)
    blind = one.theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert one.tokenizer.encode(text, specials=False) == blind


@settings(deadline=None, max_examples=EXAMPLES)
@given(text=mixed)
def test_text_comes_back(one: Trained, text: str) -> None:
    ids = one.tokenizer.encode(text)
    assert one.tokenizer.decode(ids) == one.expected(text) == one.theirs.decode(ids, clean_up_tokenization_spaces=False)


@settings(deadline=None, max_examples=EXAMPLES)
@given(text=dangerous)
def test_no_text_can_hold_a_special_token(one: Trained, text: str) -> None:
    ids = one.tokenizer.encode(text, specials=False)
    assert not set(ids) & set(one.tokenizer.special_tokens.values())
    assert one.tokenizer.decode(ids) == one.expected(text) == one.tokenizer.decode(ids, skip_special=True)
    assert one.tokenizer.encode_batch([text, "", text], specials=False) == [ids, [], ids]


@settings(deadline=None, max_examples=EXAMPLES)
@given(text=dangerous, specials=st.booleans())
def test_a_long_text_is_cut_without_a_trace(one: Trained, text: str, specials: bool) -> None:
    whole = one.theirs.encode(text, add_special_tokens=False, split_special_tokens=not specials)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE_CHARACTERS", 3)
        assert one.tokenizer.encode(text, specials) == whole
        pieces = list(one.tokenizer.pieces(text))
    assert "".join(pieces) == text
    assert one.tokenizer._cuttable
    assert "".join(map(one.expected, pieces)) == one.expected(text)


def test_ids_stand_where_the_description_says(one: Trained) -> None:
    tokenizer, options = one.tokenizer, one.options
    specials = ["<|endoftext|>", "<|padding|>", *options.special_tokens]
    assert tokenizer.special_tokens == {token: id for id, token in enumerate(specials)}
    assert [tokenizer.token_bytes(id).decode() for id in range(len(specials))] == specials
    first = len(specials)
    assert len({tokenizer.token_bytes(id) for id in range(first, first + 256)}) == 256
    runs = range(options.space_runs, 1, -1)
    assert [tokenizer.token_bytes(tokenizer.vocab_size - len(runs) + i) for i in range(len(runs))] == [
        b" " * length for length in runs
    ]
    assert tokenizer.vocab_size == options.vocab_size
    assert len(json.loads(tokenizer._text)["added_tokens"]) == len(specials) + len(runs)


def test_spaces_are_taken_longest_first(one: Trained) -> None:
    longest, size = one.options.space_runs, one.tokenizer.vocab_size
    for length in range(70):
        ids = one.tokenizer.encode("a" + " " * length + "b")
        # Runs stand at the end of the vocabulary, the shortest, of two spaces, last.
        runs = [size - id + 1 for id in ids if id > size - longest]
        expected = [longest] * (length // longest) + [length % longest] if longest > 1 else []
        assert runs == [run for run in expected if run > 1]


# --- one option at a time --------------------------------------------------------------------------------------------


def numeric(character: str) -> bool:
    return unicodedata.category(character).startswith("N")


@settings(deadline=None, max_examples=50)
@given(text=mixed.map(lambda text: unicodedata.normalize("NFC", text)))
def test_digits_stand_alone(single_digits: Tokenizer, text: str) -> None:
    parts = re.split("(" + "|".join(map(re.escape, {c for c in text if numeric(c)} or {"\x00"})) + ")", text)
    assert single_digits.encode(text) == [id for part in parts for id in single_digits.encode(part)]
    assert len(single_digits.encode("0123456789" * 3)) == 30


@pytest.fixture(scope="module")
def single_digits() -> Tokenizer:
    return train_bpe(text_with_digits(), 600, progress=False, digits="single")


def test_joined_digits_are_learned_and_single_ones_are_not(single_digits: Tokenizer) -> None:
    def longest(tokenizer: Tokenizer) -> int:
        texts = (tokenizer.token_bytes(id).decode("utf-8", "replace") for id in range(tokenizer.vocab_size))
        return max(sum(map(numeric, text)) for text in texts)

    assert longest(train_bpe(text_with_digits(), 600, progress=False)) > 1
    assert longest(single_digits) == 1


@pytest.mark.parametrize("pre_tokenizer", ["Digits alone", "Whitespace first", "prefix space"])
def test_other_ways_of_splitting_are_not_cut(pre_tokenizer: str) -> None:
    made = json.loads(train_bpe(["a1"], 300, progress=False, digits="single")._text)
    steps = made["pre_tokenizer"]["pretokenizers"]
    if pre_tokenizer == "Digits alone":
        del steps[1]
    elif pre_tokenizer == "Whitespace first":
        steps[0] = {"type": "Whitespace"}
    else:
        steps[1]["add_prefix_space"] = True
    assert not Tokenizer.from_str(json.dumps(made))._cuttable


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["<|endoftext|>"], "'<|endoftext|>' is there already"),
        (["<a>", "<a>"], "'<a>' is there already"),
        (["the"], "'the' could be mistaken for text; write it as <|name|>"),
        (["<|>"], "'<|>' could be mistaken"),
        (["<a b>"], "'<a b>' could be mistaken"),
        (["<é1>"], "'<é1>' could be mistaken"),
        ([""], "'' could be mistaken"),
        (["'s"], '"\'s" could be mistaken'),
    ],
)
def test_special_tokens_that_cannot_be(tokens: list[str], message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(f"tokenizer.special_tokens: {message}")):
        train_bpe(["text"], 400, progress=False, special_tokens=tokens)


@settings(deadline=None, max_examples=100)
@given(token=st.from_regex(module.SPECIAL, fullmatch=True), around=st.tuples(adversarial, adversarial))
def test_no_merge_spells_a_special_token(token: str, around: tuple[str, str]) -> None:
    """Whatever stands around it, the pre-tokenizer cuts it, so that BPE never sees it whole."""
    split = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert all(token not in piece for piece, _ in split.pre_tokenize_str(token.join(around)))


def test_a_vocabulary_too_small_for_its_parts() -> None:
    with pytest.raises(
        ValueError, match=r"vocab_size = 261 .* 256 bytes, 3 special tokens and 3 runs .* at least 262$"
    ):
        train_bpe(["a"], 261, progress=False, special_tokens=["<s>"], space_runs=4)
    assert train_bpe(["a"], 262, progress=False, special_tokens=["<s>"], space_runs=4).vocab_size == 262


# --- special tokens as text ------------------------------------------------------------------------------------------


def test_the_published_tokenizer_spells_its_special_tokens_out(real: Tokenizer) -> None:  # noqa: F811
    ids = real.encode("<|endoftext|>hi", specials=False)
    assert (ids[-1], 0 in ids, real.decode(ids)) == (5801, False, "<|endoftext|>hi")
    assert real.encode("<|endoftext|>hi") == [0, 5801]
    assert real.special_tokens == {"<|endoftext|>": 0, "<|padding|>": 1}


def test_a_word_level_tokenizer_cannot_spell_them_out() -> None:
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[END]": 0, "[UNK]": 1}, unk_token="[UNK]"))
    inner.add_special_tokens(["[END]"])
    tokenizer = Tokenizer.from_str(inner.to_str())
    assert tokenizer.encode("[END]") == [0]
    with pytest.raises(ValueError, match=r"no ids for '\[END\]' but the special token's"):
        tokenizer.encode("[END]", specials=False)


# --- rows of the model beyond the tokenizer --------------------------------------------------------------------------


def test_the_vocabulary_is_padded_to_a_multiple_of_128(trained: Tokenizer) -> None:  # noqa: F811
    """Padding rows are never sampled: tests/generate/test_options.py."""
    assert (trained.vocab_size, trained.padded_vocab_size()) == (400, 512)


# --- the options reach the training ----------------------------------------------------------------------------------


def test_prepare_trains_as_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("\n".join(text_with_digits()), encoding="utf-8")
    options = ["vocab_size=400", "digits=single", "space_runs=4", "normalizer=none", 'special_tokens=["<s>", "[B]"]']
    out = tmp_path / "out"
    assert cli.main(["prepare", str(tmp_path / "a.txt"), f"out={out}", *options]) == 0
    made = Tokenizer.from_file(f"{out}-tokenizer.json")
    section = load_config(overrides=[f"tokenizer.{option}" for option in options]).tokenizer
    assert section.special_tokens == ("<s>", "[B]")
    text = (tmp_path / "a.txt").read_text(encoding="utf-8")
    assert made.sha256 == train_bpe([text], progress=False, **section.training).sha256
    assert made.sha256 != train_bpe([text], 400, progress=False).sha256
    capsys.readouterr()
    used = [f"tokenizer={out}-tokenizer.json", "digits=single"]
    assert cli.main(["prepare", str(tmp_path / "a.txt"), f"out={out}2", *used]) == 2
    assert "give tokenizer= to use one or digits= to train one, not both" in capsys.readouterr().err

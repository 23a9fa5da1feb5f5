"""The fast encoder gives the reference's ids, which decode to NFC of the text; where it cannot, it is not used."""

import json
import re
import unicodedata
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from neox.corpus import prepare
from neox.corpus.encode import HARD, SAMPLED, Difference, Encoder
from neox.data import TokenFile
from neox.tokenizer import Tokenizer, train_bpe

pytest.importorskip("gigatoken", reason="the data extra is not installed: pip install 'neox-lm[data]'")
ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ROOT.parent / "shared" / "data" / "20B_tokenizer.json"
PIECES = ["<|endoftext|>", "<|padding|>", "<|endof", "|>", " " * 3, " " * 25, "\n\n", "\r\n", "\t", "'s", "'LL"]
PIECES += ["\u0338", "\u0301", "\u212a"]
# Not the unassigned ones: a newer Unicode than Python's may compose them.
LETTERS = st.characters(exclude_categories=("Cs", "Cn"))
# Words of one script, marks that compose, spellings of special tokens, runs: what a tokenizer is likely to get wrong.
TEXTS = st.lists(
    st.one_of(
        st.text(LETTERS, max_size=12),
        st.text(st.characters(min_codepoint=0x300, max_codepoint=0x36F), max_size=3),
        st.text(st.characters(min_codepoint=0x1100, max_codepoint=0x11FF), max_size=4),
        st.text(st.characters(min_codepoint=0x900, max_codepoint=0x97F), max_size=4),
        st.text("aeinst ETAOI019.,'\n ", max_size=30),
        st.sampled_from(PIECES),
    ),
    max_size=12,
).map("".join)


@pytest.fixture(scope="module", params=["published", "trained"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "trained":
        return train_bpe([*HARD, "the cat sat on the mat "] * 3, 600, progress=False)
    if PUBLISHED.exists():
        return Tokenizer.from_file(PUBLISHED)
    pytest.skip("needs ../shared/data/20B_tokenizer.json")


@cache
def encoder_of(tokenizer: Tokenizer, specials: bool) -> Encoder:
    return Encoder(tokenizer, specials=specials)


def ids_of(encoder: Encoder, texts: list[str]) -> list[list[int]]:
    found: list[list[int]] = [[]]
    for part in encoder.encode(texts):
        found[-1] += part.ids.tolist()
        if part.last:
            found.append([])
    assert found.pop() == []
    return found


@settings(deadline=None, max_examples=150)
@given(texts=st.lists(TEXTS.filter(bool), min_size=1, max_size=6), specials=st.booleans())
def test_gigatoken_ids_are_those_of_the_reference(tokenizer: Tokenizer, texts: list[str], specials: bool) -> None:
    encoder = encoder_of(tokenizer, specials)
    assert encoder.backend == "gigatoken"
    found = ids_of(encoder, texts)
    assert found == [tokenizer.encode(text, specials) for text in texts]
    # A special token is taken out before the text is composed, and no mark composes over it.
    if not any(special in text for special in tokenizer.special_tokens for text in texts):
        assert [tokenizer.decode(ids) for ids in found] == [nfc(text) for text in texts]


def nfc(text: str) -> str:
    """By Python, where its Unicode and that of `tokenizers` agree: marks added after Unicode 9 have no class there."""
    return NFC.normalize_str(text) if YOUNG.search(text) else unicodedata.normalize("NFC", text)


NFC = tokenizers.normalizers.NFC()
YOUNG = re.compile(
    "[\u07fd\u0897-\u089f\u08ca-\u08d3\u09fe\u0c3c\u0d3b\u0d3c\u0eba\u1715\u1abf-\u1aeb\u1df6-\u1dfa\ua82c"
    "\U00010d00-\U00010fff\U00011000-\U00011fff\U00016000-\U00016fff\U0001e000-\U0001efff]"
)


def real_text() -> list[str]:
    """The project's own documents and sources, and a line of every script that Unicode names."""
    files = sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("neox/*/*.py"), *ROOT.glob("tests/*/*.py")])
    names = ((chr(code), unicodedata.name(chr(code), "")) for code in range(0x20, 0x30000))
    letters = [(name.partition(" ")[0], char) for char, name in names if name]
    scripts = [" ".join(char for _, char in group) for _, group in groupby(letters, key=lambda letter: letter[0])]
    return [file.read_text(encoding="utf-8") for file in files] + [
        unicodedata.normalize("NFD", "\n".join(scripts[n : n + 200])) for n in range(0, len(scripts), 200) if n < 9000
    ]


def test_prepared_text_decodes_to_its_composed_form(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Documents of this project and of all scripts, through files: by either library the same, and NFC of the input."""
    texts = [text for text in real_text() if text and "<|" not in text]
    assert len(texts) > 60
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for backend in ("gigatoken", "tokenizers"):
        prepare(source, tmp_path / backend, tokenizer, progress=False, backend=backend)
    file, other = TokenFile(tmp_path / "gigatoken"), TokenFile(tmp_path / "tokenizers")
    assert np.array_equal(file.tokens, other.tokens)
    assert np.array_equal(file.sizes, other.sizes)
    decoded = [tokenizer.decode(file.document(n).tolist()) for n in range(len(file))]
    assert decoded == [nfc(text) + "<|endoftext|>" for text in texts]
    assert sum(not YOUNG.search(text) for text in texts) > 60


def test_a_long_text_comes_in_chunks(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "the cat sat\non the mat\n\ne\u0301\n" * 300
    monkeypatch.setattr("neox.tokenizer.PIECE_CHARACTERS", 50)
    for backend in ("gigatoken", "tokenizers"):
        parts = list(Encoder(tokenizer, backend).encode([text]))
        assert len(parts) > 100 if backend == "gigatoken" else parts
        assert sum(part.characters for part in parts) == len(text)
        assert [part.last for part in parts] == [False] * (len(parts) - 1) + [True]
        assert np.concatenate([part.ids for part in parts]).tolist() == tokenizer.encode(text)


@pytest.mark.parametrize("wrong", [0, SAMPLED, 2 * SAMPLED])
def test_gigatoken_difference_in_a_sample_is_an_error(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, wrong: int
) -> None:
    """A library that goes wrong at one text, after it was right in all that was tried before."""
    encoder = Encoder(tokenizer, "gigatoken")
    fast = encoder._fast
    assert fast is not None
    encoder._fast = lambda raw: fast(raw)[1:] if raw == b"the wrong one" else fast(raw)
    texts = ["the cat"] * 2000
    texts[wrong] = "the wrong one"
    with pytest.raises(Difference) as caught:
        ids_of(encoder, texts)
    assert caught.value.document == wrong
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": ""}\n' + "".join(json.dumps({"text": text}) + "\n" for text in texts))
    encoder._seen = 0
    monkeypatch.setattr("neox.corpus.worker.Encoder", lambda *_: encoder)
    with pytest.raises(ValueError) as said:
        prepare(source, tmp_path / "out", tokenizer, progress=False)
    assert str(said.value) == (
        f"{source}: document {wrong + 1} from there: gigatoken and tokenizers give different ids for a text that "
        "begins 'the wrong one'; what is done stays: go on with data.backend=tokenizers"
    )
    assert list(tmp_path.iterdir()) == [source]


def test_gigatoken_is_not_used_for_a_tokenizer_that_it_reads_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = train_bpe(["the cat sat on the mat"] * 9, 300, progress=False)
    file = json.loads(tokenizer.to_json())
    vocabulary = file["model"]["vocab"]  # two ids that the fast library is told the wrong way round
    vocabulary["t"], vocabulary["c"] = vocabulary["c"], vocabulary["t"]
    monkeypatch.setattr(Tokenizer, "to_json", lambda self: json.dumps(file))
    assert Encoder(tokenizer).backend == "tokenizers"
    assert "other ids than `tokenizers`" in Encoder(tokenizer).why
    with pytest.raises(ValueError, match="data.backend=gigatoken: it gives other ids .*; take data.backend=tokenizers"):
        Encoder(tokenizer, "gigatoken")
    monkeypatch.setattr(Tokenizer, "to_json", lambda self: "{}")
    with pytest.raises(ValueError, match="data.backend=gigatoken: it cannot read this tokenizer"):
        Encoder(tokenizer, "gigatoken")


def test_without_gigatoken_the_reference_encodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gigatoken", None)
    tokenizer = train_bpe(["the cat sat on the mat"] * 9, 300, progress=False)
    encoder = Encoder(tokenizer)
    assert encoder.backend == "tokenizers"
    assert "pip install 'neox-lm[data]'" in encoder.why
    (tmp_path / "a.txt").write_text("the cat")
    assert prepare(tmp_path / "a.txt", tmp_path / "out", tokenizer, progress=False).documents == 1
    with pytest.raises(ValueError, match="data.backend=gigatoken: fast encoding: needs the package gigatoken"):
        prepare(tmp_path / "a.txt", tmp_path / "two", tokenizer, progress=False, backend="gigatoken")


@cache
def shaped(**shape: Any) -> Tokenizer:
    return train_bpe([*HARD, "the cat sat on 1 mat, 23 dogs"] * 3, 450, progress=False, **shape)


@pytest.mark.parametrize(
    "shape", [{"digits": "single"}, {"normalizer": "none"}, {"space_runs": 0}, {"special_tokens": ("<|K|>", "[;0]")}]
)
@settings(deadline=None, max_examples=60)
@given(text=TEXTS.filter(bool))
def test_gigatoken_with_tokenizers_of_every_shape(shape: dict, text: str) -> None:
    """Whichever library is chosen, the ids are the reference's."""
    tokenizer = shaped(**shape)
    for specials in (True, False):
        encoder = encoder_of(tokenizer, specials)
        for given_text in (text, text.replace("K", "\u212a"), text + "<|\u212a|> [;0] [\u037e0] <|K|>\u0338"):
            assert ids_of(encoder, [given_text]) == [tokenizer.encode(given_text, specials)]


@pytest.mark.slow
def test_gigatoken_every_character_between_others(tokenizer: Tokenizer) -> None:
    """All of Unicode, each character among letters, digits, spaces and marks of each side."""
    encoder = encoder_of(tokenizer, True)
    codes = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    for context in ("{}", "a{}b 1{}1", " {} ", "e{}\u0323", "\u0301{}\u0334"):
        for start in range(0, len(codes), 64):
            text = "\n".join(context.replace("{}", chr(code)) for code in codes[start : start + 64])
            assert ids_of(encoder, [text]) == [tokenizer.encode(text)], context

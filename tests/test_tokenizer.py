"""The tokenizer: published ids, NFC round trips, streaming, training."""

import codecs
import hashlib
import json
import random
import re
import subprocess
import sys
import unicodedata
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

import neox.tokenizer as module
from neox.tokenizer import StreamDecoder, Tokenizer, train_bpe

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
REAL = DATA / "20B_tokenizer.json"

# Code points that Python's Unicode tables know: the library's are newer, and normalise newer characters too.
characters = st.characters(exclude_categories=("Cs", "Cn"))
scraps = st.sampled_from(
    [
        "e\u0301",
        "\u0301\u0323\u0301",
        "\u1100\u1161\u11a8",
        "\u212b",
        "👩\u200d👩\u200d👧\u200d👦",
        "🏳️\u200d🌈",
        "\x00",
        "\x1b[0m",
        "\x85\x80",
        "\u202eabc\u202c",
        "שלום עולם",
        "مرحبا",
        "नमस्ते",
        "한국어",
        "\ufeff",
        "\ufffd",
        "\U0010ffff",
        "\r\n",
        "\n\n\t",
        "don't we'll I'm",
    ]
)
spaces = st.integers(0, 90).map(lambda n: " " * n)
adversarial = st.lists(st.one_of(scraps, spaces, st.text(characters, max_size=8))).map("".join)


@pytest.fixture(scope="module")
def real() -> Tokenizer:
    if not REAL.exists():
        pytest.skip("needs ../shared/data/20B_tokenizer.json")
    return Tokenizer.from_file(REAL)


def corpus(seed: int = 0, documents: int = 300) -> list[str]:
    """Zipf-like word soup with indents, so that there are merges to learn."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdeéß中🙂", k=rng.randint(1, 6))) for _ in range(200)]
    weights = [1 / (rank + 1) for rank in range(len(words))]
    return [
        "\n".join(" " * rng.choice([0, 4, 8]) + " ".join(rng.choices(words, weights, k=9)) for _ in range(4))
        for _ in range(documents)
    ]


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_bpe(corpus(), 400, progress=False)


@pytest.fixture(scope="module", params=["real", "trained"])
def any_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello world", [12092, 1533]),
        (" Hello world", [24387, 1533]),
        ("Hello  world", [12092, 50276, 10186]),
        ("a" + " " * 24 + "b", [66, 50254, 67]),
        ("a" + " " * 25 + "b", [66, 50254, 270]),
        ("a" + " " * 30 + "b", [66, 50254, 50272, 67]),
        ("<|endoftext|>hi", [0, 5801]),
        ("e\u0301", [860]),
        ("", []),
    ],
)
def test_published_ids(real: Tokenizer, text: str, ids: list[int]) -> None:
    assert real.encode(text) == ids
    assert real.decode(ids) == unicodedata.normalize("NFC", text)


def test_published_sizes(real: Tokenizer) -> None:
    assert (real.vocab_size, real.eod_id) == (50277, 0)
    assert real.padded_vocab_size() == real.padded_vocab_size(128) == 50304
    assert (real.padded_vocab_size(256), real.padded_vocab_size(512)) == (50432, 50688)
    assert real.sha256 == "56ac4821e129d2c520fdaba60abd920fa852ada51b45c0dd52bbb6bd8c985ade"


@settings(deadline=None, max_examples=150)
@given(text=adversarial)
def test_round_trip_is_nfc(any_tokenizer: Tokenizer, text: str) -> None:
    ids = any_tokenizer.encode(text)
    assert any_tokenizer.decode(ids) == unicodedata.normalize("NFC", text)
    assert all(0 <= id < any_tokenizer.vocab_size for id in ids)


@settings(deadline=None, max_examples=50)
@given(texts=st.lists(adversarial, max_size=5))
def test_batch_equals_single_equals_the_library(trained: Tokenizer, texts: list[str]) -> None:
    library = tokenizers.Tokenizer.from_str(trained._text)
    expected = [library.encode(text, add_special_tokens=False).ids for text in texts]
    assert trained.encode_batch(texts) == expected == [trained.encode(text) for text in texts]


@settings(deadline=None, max_examples=150)
@given(text=st.lists(st.one_of(adversarial, st.sampled_from(["a\nb", "\n", "x'\n's", ".\n\n.", "\u0301\n\u0301"]))))
def test_long_texts_are_cut_without_a_trace(any_tokenizer: Tokenizer, text: list[str]) -> None:
    joined = "".join(text)
    expected = any_tokenizer._inner.encode(joined, add_special_tokens=False).ids
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE_CHARACTERS", 3)
        assert any_tokenizer.encode(joined) == expected


def test_a_long_text_is_cut(trained: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_CHARACTERS", 10)
    pieces = list(trained.pieces("0123456789 ab\ncd\n\nefghijklmnop\n  q\nr" * 2))
    assert "".join(pieces) == "0123456789 ab\ncd\n\nefghijklmnop\n  q\nr" * 2
    assert pieces[:2] == ["0123456789 ab\n", "cd\n\nefghijklmnop\n  q\n"]


@settings(deadline=None, max_examples=200)
@given(data=st.data(), skip_special=st.booleans())
def test_stream_equals_decode(any_tokenizer: Tokenizer, data: st.DataObject, skip_special: bool) -> None:
    tail = range(max(0, any_tokenizer.vocab_size - 25), any_tokenizer.vocab_size)
    # Single bytes (ids 2 to 257 or fewer) make broken UTF-8 of every kind.
    id = st.one_of(st.integers(0, 260), st.sampled_from(tail), st.integers(0, any_tokenizer.vocab_size - 1))
    ids = data.draw(st.one_of(st.lists(id), adversarial.map(any_tokenizer.encode)))
    stream = StreamDecoder(any_tokenizer, skip_special)
    parts = [stream.push(id) for id in ids] + [stream.finish()]
    assert "".join(parts) == any_tokenizer.decode(ids, skip_special)
    parts = [stream.push(id) for id in ids] + [stream.finish()]
    assert "".join(parts) == any_tokenizer.decode(ids, skip_special), "a finished stream starts anew"


@settings(deadline=None, max_examples=100)
@given(text=adversarial)
def test_stream_of_text_gives_whole_characters_as_soon_as_they_are_whole(trained: Tokenizer, text: str) -> None:
    ids = trained.encode(text)
    whole = trained.decode(ids)
    stream = StreamDecoder(trained)
    shown, raw = "", b""
    for id in ids:
        shown += stream.push(id)
        raw += trained.token_bytes(id)
        complete = next(raw[: len(raw) - cut] for cut in range(4) if _is_utf8(raw[: len(raw) - cut]))
        assert shown == complete.decode("utf-8")
        assert whole.startswith(shown)
    assert stream.finish() == ""


def _is_utf8(raw: bytes) -> bool:
    try:
        codecs.decode(raw, "utf-8")
    except UnicodeDecodeError:
        return False
    return True


def test_stream_never_shows_half_a_character(trained: Tokenizer) -> None:
    ids = [2 + _byte_rank(byte) for byte in "🙂".encode()]
    stream = StreamDecoder(trained)
    assert [stream.push(id) for id in ids] == ["", "", "", "🙂"]
    assert stream.finish() == ""
    assert [stream.push(id) for id in ids[:3]] == ["", "", ""]
    assert stream.finish() == trained.decode(ids[:3]) == "\ufffd"


def _byte_rank(byte: int) -> int:
    """Place of a byte in the sorted visible alphabet of GPT-2: visible Latin-1 first, then the hidden bytes."""
    visible = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255]
    return (visible + [b for b in range(256) if b not in visible]).index(byte)


def test_special_tokens(any_tokenizer: Tokenizer) -> None:
    ids = any_tokenizer.encode("a<|endoftext|>b<|padding|>  c")
    assert {0, 1} < set(ids)
    assert any_tokenizer.decode(ids) == "a<|endoftext|>b<|padding|>  c"
    assert any_tokenizer.decode(ids, skip_special=True) == "ab  c"


@pytest.mark.parametrize("id", [-1, 10**9, 2**70])
def test_unknown_ids(trained: Tokenizer, id: int) -> None:
    for call in (trained.decode, lambda ids: StreamDecoder(trained).push(ids[-1])):
        with pytest.raises(ValueError, match=rf"token id {id} .* 0 to 399"):
            call([5, id])


def test_padding_rows_of_the_model_are_no_tokens(trained: Tokenizer) -> None:
    assert trained.decode([399]) == "  "
    with pytest.raises(ValueError, match="token id 400 stands for no token"):
        trained.decode([400])


def test_added_tokens_of_any_letters_stream_as_they_decode(trained: Tokenizer) -> None:
    inner = tokenizers.Tokenizer.from_str(trained._text)
    # The first is spelt in the byte alphabet, where "é" is byte 0xE9; the others are not.
    inner.add_tokens(["é!", "中é", "e\u0301"])
    tokenizer = Tokenizer.from_str(inner.to_str())
    for ids in ([400], [401], [402], [400, 401, 5, 402, 399]):
        stream = StreamDecoder(tokenizer)
        assert "".join([*map(stream.push, ids), stream.finish()]) == tokenizer.decode(ids)


def test_a_hole_in_the_ids_is_no_token() -> None:
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 2}, unk_token="a"))
    tokenizer = Tokenizer.from_str(inner.to_str())
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (3, None)
    with pytest.raises(ValueError, match="token id 1 stands for no token"):
        tokenizer.decode([0, 1])
    with pytest.raises(ValueError, match="not byte-level"):
        StreamDecoder(tokenizer).push(0)


@pytest.mark.parametrize("text", ["\ud800", "ab\udfffcd", "🙂\udc00"])
def test_lone_surrogate(trained: Tokenizer, text: str) -> None:
    at = next(i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff")
    with pytest.raises(ValueError, match=f"character {at} .* lone surrogate .U.{ord(text[at]):04X}"):
        trained.encode(text)
    with pytest.raises(ValueError, match="lone surrogate"):
        trained.encode_batch(["fine", text])
    with pytest.raises(ValueError, match="lone surrogate"):
        train_bpe(["fine", text], 300, progress=False)


def test_trained_follows_the_20b_recipe(trained: Tokenizer, real: Tokenizer) -> None:
    ours, theirs = json.loads(trained._text), json.loads(real._text)
    assert ours["normalizer"] == theirs["normalizer"]
    for part in ("pre_tokenizer", "post_processor"):
        assert {**ours[part], "use_regex": None} == {**theirs[part], "use_regex": None}
        assert ours[part].get("use_regex", True)
    assert ours["decoder"]["type"] == theirs["decoder"]["type"]
    shift = real.vocab_size - trained.vocab_size
    moved = [{**t, "id": t["id"] - (shift if t["id"] > 1 else 0)} for t in theirs["added_tokens"]]
    assert ours["added_tokens"] == moved
    flags = {k: v for k, v in theirs["model"].items() if k not in ("vocab", "merges")}
    assert flags.items() <= ours["model"].items()


def test_trained_holds_every_byte_and_the_asked_size(trained: Tokenizer) -> None:
    assert trained.vocab_size == 400
    assert len({trained.token_bytes(id) for id in range(2, 258)}) == 256
    assert all(len(trained.token_bytes(id)) == 1 for id in range(2, 258))
    assert trained.decode([400 - 23, 399]) == " " * 26
    merged = [trained.token_bytes(id) for id in range(258, 400 - 23)]
    assert len(set(merged)) == len(merged) == 400 - 23 - 258
    assert all(len(token) > 1 for token in merged)


def test_each_merge_is_the_most_frequent_pair_of_its_time() -> None:
    rng = random.Random(1)
    # No letter twice in a word: how often a pair occurs is then beyond dispute.
    lexicon = ["".join(rng.sample("abcdefgh", rng.randint(1, 6))) for _ in range(60)]
    text = " ".join(rng.choices(lexicon, [1 / (i + 1) for i in range(60)], k=3000))
    merges = json.loads(train_bpe([text], 281 + 40, progress=False)._text)["model"]["merges"]
    words = Counter(tuple(word.replace(" ", "Ġ")) for word in re.findall(" ?[a-h]+", text))
    assert len(merges) == 40
    for merge in merges:
        pairs = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                pairs[pair] += count
        assert pairs[tuple(merge)] == max(pairs.values())
        words = Counter({_merged(word, tuple(merge)): count for word, count in words.items()})


def _merged(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    for at in range(len(word) - 1):
        if word[at : at + 2] == pair:
            return (*word[:at], "".join(pair), *word[at + 2 :])
    return word


def test_few_texts_give_fewer_ids() -> None:
    assert train_bpe(["ab"], 1000, progress=False).vocab_size == 2 + 256 + 1 + 23


def test_training_is_deterministic_over_processes_and_threads(tmp_path: Path, trained: Tokenizer) -> None:
    (tmp_path / "corpus.json").write_text(json.dumps(corpus()), encoding="utf-8")
    program = (
        "import json, sys; from neox.tokenizer import train_bpe; assert 'torch' not in sys.modules; "
        f"texts = json.load(open({str(tmp_path / 'corpus.json')!r}, encoding='utf-8')); "
        "print(train_bpe(iter(texts), 400, progress=False).sha256)"
    )
    for threads in ("1", "3"):
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env={"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == trained.sha256


def test_training_errors() -> None:
    with pytest.raises(ValueError, match=r"vocab_size = 280 is too small.*at least 281"):
        train_bpe(["a"], 280, progress=False)
    for nothing in ([], ["", ""]):
        with pytest.raises(ValueError, match="no text to train"):
            train_bpe(nothing, 300, progress=False)


def test_errors_of_the_texts_pass_through_training() -> None:
    def texts():
        yield "a"
        raise ValueError("corpus.jsonl:2: not JSON")

    with pytest.raises(ValueError, match=r"^corpus\.jsonl:2: not JSON$"):
        train_bpe(texts(), 300, progress=False)


def test_training_shows_a_bar(capfd: pytest.CaptureFixture[str]) -> None:
    train_bpe(["some text"], 300)
    out, err = capfd.readouterr()
    assert out == ""
    assert "tokenizer" in err


def test_save_and_load(tmp_path: Path, trained: Tokenizer) -> None:
    trained.save(tmp_path)
    trained.save(tmp_path / "other.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other.json", "tokenizer.json"]
    for path in (tmp_path, tmp_path / "tokenizer.json", str(tmp_path / "other.json")):
        loaded = Tokenizer.from_file(path)
        assert loaded.sha256 == trained.sha256
        assert loaded.encode("abc de") == trained.encode("abc de")
    raw = (tmp_path / "tokenizer.json").read_bytes()
    assert trained.sha256 == hashlib.sha256(raw).hexdigest()


def test_a_failed_save_keeps_the_old_file(tmp_path: Path, trained: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"No space left.*tokenizer\.json"):
        trained.save(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_saved_while_truncating_or_padding_is_read_without(trained: Tokenizer) -> None:
    inner = tokenizers.Tokenizer.from_str(trained._text)
    inner.enable_truncation(3)
    inner.enable_padding(length=9)
    assert Tokenizer.from_str(inner.to_str()).encode("zyxwvut") == trained.encode("zyxwvut")
    assert len(trained.encode("zyxwvut")) > 3


def test_load_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json: no such tokenizer"):
        Tokenizer.from_file(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nope\.json: no such tokenizer"):
        Tokenizer.from_file(tmp_path / "nope.json")
    bad = tmp_path / "bad.json"
    for content in (b"", b"{}", b"[1]", b"not json", b'{"model": 3}', b"\xff\xfe"):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.json: not a tokenizer\.json") as caught:
            Tokenizer.from_file(bad)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="vocabulary is empty"):
        Tokenizer.from_str(tokenizers.Tokenizer(tokenizers.models.BPE()).to_str())
    with pytest.raises(ValueError, match="multiple must be at least 1"):
        train_bpe(["a"], 281, progress=False).padded_vocab_size(0)

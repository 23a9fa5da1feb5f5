"""The tokenizer's report: its figures against plain counting with the library."""

import json
import re
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
import tokenizers

from neox.analysis import tokenizer_report as module
from neox.analysis.tokenizer_report import Usage, tokenizer_report
from neox.tokenizer import Tokenizer, train_bpe
from tests.test_tokenizer import corpus

DOCUMENTS = [
    *corpus(seed=7, documents=20),
    "e\u0301 is composed",
    "中🙂 are bytes",
    "a<|endoftext|>b <|endoftext|>",
    "line\n" * 40,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    train_bpe(corpus(), 400, progress=False).save(folder / "a.json")
    train_bpe(corpus(), 300, progress=False, normalizer="none").save(folder / "b.json")
    (folder / "c.txt").write_text("ä plain text\n\nof two paragraphs", encoding="utf-8")
    lines = [json.dumps({"body": text, "text": text}) for text in [*DOCUMENTS, ""]]
    (folder / "d.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def table(report: str) -> list[dict[str, str]]:
    """Rows of the large table, by column; a source is named in the first of its rows only."""
    lines = report.split("\n\n")[1].splitlines()
    assert len({len(line) for line in lines}) == 1, "aligned"
    names = ["source", "letter", *re.split(r"  +", lines[0].removeprefix("source").strip())]
    rows = []
    for line in lines[1:]:
        cells = re.split(r"  +", line.strip())
        cells = cells if len(cells) == len(names) else [rows[-1]["source"], *cells]
        rows.append(dict(zip(names, cells, strict=True)))
    return rows


@pytest.mark.parametrize("piece", [3, 1 << 20])
def test_tokenizer_report_figures_are_those_of_plain_counting(
    folder: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr("neox.tokenizer.PIECE_CHARACTERS", piece)
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 100)
    sources = [str(folder / "c.txt"), str(folder / "d.jsonl")]
    report = tokenizer_report([folder / "a.json", folder / "b.json"], sources, progress=False)
    texts = {sources[0]: [(folder / "c.txt").read_text(encoding="utf-8")], sources[1]: DOCUMENTS}
    texts["all"] = [text for documents in texts.values() for text in documents]
    rows = table(report)
    assert [(row["source"], row["letter"]) for row in rows] == [(name, letter) for name in texts for letter in "AB"]
    first = 0
    for row in rows:
        library = tokenizers.Tokenizer.from_file(str(folder / f"{row['letter'].lower()}.json"))
        documents = texts[row["source"]]
        encodings = [library.encode(text, add_special_tokens=False) for text in documents]
        ids = [id for encoding in encodings for id in encoding.ids]
        first = len(ids) if row["letter"] == "A" else first
        size = sum(len(text.encode()) for text in documents)
        high = [token for e in encodings for token in e.tokens if len(token) == 1 and not 33 <= ord(token) <= 126]
        # One letter of the byte alphabet; those for the bytes below 0x80 are ASCII or 256 and up to the space's.
        split = [token for token in high if not 256 <= ord(token) <= 256 + 33]
        assert row["documents"] == f"{len(documents)}"
        assert row["bytes"] == f"{size:,}"
        assert row["tokens"] == f"{len(ids):,}"
        assert row["x A"] == f"{len(ids) / first:.3f}"
        assert row["bytes/token"] == f"{size / len(ids):.3f}"
        assert row["characters/token"] == f"{sum(map(len, documents)) / len(ids):.3f}"
        assert row["tokens/word"] == f"{len(ids) / len(' '.join(documents).split()):.3f}"
        assert row["split"] == f"{len(split) / len(ids):.1%}"
        assert row["vocabulary used"] == f"{len(set(ids)) / library.get_vocab_size():.1%}"
        composed = any(text != unicodedata.normalize("NFC", text) for text in documents)
        assert row["round trip"] == ("NFC" if composed and row["letter"] == "A" else "exact")
    assert "A, special tokens in the text: <|endoftext|> 2x, encoded as token 0; specials=False" in report


def test_longest_tokens_are_words_of_the_text(folder: Path) -> None:
    usage = Usage(Tokenizer.from_file(folder / "a.json"))
    usage.add(DOCUMENTS)
    counted = Counter(
        token for text in DOCUMENTS for token in map(usage.tokenizer.token_bytes, usage.tokenizer.encode(text))
    )
    sizes = sorted((len(raw) for raw in counted if raw.strip() and raw != b"<|endoftext|>"), reverse=True)
    longest = usage.longest
    assert [len(text.encode()) for text, _ in longest] == sizes[: len(longest)]
    assert all(counted[text.encode()] == count for text, count in longest)
    assert len(longest) == module.LONGEST
    assert module._shown("x" * 100) == "'" + "x" * 35 + "...'"


def test_tokenizer_report_shows_lossy_round_trips(folder: Path) -> None:
    inner = tokenizers.Tokenizer.from_file(str(folder / "a.json"))
    inner.normalizer = tokenizers.normalizers.Lowercase()
    inner.save(str(folder / "lower.json"))
    (folder / "e.jsonl").write_text('{"text": "Big"}\n{"text": "small"}\n{"text": "BIG"}\n')
    (row,) = table(tokenizer_report([folder / "lower.json"], [folder / "e.jsonl"], progress=False))
    assert row["round trip"] == "2 changed"


def test_a_tokenizer_that_is_not_byte_level(folder: Path) -> None:
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "plain": 1, "[UNK]": 2}, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.save(str(folder / "words.json"))
    rows = table(tokenizer_report([folder / "a.json", folder / "words.json"], [folder / "c.txt"], progress=False))
    assert (rows[1]["tokens"], rows[1]["split"], rows[1]["round trip"]) == ("6", "-", "1 changed")


def test_tokenizer_report_errors(folder: Path) -> None:
    (folder / "empty.txt").write_text("")
    a, c = folder / "a.json", folder / "c.txt"
    for tokenizers_, sources, error, message in (
        ([], [c], ValueError, "no tokenizer given"),
        ([a], [], ValueError, "no text given"),
        ([folder / "z.json"], [c], FileNotFoundError, "z.json: no such tokenizer"),
        ([a], [c, folder / "z.txt"], FileNotFoundError, "z.txt: no such file"),
        ([a], [folder / "empty.txt"], ValueError, "empty.txt: every document is empty"),
    ):
        with pytest.raises(error, match=message):
            tokenizer_report(tokenizers_, sources, progress=False)


def test_tokenizer_report_progress_bar_and_text_key(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    report = tokenizer_report([folder / "a.json"], [folder / "d.jsonl"], text_key="body")
    assert report == tokenizer_report([folder / "a.json"], [folder / "d.jsonl"], progress=False)
    out, err = capfd.readouterr()
    assert out == ""
    assert "tokenizer" in err

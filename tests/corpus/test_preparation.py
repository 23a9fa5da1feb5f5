"""prepare: what it writes against the tokenizer alone, its report and manifest, and every way it can fail."""

import errno
import hashlib
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neox.corpus import prepare
from neox.data import TokenFile
from neox.tokenizer import Tokenizer, train_bpe

module = importlib.import_module("neox.corpus.worker")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["the cat sat on the mat, the dog on the log"] * 20, 290, progress=False)


def jsonl(path: Path, documents: list[str], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in documents), encoding="utf-8")
    return path


texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)


@settings(deadline=None, max_examples=40)
@given(
    files=st.lists(st.tuples(st.booleans(), st.lists(texts, max_size=8)), min_size=1, max_size=4),
    append_eod=st.booleans(),
    batch=st.sampled_from([1, 3, 4096]),
)
def test_the_documents_of_the_files_in_order(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: Tokenizer,
    files: list[tuple[bool, list[str]]],
    append_eod: bool,
    batch: int,
) -> None:
    folder = tmp_path_factory.mktemp("prepare")
    sources, documents, of_source = [], [], []
    for number, (one_text, content) in enumerate(files):
        if one_text:
            path = folder / f"{number}.txt"
            joined = "|".join(content)
            path.write_bytes(joined.encode())
            documents.append(joined.removeprefix("\ufeff"))
            of_source.append(documents[-1:])
        else:
            path = jsonl(folder / f"{number}.jsonl", content)
            documents += content
            of_source.append(content)
        sources.append(path)
    all_documents = len(documents)
    documents = [text for text in documents if text]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BATCH_DOCUMENTS", batch)
        if not documents:
            with pytest.raises(ValueError, match="every document is empty"):
                prepare(sources, folder / "out", tokenizer, progress=False)
            assert sorted(folder.iterdir()) == sorted(sources)
            return
        report = prepare(sources, folder / "out", tokenizer, append_eod=append_eod, progress=False)
    expected = [tokenizer.encode(text) + [0] * append_eod for text in documents]
    file = TokenFile(folder / "out")
    assert [file.document(i).tolist() for i in range(len(file))] == expected
    assert report.prefix == str(folder / "out")
    assert (report.documents, report.tokens) == (len(documents), sum(map(len, expected)))
    assert report.empty == all_documents - len(documents)
    assert report.bytes == len("".join(documents).encode())
    manifest = json.loads((folder / "out.json").read_text())
    assert len(manifest.pop("plan")) == 64
    came_from = [[str(path), len([text for text in own if text])] for path, own in zip(sources, of_source, strict=True)]
    assert manifest.pop("origins") == [row for row in came_from if row[1]]
    assert manifest == {
        "sha256": hashlib.sha256((folder / "out.bin").read_bytes()).hexdigest(),
        "format": 1,
        "sources": [{"path": str(path), "bytes": path.stat().st_size} for path in sources],
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": 290,
        "text_key": "text",
        "append_eod": append_eod,
        "special_in_text": "token",
        "dtype": "uint16",
        "documents": report.documents,
        "bytes": report.bytes,
        "tokens": report.tokens,
        "empty": report.empty,
        "skipped": {},
    }
    assert report.skipped == {}
    assert report.left_out() == ([f"left out: {report.empty} empty"] if report.empty else [])


def test_twice_gives_the_same_bytes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = jsonl(tmp_path / "a.jsonl", ["the cat", "the dog"])
    contents = []
    for _ in range(2):
        prepare([source], tmp_path / "sub" / "out", tokenizer, progress=False)
        contents.append({p.name: p.read_bytes() for p in (tmp_path / "sub").iterdir()})
    assert contents[0] == contents[1]
    assert sorted(contents[0]) == ["out.bin", "out.idx", "out.json"]


@pytest.mark.parametrize("piece", [7, 1 << 20])
def test_a_long_document_is_encoded_and_shown_in_pieces(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    text = "the cat\nthe dog\n\nthe log\n" * 50
    (tmp_path / "a.txt").write_text(text)
    source = jsonl(tmp_path / "b.jsonl", ["cat", text, "dog", ""])
    expected = [[*tokenizer.encode(part), 0] for part in (text, "cat", text, "dog")]
    monkeypatch.setattr("neox.tokenizer.PIECE_CHARACTERS", piece)
    monkeypatch.setattr("neox.corpus.encode.PIECE_CHARACTERS", piece)
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 10)
    shown: list[float] = []
    monkeypatch.setattr("rich.progress.Progress.advance", lambda self, task, share: shown.append(share))
    prepare([tmp_path / "a.txt", source], tmp_path / "out", tokenizer, progress=False)
    file = TokenFile(tmp_path / "out")
    assert [file.document(i).tolist() for i in range(len(file))] == expected
    assert sum(shown) <= len(text) + source.stat().st_size
    assert (len(shown) > 100) == (piece == 7)


def test_one_path_may_stand_for_a_list(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = jsonl(tmp_path / "a.jsonl", ["the cat"])
    assert prepare(str(source), tmp_path / "out", tokenizer, progress=False).documents == 1


def test_a_prefix_needs_a_name(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = jsonl(tmp_path / "a.jsonl", ["the cat"])
    with pytest.raises(ValueError, match="a prefix is a folder and a name, such as .*/corpus"):
        prepare([source], f"{tmp_path}/", tokenizer, progress=False)


def test_other_key(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = jsonl(tmp_path / "a.jsonl", ["the cat"], key="body")
    assert prepare([source], tmp_path / "out", tokenizer, text_key="body", progress=False).documents == 1
    with pytest.raises(ValueError, match=r"a\.jsonl:1: no key 'text'"):
        prepare([source], tmp_path / "out", tokenizer, progress=False, overwrite=True)


def test_a_bad_line_late_leaves_the_earlier_output_whole(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = jsonl(tmp_path / "a.jsonl", ["the cat"] * 5)
    prepare([source], tmp_path / "out", tokenizer, progress=False)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p != source}
    with source.open("a") as file:
        file.write('{"text": 3}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:6: key 'text' holds a number"):
        prepare([source], tmp_path / "out", tokenizer, progress=False, overwrite=True)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p != source} == before


BAD = b'{"body": 3}\nhello\n{"text": "the dog"}\n{"text": ""}\n[]\nwell\n' + b"so\n" * 3


def test_skipped_documents_are_in_the_report_and_in_the_manifest(tmp_path: Path, tokenizer: Tokenizer) -> None:
    good, bad = jsonl(tmp_path / "a.jsonl", ["the cat"]), tmp_path / "b.jsonl"
    bad.write_bytes(BAD)
    with pytest.raises(ValueError, match=r"b\.jsonl:1: no key 'text'.*data\.on_error=skip$"):
        prepare([good, bad], tmp_path / "out", tokenizer, progress=False)
    report = prepare([good, bad], tmp_path / "out", tokenizer, progress=False, on_error="skip")
    file = TokenFile(tmp_path / "out")
    assert [tokenizer.decode(file.document(i).tolist()[:-1]) for i in range(len(file))] == ["the cat", "the dog"]
    assert {why: (s.documents, len(s.first)) for why, s in report.skipped.items()} == {
        "no key": (1, 1),
        "not JSON": (5, 3),
        "no text": (1, 1),
    }
    lines = report.left_out()
    assert lines[0] == "left out: 1 empty"
    assert lines[1] == "left out: 1 no key"
    assert lines[2].startswith(f"  {bad}:1: no key 'text' (keys here: 'body')")
    assert lines[3] == "left out: 5 not JSON"
    assert [line.partition(": ")[0] for line in lines[4:7]] == [f"  {bad}:{number}" for number in (2, 6, 7)]
    manifest = json.loads((tmp_path / "out.json").read_text())
    assert manifest["skipped"] == {why: vars(skipped) for why, skipped in report.skipped.items()}
    assert manifest["empty"] == 1


def test_nothing_is_left_after_skipping(tmp_path: Path, tokenizer: Tokenizer) -> None:
    bad = tmp_path / "b.jsonl"
    bad.write_bytes(b"a\nb\n")
    words = r"no text in .*b\.jsonl: every document is empty or was left out \(2 not JSON, first .*b\.jsonl:1: not JSON"
    with pytest.raises(ValueError, match=words):
        prepare(bad, tmp_path / "out", tokenizer, progress=False, on_error="skip")
    assert list(tmp_path.iterdir()) == [bad]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(290, "uint16"), (65499, "uint16"), (65500, "int32")])
def test_two_bytes_a_token_where_they_suffice(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, vocab_size: int, dtype: str
) -> None:
    """The bound is gpt-neox's, and the highest id must come back."""
    monkeypatch.setattr(tokenizer, "vocab_size", vocab_size)
    monkeypatch.setattr(Tokenizer, "_encode", lambda self, texts, specials: [[vocab_size - 1] for _ in texts])
    prepare(jsonl(tmp_path / "a.jsonl", ["a", "b"]), tmp_path / "out", tokenizer, progress=False)
    assert TokenFile(tmp_path / "out").tokens.tolist() == [vocab_size - 1, 0] * 2
    assert (tmp_path / "out.bin").stat().st_size == 4 * (2 if dtype == "uint16" else 4)
    assert json.loads((tmp_path / "out.json").read_text())["dtype"] == dtype


def test_every_source_is_checked_before_the_first_is_read(tmp_path: Path, tokenizer: Tokenizer) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_bytes(b"\xff")
    with pytest.raises(FileNotFoundError, match=r"nope\.txt: no such file"):
        prepare([broken, tmp_path / "nope.txt"], tmp_path / "out", tokenizer, progress=False)
    assert list(tmp_path.iterdir()) == [broken]


def test_nothing_to_read(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="no input files"):
        prepare([], tmp_path / "out", tokenizer)
    empty = tmp_path / "a.txt"
    empty.write_bytes(b"")
    with pytest.raises(ValueError, match=r"no text in .*a\.txt: every document is empty"):
        prepare([empty], tmp_path / "out", tokenizer, progress=False)
    assert list(tmp_path.iterdir()) == [empty]


def test_no_end_of_document_token(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = json.loads(tokenizer._text)
    file["added_tokens"] = [t for t in file["added_tokens"] if t["id"] != 0]
    file["model"]["vocab"] = {t if id else "<|end|>": id for t, id in file["model"]["vocab"].items()}
    without = Tokenizer.from_str(json.dumps(file))
    source = jsonl(tmp_path / "a.jsonl", ["the cat"])
    with pytest.raises(ValueError, match=r"no <\|endoftext\|> token.*set data\.append_eod=false"):
        prepare([source], tmp_path / "out", without, progress=False)
    assert prepare([source], tmp_path / "out", without, append_eod=False, progress=False).documents == 1


@pytest.mark.parametrize("documents", [1, 2])
@pytest.mark.parametrize("wrong", [-1, 290, 65535])
def test_ids_outside_of_the_vocabulary(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, documents: int, wrong: int
) -> None:
    monkeypatch.setattr(Tokenizer, "_encode", lambda self, texts, specials: [[5, wrong, 6] for _ in texts])
    source = jsonl(tmp_path / "a.jsonl", ["the cat"] * documents)
    with pytest.raises(ValueError, match=rf"token id {wrong} is outside of the tokenizer's vocabulary \(0 to 289\)"):
        prepare([source], tmp_path / "out", tokenizer, progress=False)
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("content", ['{"my": "settings"}', "[]", "3", "not json"])
def test_manifest_of_another_program_is_not_overwritten(tmp_path: Path, tokenizer: Tokenizer, content: str) -> None:
    source = jsonl(tmp_path / "out.jsonl", ["the cat"])
    (tmp_path / "out.json").write_text(content)
    with pytest.raises(ValueError, match=r"out\.json: exists and is no manifest"):
        prepare([source], tmp_path / "out", tokenizer, progress=False)
    assert (tmp_path / "out.json").read_text() == content
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.json", "out.jsonl"]


FULL_DISK = """
import resource, sys
from neox.corpus import prepare
from neox.tokenizer import Tokenizer
assert "torch" not in sys.modules, "preparing needs no torch"
tokenizer = Tokenizer.from_file(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]), resource.RLIM_INFINITY))
try:
    prepare([sys.argv[2]], sys.argv[3], tokenizer, progress=False)
except OSError as error:
    print(error.errno, error, sep="|")
"""


@pytest.mark.parametrize(("limit", "which"), [(0, "bin"), (5000, "bin"), (150_000, "bin"), (400_000, "idx")])
def test_prepare_disk_full(tmp_path: Path, tokenizer: Tokenizer, limit: int, which: str) -> None:
    """A limit on file sizes makes write() fail as a full disk does, midway, in the real system call."""
    source = jsonl(tmp_path / "a.jsonl", ["the cat"] * 40_000)  # a .bin of 240,000 bytes, an .idx of 800,042
    tokenizer.save(tmp_path / "tokenizer.json")
    out = tmp_path / "out"
    out.mkdir()
    arguments = [str(tmp_path), str(source), str(out / "c"), str(limit)]
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    number, message = done.stdout.split("|")
    assert int(number) == errno.EFBIG
    assert f"c.{which}" in message
    assert list(out.iterdir()) == []


def test_progress_is_shown_in_bytes(tmp_path: Path, tokenizer: Tokenizer, capfd: pytest.CaptureFixture[str]) -> None:
    source = jsonl(tmp_path / "a.jsonl", ["the cat"] * 100)
    prepare([source], tmp_path / "out", tokenizer)
    out, err = capfd.readouterr()
    assert out == ""
    assert "prepare" in err
    assert "2.0/2.0 kB" in err  # 100 lines of 20 bytes


@pytest.mark.parametrize("how", ["token", "text"])
def test_a_document_that_spells_out_the_end_of_a_document(tmp_path: Path, tokenizer: Tokenizer, how: str) -> None:
    """As a token it is the end, id 0; as text no id is that of a special token, and decoding gives the text back."""
    text = "one<|endoftext|>two"
    prepare(jsonl(tmp_path / "a.jsonl", [text]), tmp_path / "out", tokenizer, progress=False, special_in_text=how)
    ids = TokenFile(tmp_path / "out").tokens.tolist()
    assert ids[-1] == 0
    assert ids[:-1].count(0) == (how == "token")
    assert tokenizer.decode(ids[:-1]) == text
    assert json.loads((tmp_path / "out.json").read_text())["special_in_text"] == how

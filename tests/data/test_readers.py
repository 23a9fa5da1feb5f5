"""Readers: documents in order, and one clear line for each way a corpus file can be wrong."""

import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neox.data import read_documents
from neox.data.readers import read_records

texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=30)


def lines(path: Path, *content: bytes) -> Path:
    path.write_bytes(b"\n".join(content))
    return path


def error_of(path: Path, **kwargs: str) -> str:
    with pytest.raises(ValueError) as caught:
        list(read_documents(path, **kwargs))
    message = str(caught.value)
    assert "\n" not in message
    return message


@settings(deadline=None)
@given(documents=st.lists(texts), ascii=st.booleans(), key=texts, crlf=st.booleans(), bom=st.booleans())
def test_jsonl_round_trip(
    tmp_path_factory: pytest.TempPathFactory, documents: list[str], ascii: bool, key: str, crlf: bool, bom: bool
) -> None:
    path = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    rows = [json.dumps({"meta": 1, key: text}, ensure_ascii=ascii) for text in documents]
    raw = b"\xef\xbb\xbf" * bom + ("\r\n" if crlf else "\n").join(rows).encode()
    path.write_bytes(raw)
    assert list(read_documents(path, key)) == [text for text in documents if text]
    records = list(read_records(path, key))
    assert [text for text, _ in records] == documents
    assert sum(count for _, count in records) == (len(raw) if documents else 0)


@settings(deadline=None)
@given(text=texts, bom=st.booleans())
def test_txt_is_one_document(tmp_path_factory: pytest.TempPathFactory, text: str, bom: bool) -> None:
    path = tmp_path_factory.mktemp("txt") / "a.TXT"
    raw = b"\xef\xbb\xbf" * bom + text.encode()
    path.write_bytes(raw)
    # A second mark is text: only the first one says how the file is written.
    expected = text if bom else text.removeprefix("\ufeff")
    assert list(read_documents(path)) == ([expected] if expected else [])
    assert [count for _, count in read_records(path)] == [len(raw)]


def test_blank_lines_and_empty_documents_are_passed_over(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", b"", b'{"text": ""}', b"  ", b'{"text": "x"}', b"\r", b"")
    assert list(read_documents(path)) == ["x"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a', "not JSON (Unterminated string starting at: column 10)"),
        (b"hello", "not JSON (Expecting value: column 1)"),
        (b'{"text": "a"} {', "not JSON (Extra data: column 15)"),
        (b"[" * 200_000, "not JSON"),
        (b'{"n": ' + b"1" * 5000 + b"}", "not JSON"),
        (b'["a"]', "holds a list, not a JSON object"),
        (b'"a"', "holds a string, not a JSON object"),
        (b"null", "holds null, not a JSON object"),
        (b"7.5", "holds a number, not a JSON object"),
        (b'{"content": "a", "id": 1}', "no key 'text' (keys here: 'content', 'id'); set data.text_key"),
        (b"{}", "no key 'text' (keys here: none)"),
        (b'{"text": null}', "key 'text' holds null, not a string"),
        (b'{"text": 3}', "key 'text' holds a number, not a string"),
        (b'{"text": true}', "key 'text' holds true or false, not a string"),
        (b'{"text": ["a"]}', "key 'text' holds a list, not a string"),
        (b'{"text": {"a": 1}}', "key 'text' holds an object, not a string"),
        (b'{"text": "a\\ud800b"}', "lone surrogate (\\ud800)"),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = lines(tmp_path / "a.jsonl", b'{"text": "fine"}', b"", line, b'{"text": "fine"}')
    found = error_of(path)
    assert found.startswith(f"{path}:3: ")
    assert message in found


def test_escaped_pairs_are_no_lone_surrogates(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", b'{"text": "\\ud83d\\ude42"}')
    assert list(read_documents(path)) == ["🙂"]


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
@settings(deadline=None, max_examples=30)
@given(before=st.lists(texts.map(lambda t: json.dumps({"text": t}, ensure_ascii=False))), data=st.data())
def test_broken_utf8_is_named_by_line_and_byte(
    tmp_path_factory: pytest.TempPathFactory, name: str, bom: bytes, before: list[str], data: st.DataObject
) -> None:
    bad = data.draw(st.sampled_from([b"\xff", b"\xc3(", b"\xed\xa0\x80", b"\xf0\x9f\x99", b"\x80"]))
    start = bom + "".join(row + "\n" for row in before).encode() + b'{"text": "'
    path = tmp_path_factory.mktemp("bad") / name
    path.write_bytes(start + bad + b'"}\n{"text": "fine"}')
    found = error_of(path)
    assert found.startswith(f"{path}:{len(before) + 1}: not UTF-8 at byte {len(start)} of the file (0x{bad[0]:02x})")


def test_other_key(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", b'{"text": "a", "body": "b"}')
    assert list(read_documents(path, "body")) == ["b"]


def test_wrong_paths_are_named_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nope\.txt: no such file"):
        read_documents(tmp_path / "nope.txt")
    with pytest.raises(ValueError, match="is a folder; name the files in it"):
        read_documents(tmp_path)
    odd = lines(tmp_path / "a.docx", b"")
    with pytest.raises(ValueError, match=r"a\.docx: unknown kind of file; the suffix must be one of \.txt, \.jsonl"):
        read_documents(odd)


def test_jsonl_is_streamed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    row = json.dumps({"text": "x" * 1000}).encode() + b"\n"
    path.write_bytes(row * 20_000)
    tracemalloc.start()
    count = sum(1 for _ in read_documents(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_000
    assert peak < 1 << 20

"""Text files: documents in order, and one clear line for each way a file can be wrong; skipped, it is counted."""

import gzip
import json
import os
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from neox.corpus import read_documents
from neox.corpus.readers import ErrorPolicy, find_sources, read_source, text

texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=30)


def lines(path: Path, *content: bytes) -> Path:
    path.write_bytes(b"\n".join(content))
    return path


WAY_OUT = "; or leave out what cannot be read: data.on_error=skip"


def error_of(path: Path) -> str:
    """The one line that reading `path` fails with; skipped, the same fault is kept, and nothing is raised."""
    with pytest.raises(ValueError) as caught:
        list(read_documents(path))
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(WAY_OUT)
    policy = ErrorPolicy("skip")
    list(records_of(path, policy=policy))
    (skipped,) = policy.skipped.values()
    assert (skipped.documents, skipped.first) == (1, [message.removesuffix(WAY_OUT)])
    return message


def records_of(path: Path, key: str = "text", policy: ErrorPolicy | None = None) -> list[tuple[str, float]]:
    (source,) = find_sources(path, key, "skip")
    return [(found.text, found.taken) for found in read_source(source, key, policy or ErrorPolicy("fail"))]


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
    records = records_of(path, key)
    assert [text for text, _ in records] == documents
    assert sum(count for _, count in records) == (len(raw) if documents else 0)


@settings(deadline=None, max_examples=30)
@given(parts=st.lists(texts, max_size=4))
def test_a_list_of_strings_is_one_document_of_paragraphs(
    tmp_path_factory: pytest.TempPathFactory, parts: list[str]
) -> None:
    """As lm_dataformat reads it: `para_joiner.join(text)`, where the joiner is a blank line."""
    path = lines(tmp_path_factory.mktemp("list") / "a.jsonl", json.dumps({"text": parts}).encode())
    assert [text for text, _ in records_of(path)] == ["\n\n".join(parts)]


@settings(deadline=None)
@given(text=texts, bom=st.booleans())
def test_txt_is_one_document(tmp_path_factory: pytest.TempPathFactory, text: str, bom: bool) -> None:
    path = tmp_path_factory.mktemp("txt") / "a.TXT"
    raw = b"\xef\xbb\xbf" * bom + text.encode()
    path.write_bytes(raw)
    # A second mark is text: only the first one says how the file is written.
    expected = text if bom else text.removeprefix("\ufeff")
    assert list(read_documents(path)) == ([expected] if expected else [])
    assert [count for _, count in records_of(path)] == [len(raw)]


def test_blank_lines_and_empty_documents_are_passed_over(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", b"", b'{"text": ""}', b"  ", b'{"text": "x"}', b"\r", b"")
    assert list(read_documents(path)) == ["x"]


def test_jsonl_malformed_lines_are_named(tmp_path: Path) -> None:
    cases = [
        (b'{"text": "a', "not JSON (Unterminated string starting at: column 10)"),
        (b"hello", "not JSON (Expecting value: column 1)"),
        (b'{"text": "a"} {', "not JSON (Extra data: column 15)"),
        (b"[" * 200_000, "not JSON"),
        (b'{"n": ' + b"1" * 5000 + b"}", "not JSON"),
        (b'["a"]', "holds a list, not a JSON object"),
        (b"null", "holds null, not a JSON object"),
        (b"7.5", "holds a number, not a JSON object"),
        (b'{"content": "a", "id": 1}', "no key 'text' (keys here: 'content', 'id'); set data.text_key"),
        (b"{}", "no key 'text' (keys here: none)"),
        (b'{"text": null}', "key 'text' holds null, not a string"),
        (b'{"text": 3}', "key 'text' holds a number, not a string"),
        (b'{"text": true}', "key 'text' holds true or false, not a string"),
        (b'{"text": ["a", 3]}', "key 'text' holds a list with a number in it, not a string"),
        (b'{"text": [["a"]]}', "key 'text' holds a list with a list in it, not a string"),
        (b'{"text": {"a": 1}}', "key 'text' holds an object, not a string"),
        (b'{"text": "a\\ud800b"}', "lone surrogate (\\ud800)"),
        (b'{"text": ["a", "\\udc00"]}', "lone surrogate (\\udc00)"),
    ]
    for line, message in cases:
        path = lines(tmp_path / "a.jsonl", b'{"text": "fine"}', b"", line, b'{"text": "fine"}')
        found = error_of(path)
        assert found.startswith(f"{path}:3: "), line[:40]
        assert message in found, line[:40]


ODD_LINES = [
    b'{"text": "plain"}',
    b'\xef\xbb\xbf{"text": "a mark in mid-file"}',
    b'{"text": "a\\ud800b"}',
    b'{"text": "pair \\ud83d\\ude42"}',
    b'{"text": "tab \\u0009"}',
    '{"text": "wide"}'.encode("utf-16"),
    b'{"text": "nan", "score": NaN}',
    b'{"text": "twice", "text": "last"}',
    b'{"text": "deep", "tree": ' + b"[" * 2000 + b"]" * 2000 + b"}",
    b'{"text": 1e999}',
    b'"a document by itself"',
    b'"half \\udc00"',
    b"7",
    b'{"text": "a\\u0000b"}',
    b'{"text": "end"}\r',
]


def test_the_same_lines_pass_with_and_without_orjson(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = lines(tmp_path / "a.jsonl", *ODD_LINES)
    read: list[tuple[list[str], dict[str, int]]] = []
    for present in (True, False):
        if not present:
            monkeypatch.setitem(sys.modules, "orjson", None)
        text._fast_reader.cache_clear()
        policy = ErrorPolicy("skip")
        documents = [found for found, _ in records_of(path, policy=policy)]
        read.append((documents, {reason: skipped.documents for reason, skipped in policy.skipped.items()}))
    text._fast_reader.cache_clear()
    assert read[0] == read[1]
    assert read[0][0] == [
        *("plain", "pair 🙂", "tab \t", "nan", "last", "a document by itself", "a\0b", "end"),
    ]
    assert read[0][1] == {"not JSON": 2, "lone surrogate": 2, "not UTF-8": 1, "no text": 2}


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


FAULTS = {
    b"hello": "not JSON",
    b'{"text": "\xff"}': "not UTF-8",
    b'{"body": "a"}': "no key",
    b'["a"]': "no text",
    b'{"text": null}': "no text",
    b'{"text": "\\ud800"}': "lone surrogate",
}


@settings(deadline=None, max_examples=50)
@given(rows=st.lists(st.one_of(texts, st.sampled_from(sorted(FAULTS)))))
def test_on_error_skip_counts_by_reason_with_the_first_places(
    tmp_path_factory: pytest.TempPathFactory, rows: list[str | bytes]
) -> None:
    content = [row if isinstance(row, bytes) else json.dumps({"text": row}).encode() for row in rows]
    path = lines(tmp_path_factory.mktemp("skip") / "a.jsonl", *content)
    policy = ErrorPolicy("skip")
    found = [text for text, _ in records_of(path, policy=policy)]
    assert found == [row for row in rows if isinstance(row, str)]
    expected: dict[str, list[int]] = {}
    for number, row in enumerate(rows, 1):
        if isinstance(row, bytes):
            expected.setdefault(FAULTS[row], []).append(number)
    assert {why: skipped.documents for why, skipped in policy.skipped.items()} == {
        w: len(n) for w, n in expected.items()
    }
    for why, numbers in expected.items():
        places = [int(place.removeprefix(f"{path}:").partition(": ")[0]) for place in policy.skipped[why].first]
        assert places == numbers[:3]
    assert list(read_documents(path, on_error="skip")) == [text for text in found if text]


def test_on_error_takes_only_fail_and_skip(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='data.on_error: must be "fail" or "skip", not'):
        read_documents(lines(tmp_path / "a.jsonl"), on_error="ignore")  # type: ignore[arg-type]


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize(
    "content",
    [b'[{"text": "a"},\n {"text": "b"}]', b'{\n  "text": "a"\n}', b'["a", "b"]'],
    ids=["array", "object", "line"],
)
def test_a_json_file_must_hold_lines(tmp_path: Path, content: bytes, pack: Callable[[bytes], bytes]) -> None:
    path = tmp_path / ("a.json" if pack is bytes else "a.json.gz")
    path.write_bytes(pack(b'{"text": "a"}\n{"text": "b"}\n'))
    assert list(read_documents(path)) == ["a", "b"]
    path.write_bytes(pack(content))
    with pytest.raises(ValueError, match=r":1: .*not one JSON value over the whole file: turn it into \.jsonl"):
        list(read_documents(path))


def test_a_file_that_the_disk_cannot_give_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = lines(tmp_path / "a.jsonl", b'{"text": "a"}')

    def broken(path: Path, file: object) -> object:
        raise OSError(5, "Input/output error")
        yield

    monkeypatch.setattr("neox.corpus.readers.streams._blocks", broken)
    with pytest.raises(OSError, match="Input/output error") as caught:
        list(read_documents(path))
    assert caught.value.filename == str(path)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_jsonl_is_streamed(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    random = os.urandom(10_000_000).hex()
    raw = b"".join(b'{"text": "%s"}\n' % random[n : n + 1000].encode() for n in range(0, len(random), 1000))
    packed = {"": bytes, ".gz": lambda r: gzip.compress(r, 1), ".zst": zstandard.ZstdCompressor(level=1).compress}
    path.write_bytes(packed[suffix](raw))
    del raw, random
    tracemalloc.start()
    count = sum(1 for _ in read_documents(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_000
    assert peak < 1 << 20


def test_an_empty_name_is_not_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines(tmp_path / "a.jsonl", b'{"text": "a"}')
    monkeypatch.chdir(tmp_path)
    for names in ("", [""], ["a.jsonl", ""]):
        with pytest.raises(ValueError, match="a source has an empty name: leave the option out for none"):
            find_sources(names)

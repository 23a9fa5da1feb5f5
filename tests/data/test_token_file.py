"""Token files: bytes against the written layout, every kind of damage, crashes between the steps of a write."""

import io
import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import neox.data.token_file as module
from neox.data import TokenFile, TokenWriter, token_dtype

FORMATS = {
    "uint8": (1, "B"),
    "int8": (2, "b"),
    "int16": (3, "h"),
    "int32": (4, "i"),
    "int64": (5, "q"),
    "uint16": (8, "H"),
}


def documents_of(dtype: str) -> st.SearchStrategy[list[list[int]]]:
    limits = np.iinfo(dtype)
    return st.lists(st.lists(st.integers(int(limits.min), int(limits.max)), max_size=20), max_size=20)


def slow_bytes(documents: list[list[int]], dtype: str) -> tuple[bytes, bytes]:
    """`.bin` and `.idx`, from the description of the format: one value at a time."""
    code, letter = FORMATS[dtype]
    tokens, idx = io.BytesIO(), io.BytesIO()
    pointers = []
    for document in documents:
        pointers.append(tokens.tell())
        for token in document:
            tokens.write(struct.pack("<" + letter, token))
    idx.write(b"MMIDIDX\x00\x00")
    idx.write(struct.pack("<Q", 1))
    idx.write(struct.pack("<B", code))
    idx.write(struct.pack("<Q", len(documents)))
    idx.write(struct.pack("<Q", len(documents) + 1))
    for document in documents:
        idx.write(struct.pack("<i", len(document)))
    for pointer in pointers:
        idx.write(struct.pack("<q", pointer))
    for mark in range(len(documents) + 1):
        idx.write(struct.pack("<q", mark))
    return tokens.getvalue(), idx.getvalue()


def write(prefix: Path, documents: list, dtype: str = "uint16", manifest: dict | None = None) -> Path:
    with TokenWriter(prefix, dtype) as writer:
        writer.manifest = manifest
        for document in documents:
            writer.add_document(document)
    return prefix


@settings(deadline=None, max_examples=60)
@given(data=st.data(), dtype=st.sampled_from(sorted(FORMATS)), block=st.sampled_from([1, 2, 7, 1 << 20]))
def test_bytes_equal_the_description(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, dtype: str, block: int
) -> None:
    documents = data.draw(documents_of(dtype))
    prefix = tmp_path_factory.mktemp("pair") / "a.v1"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", block)
        write(prefix, documents, dtype)
        expected = slow_bytes(documents, dtype)
        assert (Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()) == expected
        file = TokenFile(prefix)
    assert len(file) == len(documents)
    assert file.tokens.dtype == np.dtype(dtype)
    assert file.tokens.tolist() == [token for document in documents for token in document]
    assert [file.document(i).tolist() for i in range(len(file))] == documents
    assert file.sizes.tolist() == [len(document) for document in documents]
    assert file.doc_idx.tolist() == list(range(len(documents) + 1))
    assert sorted(p.name for p in prefix.parent.iterdir()) == ["a.v1.bin", "a.v1.idx"]


def test_token_dtype() -> None:
    for vocab_size, dtype in [(50277, "uint16"), (65499, "uint16"), (65500, "int32"), (10**6, "int32")]:
        assert token_dtype(vocab_size) == np.dtype(dtype), vocab_size


def test_either_file_may_name_the_pair(tmp_path: Path) -> None:
    write(tmp_path / "a.bin", [[1, 2]])
    for name in ("a", "a.bin", "a.idx"):
        assert TokenFile(str(tmp_path / name)).tokens.tolist() == [1, 2]


@pytest.mark.parametrize("which", ["bin", "idx"])
@settings(deadline=None, max_examples=70)
@given(documents=documents_of("uint16"), data=st.data())
def test_truncated_or_grown_files_are_refused(
    tmp_path_factory: pytest.TempPathFactory, which: str, documents: list[list[int]], data: st.DataObject
) -> None:
    prefix = write(tmp_path_factory.mktemp("cut") / "a", documents)
    path = Path(f"{prefix}.{which}")
    raw = path.read_bytes()
    n = len(documents)
    boundaries = [
        0,
        1,
        8,
        9,
        17,
        18,
        26,
        34,
        34 + 4 * n,
        34 + 12 * n,
        len(raw) - 1,
        len(raw) - 8,
        len(raw) + 1,
        len(raw) + 8,
    ]
    length = data.draw(st.one_of(st.sampled_from(boundaries), st.integers(0, len(raw) + 40)))
    if length < 0 or length == len(raw):
        TokenFile(prefix)
        return
    path.write_bytes(raw[:length].ljust(length, b"\x00"))
    with pytest.raises(ValueError) as caught:
        TokenFile(prefix)
    message = str(caught.value)
    assert message.startswith(f"{path}: damaged or incomplete: expected ")
    assert f"found {length};" in message
    assert message.endswith("run prepare again")
    assert "\n" not in message


def damaged(prefix: Path, at: int, value: bytes) -> str:
    path = Path(f"{prefix}.idx")
    raw = bytearray(path.read_bytes())
    raw[at : at + len(value)] = value
    path.write_bytes(raw)
    with pytest.raises(ValueError) as caught:
        TokenFile(prefix)
    assert str(caught.value).startswith(f"{path}: damaged or incomplete: ")
    assert str(caught.value).endswith("run prepare again")
    return str(caught.value)


def test_wrong_values_in_the_index_are_refused(tmp_path: Path) -> None:
    cases = [
        (0, b"TNTIDY\x00\x00\x00", "starts with b'TNTIDY"),
        (8, b"\x01", "starts with"),
        (9, struct.pack("<Q", 2), "expected version 1, found 2"),
        (17, b"\x00", "found 0"),
        (17, b"\x09", "found 9"),
        (18, struct.pack("<Q", 4), "for 4 documents"),
        (18, struct.pack("<Q", 2**63), "documents"),
        (26, struct.pack("<Q", 3), "3 marks"),
        (34, struct.pack("<i", 3), "document 1 of 0 tokens should start at byte 6 of the .bin, found 4"),
        (34, struct.pack("<i", -1), "document 0 of -1 tokens"),
        (34 + 12 + 8, struct.pack("<q", 5), "document 1 of 0 tokens should start at byte 4 of the .bin, found 5"),
    ]
    for number, (at, value, message) in enumerate(cases):
        assert message in damaged(write(tmp_path / f"a{number}", [[1, 2], [], [3]]), at, value), (at, value)


def test_wrong_size_of_the_last_document_shows_in_the_bin(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", [[1, 2], [3]])
    raw = bytearray(Path(f"{prefix}.idx").read_bytes())
    raw[38:42] = struct.pack("<i", 2)
    Path(f"{prefix}.idx").write_bytes(raw)
    with pytest.raises(ValueError, match=r"a\.bin: damaged .* expected 8 bytes for 4 tokens of uint16, found 6"):
        TokenFile(prefix)


@pytest.mark.parametrize("which", ["bin", "idx"])
def test_missing_file_is_named(tmp_path: Path, which: str) -> None:
    prefix = write(tmp_path / "a", [[1]])
    Path(f"{prefix}.{which}").unlink()
    with pytest.raises(FileNotFoundError, match=rf"a\.{which}: no such token file; run prepare"):
        TokenFile(prefix)


def test_document_out_of_range(tmp_path: Path) -> None:
    file = TokenFile(write(tmp_path / "a", [[1]]))
    for i in (-1, 1):
        with pytest.raises(IndexError, match=f"document {i} does not exist; there are 1"):
            file.document(i)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([65536], "token ids 65536 to 65536 do not fit uint16"),
        ([3, -1], "token ids -1 to 3 do not fit uint16"),
        ([[1, 2]], "flat sequence of integers"),
        ([0.5], "flat sequence of integers, not float64"),
    ],
)
def test_unfit_documents_leave_nothing(tmp_path: Path, document: list, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        write(tmp_path / "a", [[1], document])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["float32", "uint64", "bool"])
def test_unfit_dtypes(tmp_path: Path, dtype: str) -> None:
    with pytest.raises(ValueError, match="tokens cannot be stored as"):
        TokenWriter(tmp_path / "a", dtype)


def test_an_exception_keeps_the_older_pair(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", [[1, 2]])

    def interrupted() -> None:
        with TokenWriter(prefix, "uint16") as writer:
            writer.add_document([3, 4, 5])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert TokenFile(prefix).tokens.tolist() == [1, 2]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "a.idx"]


def test_a_reader_of_the_older_pair_is_not_disturbed(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", [[1, 2]])
    old = TokenFile(prefix)
    write(prefix, [[7, 8, 9]])
    assert old.tokens.tolist() == [1, 2]
    assert TokenFile(prefix).tokens.tolist() == [7, 8, 9]


def test_writer_lock_refuses_a_second_writer(tmp_path: Path) -> None:
    with TokenWriter(tmp_path / "a", "uint16") as writer:
        writer.add_document([1])
        with (
            pytest.raises(ValueError, match=r"a\.bin\.tmp: another process is writing"),
            TokenWriter(tmp_path / "a", "uint16"),
        ):
            pass
        writer.add_document([2])
    assert TokenFile(tmp_path / "a").tokens.tolist() == [1, 2]


def test_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(OSError, match="f"), TokenWriter(tmp_path / "f" / "a", "uint16"):
        pass


@pytest.mark.parametrize("failing", [1, 2])
def test_failing_fsync_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    real, calls = os.fsync, 0

    def full(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left.*a\.(bin|idx)"):
        write(tmp_path / "a", [[1]])
    assert list(tmp_path.iterdir()) == []


def test_intact_files_of_other_layouts_are_not_supported_rather_than_damaged(tmp_path: Path) -> None:
    """The layout before MMIDIDX, and an index of floating-point numbers, as Megatron's library writes them."""
    old = b"TNTIDX\x00\x00" + struct.pack("<QQQQ", 1, 4, 2, 3)
    floats = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 6, 1, 2) + struct.pack("<iqqq", 1, 0, 0, 1)
    for content, words in ((old, "first layout of Megatron's indexed data sets"), (floats, "its values are float")):
        (tmp_path / "a.idx").write_bytes(content)
        (tmp_path / "a.bin").write_bytes(bytes(8))
        with pytest.raises(ValueError, match=words) as caught:
            TokenFile(tmp_path / "a")
        assert "is not supported" in str(caught.value)
        assert "damaged" not in str(caught.value)

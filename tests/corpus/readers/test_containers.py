"""The same documents in any container give the same tokens; a container that is cut or damaged is noticed."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from neox.corpus import prepare, read_documents
from neox.corpus.readers import ErrorPolicy, Skipped, find_sources, read_source
from neox.corpus.readers.streams import BLOCK
from neox.tokenizer import Tokenizer, train_bpe

texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)
documents = st.lists(texts | st.sampled_from(["", " ", "\n", "\r\n\t", "\x00", "\ufeff", "﻿é́🙂"]), max_size=12)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["the cat sat on the mat, the dog on the log"] * 20, 290, progress=False)


def zst(raw: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(raw)


def skippable(content: bytes) -> bytes:
    """A frame that a decompressor passes over (RFC 8878, 3.1.2): pzstd and the seekable format write them."""
    return (0x184D2A50).to_bytes(4, "little") + len(content).to_bytes(4, "little") + content


def halves(rows: list, at: int) -> tuple[list, list]:
    return rows[:at], rows[at:]


def write_all(folder: Path, rows: list[str], at: int) -> list[Path]:
    """The same documents in every container, split in two where it has parts."""
    encoded = [json.dumps({"id": n, "text": row}).encode() + b"\n" for n, row in enumerate(rows)]
    raw, (first, second) = b"".join(encoded), map(b"".join, halves(encoded, at))
    contents = {
        "a.json": raw,
        "a.jsonl.gz": gzip.compress(raw),
        "a.json.gz": gzip.compress(first) + gzip.compress(b"") + gzip.compress(second),
        "a.jsonl.zst": zst(raw),
        "a.json.zst": zst(first) + skippable(b"index") + zst(second) + skippable(b""),
        "a.JSONL.GZ": gzip.compress(first) + gzip.compress(second) + bytes(7),
        "folder/a.jsonl": first,
        "folder/b/c.jsonl.zst": zst(second),
        "folder/.hidden.jsonl": b"not to be read",
        "folder/.git/config": b"not to be read",
    }
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    table = pa.table({"id": range(len(rows)), "text": pa.array(rows, pa.string())})
    pq.write_table(table, folder / "a.parquet", row_group_size=max(at, 1), compression="zstd")
    kinds = (pa.large_string(), pa.binary(), pa.large_binary(), pa.dictionary(pa.int32(), pa.string()))
    for number, kind in enumerate(kinds):
        raw_rows = [row.encode() for row in rows] if "binary" in str(kind) else rows
        column = pa.array(raw_rows, kind.value_type).dictionary_encode() if number == 3 else pa.array(raw_rows, kind)
        pq.write_table(pa.table({"text": column}), folder / f"{number}.parquet", data_page_size=64)
    mixed = folder / "mixed"
    mixed.mkdir()
    (mixed / "a.jsonl").write_bytes(first)
    pq.write_table(table.slice(at), mixed / "b.parquet")
    files = [folder / name for name in contents if "/" not in name]
    return [*files, *sorted(folder.glob("*.parquet")), folder / "folder", mixed]


@settings(deadline=None, max_examples=8)
@given(rows=documents, data=st.data())
def test_any_container_gives_the_same_token_files(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, rows: list[str], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("containers")
    at = data.draw(st.integers(0, len(rows)))
    sources = write_all(folder, rows, at)
    expected = folder / "expected.jsonl"
    expected.write_bytes(b"".join(json.dumps({"text": row}).encode() + b"\n" for row in rows))
    assert list(read_documents(expected)) == [row for row in rows if row]
    if not any(rows):
        for source in sources:
            assert list(read_documents(source)) == []
        return
    prepare(expected, folder / "out" / "expected", tokenizer, progress=False)
    for number, source in enumerate(sources):
        report = prepare(source, folder / "out" / str(number), tokenizer, progress=False)
        assert report.empty == rows.count("")
        for suffix in (".bin", ".idx"):
            found = (folder / "out" / f"{number}{suffix}").read_bytes()
            assert found == (folder / "out" / f"expected{suffix}").read_bytes(), source
        taken = sum(document.taken for document in read_source(find_sources(source)[0], "text", ErrorPolicy("fail")))
        size = find_sources(source)[0].size
        assert size is not None
        assert 0 < taken < size + 1e-6


@settings(deadline=None, max_examples=20)
@given(text=texts, bom=st.booleans())
def test_a_compressed_txt_is_one_document(tmp_path_factory: pytest.TempPathFactory, text: str, bom: bool) -> None:
    folder = tmp_path_factory.mktemp("txt")
    raw = b"\xef\xbb\xbf" * bom + text.encode()
    contents = {"a.txt": raw, "a.txt.gz": gzip.compress(raw), "a.txt.zst": zst(raw)}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        expected = raw.decode("utf-8-sig")
        assert list(read_documents(folder / name)) == ([expected] if expected else [])


def test_lists_of_strings_in_a_column(tmp_path: Path) -> None:
    rows = [["a", "b"], [], ["", "c\n"]]
    for number, kind in enumerate((pa.list_(pa.string()), pa.large_list(pa.large_string()), pa.list_(pa.binary()))):
        pq.write_table(pa.table({"text": pa.array(rows, kind)}), tmp_path / f"{number}.parquet")
    assert list(read_documents(tmp_path)) == ["a\n\nb", "\n\nc\n"] * 3


def test_what_gzip_and_zstd_themselves_write(tmp_path: Path) -> None:
    """Files as the commands make them, with names and times in their headers, one after another as `cat` joins them."""
    raw = b"".join(json.dumps({"text": f"document {n} " * 50}).encode() + b"\n" for n in range(3000))
    (tmp_path / "a.jsonl").write_bytes(raw)
    expected = list(read_documents(tmp_path / "a.jsonl"))
    packed = subprocess.run(["gzip", "-c", "-9", "a.jsonl"], cwd=tmp_path, capture_output=True, check=True).stdout
    (tmp_path / "b.jsonl.gz").write_bytes(packed * 2)
    assert list(read_documents(tmp_path / "b.jsonl.gz")) == expected * 2
    long = zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=True, write_checksum=1)
    )
    whole = long.compressobj()
    (tmp_path / "c.jsonl.zst").write_bytes(whole.compress(raw) + whole.flush())  # its header states no size
    assert list(read_documents(tmp_path / "c.jsonl.zst")) == expected


# --- damage ----------------------------------------------------------------------------------------------------------

ROWS = [f"document {n}: " + "abcdefghij"[n % 10] * (n % 50) for n in range(400)]
RAW = b"".join(json.dumps({"text": row}).encode() + b"\n" for row in ROWS)


def skipping(path: Path) -> tuple[list[str], dict[str, Skipped]]:
    policy = ErrorPolicy("skip")
    (source,) = find_sources(path, on_error="skip")
    return [text for text, *_ in read_source(source, "text", policy)], policy.skipped


@pytest.mark.parametrize("pack", [gzip.compress, zst], ids=["gz", "zst"])
@settings(deadline=None, max_examples=60)
@given(part=st.floats(0, 1, exclude_max=True), members=st.integers(1, 3))
def test_a_truncated_compressed_file_is_noticed_and_its_whole_lines_kept(
    tmp_path_factory: pytest.TempPathFactory, pack: object, part: float, members: int
) -> None:
    assert callable(pack)
    packed = pack(RAW)
    # Between members a cut cannot be seen: the shorter file is a whole one.
    content = packed * (members - 1) + packed[: int(len(packed) * part)]
    path = tmp_path_factory.mktemp("cut") / ("a.jsonl.gz" if pack is gzip.compress else "a.jsonl.zst")
    path.write_bytes(content)
    found, skipped = skipping(path)
    assert found[: 400 * (members - 1)] == ROWS * (members - 1)
    rest = found[400 * (members - 1) :]
    assert rest == ROWS[: len(rest)]
    if members > 1 and int(len(packed) * part) == 0:
        assert skipped == {}
        return
    (place,) = skipped["damaged"].first
    assert skipped == {"damaged": Skipped(1, [place])}
    assert place.startswith(f"{path}:{len(found) + 1}: {'cut short' if content else 'it is empty'}")
    with pytest.raises(ValueError, match="the rest of the file is lost: fetch it or make it again; or leave out"):
        list(read_documents(path))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_much_is_read_of_a_file_that_is_cut_late(tmp_path: Path, suffix: str) -> None:
    raw = os.urandom(BLOCK).hex().encode()  # half of it is as much as can be saved
    lines = b"".join(b'{"text": "%s"}\n' % raw[n : n + 100] for n in range(0, len(raw), 100))
    packed = gzip.compress(lines) if suffix == ".gz" else zst(lines)
    (tmp_path / f"a.jsonl{suffix}").write_bytes(packed[:-10])
    found, _ = skipping(tmp_path / f"a.jsonl{suffix}")
    # zstd decodes blocks of 128 KiB, gzip as it goes.
    assert len(found) * 115 > len(lines) - (1 << 17) - 115


GZIPPED = gzip.compress(RAW, mtime=0)  # without the time, so that the cases have the same names in every process


@pytest.mark.parametrize(
    ("suffix", "content", "words"),
    [
        (".gz", RAW, "damaged gzip data: Not a gzipped file"),
        (".zst", RAW, "damaged zstd data: .*Unknown frame descriptor"),
        (".gz", GZIPPED[:-8] + bytes(8), "damaged gzip data: CRC check failed"),
        (
            ".gz",
            GZIPPED[:20] + b"\xff" * 50 + GZIPPED[70:],
            "damaged gzip data: Error -3",
        ),
        (".gz", GZIPPED + b"more", "damaged gzip data: Not a gzipped file"),
        (".zst", zst(RAW) + b"more", "damaged zstd data: .*Unknown frame descriptor"),
        (".gz", b"", "it is empty"),
        (".zst", b"", "it is empty"),
    ],
)
def test_damaged_compressed_files_are_named(tmp_path: Path, suffix: str, content: bytes, words: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        list(read_documents(path))
    assert "\n" not in str(caught.value)
    found, skipped = skipping(path)
    assert found == ROWS[: len(found)]
    assert list(skipped) == ["damaged"]
    if content.endswith((b"more", bytes(8))):
        assert len(found) == 400  # all of it came before the damage


def test_a_cut_txt_keeps_its_whole_characters(tmp_path: Path) -> None:
    text = "é" * 1000
    packed = zstandard.ZstdCompressor().compressobj()
    start = packed.compress(text.encode()[:999]) + packed.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    (tmp_path / "a.txt.zst").write_bytes(start)
    found, skipped = skipping(tmp_path / "a.txt.zst")
    assert found == ["é" * 499]
    assert list(skipped) == ["damaged"]
    with pytest.raises(ValueError, match=r"a\.txt\.zst:1: cut short"):
        list(read_documents(tmp_path / "a.txt.zst"))
    (tmp_path / "b.txt.gz").write_bytes(b"")
    assert skipping(tmp_path / "b.txt.gz")[0] == []
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"a\n\xff"))
    with pytest.raises(ValueError, match=r"c\.txt\.gz:2: not UTF-8 at byte 2 of the decompressed text"):
        list(read_documents(tmp_path / "c.txt.gz"))


def parquet(path: Path, column: pa.Array | None = None, **options: object) -> bytes:
    pq.write_table(pa.table({"id": range(400), "text": pa.array(ROWS) if column is None else column}), path, **options)
    return path.read_bytes()


@settings(deadline=None, max_examples=40)
@given(part=st.floats(0, 1, exclude_max=True))
def test_a_cut_parquet_file_is_noticed_before_anything_is_read(
    tmp_path_factory: pytest.TempPathFactory, part: float
) -> None:
    path = tmp_path_factory.mktemp("cut") / "a.parquet"
    whole = parquet(path)
    path.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(ValueError, match=r"a\.parquet: .*no Parquet file") as caught:
        read_documents(path)
    assert "\n" not in str(caught.value)
    found, skipped = skipping(path)
    assert (found, list(skipped)) == ([], ["damaged"])


def test_a_damaged_row_group_costs_its_own_rows_only(tmp_path: Path) -> None:
    """A flipped bit of the text would pass for text: the checksum of its page tells."""
    path = tmp_path / "a.parquet"
    whole = parquet(
        path, row_group_size=100, write_page_checksum=True, compression="none", use_dictionary=False, data_page_size=64
    )
    at = whole.index(b"document 150")
    path.write_bytes(whole[:at] + b"D" + whole[at + 1 :])
    assert next(read_documents(path)) == ROWS[0]  # no more is read than is asked for
    found, skipped = skipping(path)
    (place,) = skipped["damaged"].first
    assert "the rest of row group 1 is lost" in place
    assert found == ROWS[: 200 - skipped["damaged"].documents] + ROWS[200:]
    assert skipped["damaged"].documents >= 50
    with pytest.raises(ValueError, match=r"a\.parquet: row 1\d\d: damaged \(.*[Cc][Rr][Cc]"):
        list(read_documents(path))


def test_parquet_bad_rows_are_named_and_counted(tmp_path: Path) -> None:
    """Arrow takes any bytes for a string: each row is looked at alone."""
    rows = [b"a", None, b"b", b"\xff", b"\xed\xa0\x80", b"c"]
    bad = pa.Array.from_buffers(pa.string(), 6, pa.array(rows, pa.binary()).buffers())
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": bad}), path)
    with pytest.raises(ValueError, match="row 1: key 'text' holds null, not a string"):
        list(read_documents(path))
    found, skipped = skipping(path)
    assert found == ["a", "b", "c"]
    assert {why: s.documents for why, s in skipped.items()} == {"no text": 1, "not UTF-8": 2}
    assert skipped["not UTF-8"].first[0] == f"{path}: row 3: 'text' is not UTF-8 at its byte 0 (0xff)"


@pytest.mark.parametrize(
    ("key", "words", "reason"),
    [
        ("body", "no key 'body' (keys here: 'id', 'text'); set data.text_key", "no key"),
        ("id", "column 'id' holds int64, not text; set data.text_key", "no text"),
    ],
)
def test_the_wrong_column_costs_all_rows(tmp_path: Path, key: str, words: str, reason: str) -> None:
    parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError) as caught:
        read_documents(tmp_path / "a.parquet", key)
    assert words in str(caught.value)
    policy = ErrorPolicy("skip")
    (source,) = find_sources(tmp_path / "a.parquet", key, "skip")
    assert list(read_source(source, key, policy)) == []
    assert {why: s.documents for why, s in policy.skipped.items()} == {reason: 400}


def test_only_the_column_of_the_text_is_read(tmp_path: Path) -> None:
    """The other column cannot be read at all."""
    path = tmp_path / "a.parquet"
    other = pa.array([f"other {n}" for n in range(400)])
    pq.write_table(
        pa.table({"other": other, "text": pa.array(ROWS)}),
        path,
        write_page_checksum=True,
        compression="none",
        use_dictionary=False,
    )
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"other 77", b"OTHER 77"))
    assert list(read_documents(path)) == ROWS
    with pytest.raises(ValueError, match="damaged"):
        list(read_documents(path, "other"))


# --- packages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "package"),
    [("a.jsonl.zst", "zstandard"), ("a.parquet", "pyarrow"), ("hf:o/n", "datasets"), ("d", "datasets")],
)
@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_a_package_that_is_missing_is_named_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str, on_error: str
) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "state.json").touch()
    (tmp_path / "a.jsonl.zst").touch()
    (tmp_path / "a.parquet").touch()
    monkeypatch.setitem(sys.modules, package, None)
    source = name if ":" in name else str(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name}: needs the package {package} .*: pip install 'neox-lm\[data\]'"):
        find_sources(source, on_error=on_error)  # type: ignore[arg-type]


def test_plain_text_needs_none_of_them(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(RAW))
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('zstandard', 'pyarrow', 'datasets')));"
        "from neox.corpus import read_documents; print(sum(1 for _ in read_documents(sys.argv[1])))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == "400\n"


# --- folders and names -----------------------------------------------------------------------------------------------


def lines(path: Path, *rows: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


def test_a_folder_is_read_in_the_order_of_paths(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """The order is that of the bytes of the path within the folder, as `LC_ALL=C sort` has it."""
    names = [
        "b.jsonl",
        "a/z.jsonl",
        "a-b/c.jsonl",
        "a.jsonl",
        "B.jsonl",
        "10.jsonl",
        "9.jsonl",
        "é.jsonl",
        "a/b/c.jsonl",
    ]
    for name in names:
        lines(tmp_path / "in" / name, name)
    expected = sorted(names, key=str.encode)
    assert list(read_documents(tmp_path / "in")) == expected
    prepare(f"{tmp_path}/in/", tmp_path / "out", tokenizer, progress=False)
    (source,) = json.loads((tmp_path / "out.json").read_text())["sources"]
    sizes = [{"path": name, "bytes": (tmp_path / "in" / name).stat().st_size} for name in expected]
    assert source == {"path": f"{tmp_path}/in/", "bytes": sum(s["bytes"] for s in sizes), "files": sizes}


def test_unrecognized_files_in_a_folder(tmp_path: Path) -> None:
    lines(tmp_path / "a.jsonl", "a")
    (tmp_path / "README.md").touch()
    (tmp_path / "old.bz2").touch()
    with pytest.raises(ValueError, match=r"README\.md: unknown kind of file; the suffixes are \.txt.*name the files"):
        read_documents(tmp_path)
    found, skipped = skipping(tmp_path)
    assert found == ["a"]
    assert [place.partition(": ")[0] for place in skipped["unknown kind"].first] == [
        str(tmp_path / name) for name in ("README.md", "old.bz2")
    ]


@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_wrong_names_are_said_before_anything_is_read(tmp_path: Path, on_error: str) -> None:
    good = lines(tmp_path / "good.jsonl", "a")

    def refused(*names: Path, words: str, error: type[Exception] = ValueError) -> None:
        with pytest.raises(error, match=words) as caught:
            read_documents([good, *names], on_error=on_error)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)

    refused(tmp_path / "nope.txt", words=r"nope\.txt: no such file or folder", error=FileNotFoundError)
    (tmp_path / "a.docx").touch()
    refused(tmp_path / "a.docx", words=r"a\.docx: unknown kind of file; the suffixes are \.txt, \.jsonl, \.json")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", words="empty: holds no file that can be read; the suffixes are")
    os.mkfifo(tmp_path / "pipe.jsonl")
    refused(tmp_path / "pipe.jsonl", words=r"pipe\.jsonl: neither a file nor a folder; write its content to a file")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "a.jsonl").symlink_to(tmp_path / "absent.jsonl")
    refused(tmp_path / "links", words="No such file or directory: .*links/a.jsonl", error=FileNotFoundError)
    if sys.platform == "linux":  # elsewhere no such name can be given
        odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jsonl"))
        odd.touch()
        refused(odd, words="its name is not UTF-8")
    with pytest.raises(ValueError, match="no input files given"):
        read_documents([], on_error=on_error)  # type: ignore[arg-type]


def test_a_file_that_cannot_be_opened_is_noticed_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, closed = lines(tmp_path / "a.jsonl", "a"), lines(tmp_path / "b.jsonl", "b")
    plain = Path.open

    def refuse(self: Path, *arguments: object, **named: object) -> object:
        if self == closed:
            raise PermissionError(13, "Permission denied", str(self))
        return plain(self, *arguments, **named)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(PermissionError, match=r"b\.jsonl"):
        read_documents([good, closed])


def test_a_file_that_is_reached_twice(tmp_path: Path) -> None:
    file = lines(tmp_path / "in" / "a.jsonl", "a")
    (tmp_path / "link.jsonl").symlink_to(file)
    os.link(file, tmp_path / "hard.jsonl")
    for other in (file, tmp_path / "link.jsonl", tmp_path / "hard.jsonl", tmp_path / "in"):
        with pytest.raises(ValueError, match="is the same as .*; its text would come twice: name it once"):
            read_documents([file, other])
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    with pytest.raises(ValueError, match="in/loop: is the same as .*in; its text would come twice"):
        read_documents(tmp_path / "in")
    (tmp_path / "in" / "loop").unlink()
    # Links out of the folder are followed: what they lead to is part of what was named.
    lines(tmp_path / "elsewhere" / "b.jsonl", "b")
    (tmp_path / "in" / "more").symlink_to(tmp_path / "elsewhere")
    assert list(read_documents(tmp_path / "in")) == ["a", "b"]

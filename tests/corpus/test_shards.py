"""Shards hold each document once, wherever the cuts fall, and in whatever the text is kept."""

import gzip
import json
from itertools import pairwise
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from neox.corpus.readers import ErrorPolicy, find_sources, read_documents
from neox.corpus.readers.streams import frame_starts
from neox.corpus.shards import batches, documents, shards

texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=30)


def cut(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    for module in ("chunks", "streams", "text", "columns", "hub_datasets"):
        monkeypatch.setattr(f"neox.corpus.readers.{module}.CHUNK_BYTES", size)
    monkeypatch.setattr("neox.corpus.shards.CHUNK_BYTES", size)


@settings(deadline=None, max_examples=60)
@given(rows=st.lists(texts, max_size=20), size=st.integers(1, 200), frame=st.integers(1, 90), end=st.booleans())
def test_shards_hold_each_document_once_wherever_the_cuts_fall(
    tmp_path_factory: pytest.TempPathFactory, rows: list[str], size: int, frame: int, end: bool
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    raw = b"\n".join(json.dumps({"meta": n, "text": row}).encode() for n, row in enumerate(rows)) + b"\n" * end
    (folder / "a.jsonl").write_bytes(raw)
    pack = zstandard.ZstdCompressor(write_checksum=end).compress
    # Frames that end anywhere, within a character too.
    packed = b"".join(pack(raw[n : n + frame]) for n in range(0, len(raw), frame))
    (folder / "b.jsonl.zst").write_bytes(packed or pack(b""))
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(raw))
    table = pa.table({"meta": pa.array(range(len(rows)), pa.int64()), "text": pa.array(rows, pa.string())})
    pq.write_table(table, folder / "d.parquet", row_group_size=3)
    with pa.OSFile(str(folder / "e.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    with pa.OSFile(str(folder / "f.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    with pytest.MonkeyPatch.context() as patch:
        cut(patch, size)
        found = shards(find_sources(folder))
        assert [shard.number for shard in found] == list(range(len(found)))
        read = [(d.text, d.meta) for shard in found for d in documents(shard, meta_key="meta")]
        lines = shards(find_sources(folder / "a.jsonl"))
        frames = shards(find_sources(folder / "b.jsonl.zst"))
    assert read == [(row, n) for n, row in enumerate(rows)] * 6
    if len(raw) > 2 * size:
        assert len(lines) > 1
    if frame + 20 < size < len(packed) / 3:  # a first frame that is longer than a piece is not walked through
        assert len(frames) > 1


@settings(deadline=None, max_examples=30)
@given(raw=st.binary(max_size=200), data=st.data())
def test_zstd_frames_of_a_damaged_file(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes, data: st.DataObject
) -> None:
    """Whatever the damage, looking for frames ends, and each place is within the file."""
    pack = zstandard.ZstdCompressor().compress
    whole = bytearray(b"".join(pack(raw[n : n + 20]) for n in range(0, len(raw) + 1, 20)))
    for place in data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=4)):
        whole[place] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.mktemp("frames") / "a.jsonl.zst"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    with pytest.MonkeyPatch.context() as patch:
        cut(patch, 10)
        starts = frame_starts(str(path))
    assert starts == sorted(set(starts))
    assert starts[0] == 0
    assert all(start < max(path.stat().st_size, 1) for start in starts)


def test_a_read_error_names_its_line_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [b'{"text": "fine"}'] * 40
    rows[30] = b"bad"
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(rows))
    cut(monkeypatch, 100)
    policy = ErrorPolicy("skip")
    found = [d for shard in shards(find_sources(tmp_path / "a.jsonl")) for d in documents(shard, policy=policy)]
    assert len(found) == 39
    assert policy.skipped["not JSON"].first[0].startswith(f"{tmp_path / 'a.jsonl'}:31: not JSON")


def test_small_files_share_a_shard(tmp_path: Path) -> None:
    for n in range(50):
        (tmp_path / f"{n:02}.txt").write_text(str(n))
    (shard,) = shards(find_sources(tmp_path))
    assert [d.text for d in documents(shard)] == [str(n) for n in range(50)]
    assert shard.size == sum(len(str(n)) for n in range(50))


@pytest.fixture
def bucket() -> str:
    """A store with files of every kind, at memory://."""
    store = fsspec.filesystem("memory")
    rows = [b'{"text": "a"}\n', b'{"text": "b"}\n']
    table = pa.table({"text": ["c", "d"]})
    with store.open("/corpus/one/a.jsonl", "wb") as file:
        file.write(b"".join(rows))
    with store.open("/corpus/two/b.parquet", "wb") as file:
        pq.write_table(table, file)
    with store.open("/corpus/two/c.jsonl.zst", "wb") as file:
        file.write(zstandard.ZstdCompressor().compress(b'{"text": "e"}\n'))
    yield "memory://corpus"
    store.rm("/corpus", recursive=True)


def test_urls_globs_and_folders_of_a_store(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(read_documents(bucket)) == ["a", "b", "c", "d", "e"]
    assert list(read_documents(f"{bucket}/two/*.parquet")) == ["c", "d"]
    assert list(read_documents([f"{bucket}/one/a.jsonl", f"{bucket}/two/**"])) == ["a", "b", "c", "d", "e"]
    cut(monkeypatch, 1)
    found = shards(find_sources(bucket))
    assert len(found) > 3
    assert [d.text for shard in found for d in documents(shard)] == ["a", "b", "c", "d", "e"]
    with pytest.raises(FileNotFoundError, match="memory:///corpus/none.jsonl: no such file"):
        read_documents(f"{bucket}/none.jsonl")
    with pytest.raises(FileNotFoundError, match=r"memory://corpus/\*\.txt: no file matches"):
        read_documents(f"{bucket}/*.txt")
    with pytest.raises(ValueError, match="is the same as"):
        read_documents([bucket, f"{bucket}/one/a.jsonl"])
    with pytest.raises(ValueError, match="nope://x/a.jsonl: cannot be opened: Protocol not known"):
        read_documents("nope://x/a.jsonl")
    (tmp_path / "b.jsonl").write_text('{"text": "b"}')
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    assert list(read_documents(f"{tmp_path}/*.jsonl")) == ["a", "b"]
    (tmp_path / "[1].jsonl").write_text('{"text": "of that name"}')
    assert list(read_documents(tmp_path / "[1].jsonl")) == ["of that name"]


@given(st.lists(st.text("x", max_size=9)), st.integers(1, 20), st.integers(1, 5))
def test_batches_keep_order_and_limits(texts: list[str], characters: int, documents: int) -> None:
    found = list(batches(texts, len, characters, documents))
    assert [text for batch in found for text in batch] == texts
    for batch in found:
        assert len(batch) == 1 or (sum(map(len, batch)) <= characters and len(batch) <= documents)
    for batch, after in pairwise(found):  # the next one did not fit
        assert len(batch) == documents or sum(map(len, batch)) + len(after[0]) > characters

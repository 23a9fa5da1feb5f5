"""Hugging Face data sets: a saved folder gives what the library gives; the hub is a server of ours on this machine."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neox.corpus import prepare, read_documents
from neox.corpus.readers import Chunk, Document, ErrorPolicy, find_sources, read_chunk, read_source
from neox.data import TokenFile
from neox.tokenizer import Tokenizer, train_bpe

datasets = pytest.importorskip("datasets", reason="the data extra is not installed: pip install 'neox-lm[data]'")
datasets.disable_progress_bars()
texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)


def save(rows: list[Any], folder: Path, **options: Any) -> Path:
    features = datasets.Features({"id": datasets.Value("int64"), "text": datasets.Value("string")})
    table = {"id": list(range(len(rows))), "text": rows}
    datasets.Dataset.from_dict(table, features).save_to_disk(folder, **options)
    return folder


@settings(deadline=None, max_examples=8)
@given(rows=st.lists(texts, max_size=12), shards=st.integers(1, 3))
def test_a_saved_data_set_gives_the_tokens_of_its_texts(
    tmp_path_factory: pytest.TempPathFactory, rows: list[str], shards: int
) -> None:
    tmp_path = tmp_path_factory.mktemp("saved")
    rows = [*rows, "the last"]  # no text at all is another test's
    folder = save(rows, tmp_path / "set", num_shards=min(shards, len(rows)))
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    tokenizer = train_bpe(["the cat sat on the mat"] * 20, 290, progress=False)
    for name, source in (("a", folder), ("b", lines)):
        assert prepare(source, tmp_path / "out" / name, tokenizer, progress=False).empty == rows.count("")
    for suffix in ("bin", "idx"):
        assert (tmp_path / "out" / f"a.{suffix}").read_bytes() == (tmp_path / "out" / f"b.{suffix}").read_bytes()
    size = sum(file.stat().st_size for file in folder.glob("*.arrow"))
    noted = json.loads((tmp_path / "out" / "a.json").read_text())["sources"]
    assert noted == [{"path": str(folder), "bytes": size}]
    (source,) = find_sources(folder)
    assert sum(document.taken for document in read_source(source, "text", ErrorPolicy("fail"))) == pytest.approx(size)


def test_a_saved_selection_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    """A data set that was shuffled is saved in its new order."""
    whole = datasets.Dataset.from_dict({"text": [f"document {n}" for n in range(3000)]}).shuffle(seed=1)
    chosen = whole.select(range(0, 3000, 2))
    chosen.save_to_disk(tmp_path / "set")
    assert list(read_documents(tmp_path / "set")) == chosen["text"][:]


def test_bad_rows_of_a_saved_data_set(tmp_path: Path) -> None:
    folder = save(["a", None, "b"] + ["c"] * 1500 + [None], tmp_path / "set")
    with pytest.raises(ValueError, match="set: row 1: key 'text' holds null, not a string.*data.on_error=skip"):
        list(read_documents(folder))
    policy = ErrorPolicy("skip")
    (source,) = find_sources(folder, on_error="skip")
    assert [text for text, *_ in read_source(source, "text", policy)] == ["a", "b"] + ["c"] * 1500
    assert [place.partition(": key")[0] for place in policy.skipped["no text"].first] == [
        f"{folder}: row {row}" for row in (1, 1503)
    ]


@pytest.mark.parametrize(
    ("key", "words"),
    [("body", "no key 'body' .keys here: 'id', 'text'."), ("id", "column 'id' holds int64, not text")],
)
def test_the_wrong_column_of_a_saved_data_set(tmp_path: Path, key: str, words: str) -> None:
    folder = save(["a", "b"], tmp_path / "set")
    with pytest.raises(ValueError, match=words):
        read_documents(folder, key)
    policy = ErrorPolicy("skip")
    (source,) = find_sources(folder, key, "skip")
    assert list(read_source(source, key, policy)) == []
    assert [skipped.documents for skipped in policy.skipped.values()] == [2]


def test_a_damaged_saved_data_set(tmp_path: Path) -> None:
    folder = save(["a" * 100] * 100, tmp_path / "set")
    (arrow,) = folder.glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:3000])
    with pytest.raises(ValueError, match="set: no data set that `datasets` can load .*: fetch it or save it") as caught:
        read_documents(folder)
    assert "\n" not in str(caught.value)
    assert list(read_documents(folder, on_error="skip")) == []
    tokenizer = train_bpe(["the cat"], 290, progress=False)
    with pytest.raises(ValueError, match=r"every document is empty or was left out \(1 damaged, first .*set: no data"):
        prepare(folder, tmp_path / "out", tokenizer, progress=False, on_error="skip")


def test_saved_dataset_of_several_splits_names_them(tmp_path: Path) -> None:
    parts = {split: datasets.Dataset.from_dict({"text": [split]}) for split in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "set")
    with pytest.raises(ValueError, match="several splits; name one of them: .*set/test or .*set/train"):
        read_documents(tmp_path / "set")
    assert list(read_documents([tmp_path / "set" / "train", tmp_path / "set" / "test"])) == ["train", "test"]
    with pytest.raises(ValueError, match="is the same as"):
        read_documents([tmp_path / "set" / "train", tmp_path / "set" / "train"])


# --- the hub ---------------------------------------------------------------------------------------------------------

COMMITS = {"main": "a" * 40, "old": "b" * 40}
HUB_ROWS = [f"document {n}" for n in range(1500)]


def hub_files(folder: Path) -> dict[str, dict[str, bytes]]:
    """Files of each repository of the hub, by path."""
    card = (
        "---\nconfigs:\n- {config_name: one, data_files: one.jsonl}\n- {config_name: two, data_files: two.jsonl}\n---\n"
    )
    pq.write_table(pa.table({"id": range(1500), "text": HUB_ROWS}), folder / "a.parquet", row_group_size=700)
    info = [{"name": "id", "dtype": "int64"}, {"name": "text", "dtype": "string"}]
    stated = {"features": info, "splits": [{"name": "train", "num_bytes": 45000, "num_examples": 1500}]}
    return {
        "o/table": {
            "data/train-00000-of-00001.parquet": (folder / "a.parquet").read_bytes(),
            "README.md": f"---\ndataset_info: {json.dumps(stated)}\n---\n".encode(),
        },
        "o/lines": {"data/train.jsonl": _lines("a", "b"), "data/test.jsonl": _lines("c")},
        "o/two": {"one.jsonl": _lines("first"), "two.jsonl": _lines("second"), "README.md": card.encode()},
        "o/bad": {"data/train.jsonl": _lines("a") + b"no json\n"},
    }


def _lines(*rows: str) -> bytes:
    return b"".join(json.dumps({"text": row}).encode() + b"\n" for row in rows)


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's interface as `datasets` asks for: repository, tree, paths, files with ranges."""

    files: dict[str, dict[str, bytes]]
    asked: list[str]

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.asked.append(path)
        repo = next((name for name in self.files if f"/datasets/{name}" in path), "")
        rest = path.partition(f"/datasets/{repo}")[2].strip("/").split("/") if repo else []
        if not repo or (len(rest) > 1 and rest[1] not in (*COMMITS, *COMMITS.values())):
            self.reply(404, b"", {"x-error-code": "RepoNotFound" if not repo else "RevisionNotFound"})
            return
        sha = COMMITS.get(rest[1] if len(rest) > 1 else "main", rest[1] if len(rest) > 1 else "")
        files = self.files[repo] if sha == COMMITS["main"] else {"data/train.jsonl": _lines("from the old one")}
        entries = [
            {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for name, content in files.items()
        ]
        if rest[:1] == ["resolve"]:
            self.send(files.get("/".join(rest[2:])), sha)
        elif rest[:1] == ["paths-info"]:
            names = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode())["paths"]
            self.reply(200, json.dumps([entry for entry in entries if entry["path"] in names]).encode())
        elif rest[:1] == ["tree"]:
            folder = "".join(part + "/" for part in rest[2:])
            below = [entry for entry in entries if str(entry["path"]).startswith(folder)]
            direct = [entry for entry in below if "/" not in str(entry["path"]).removeprefix(folder)]
            if len(direct) < len(below):
                direct.append({"type": "directory", "path": "data", "oid": "0" * 40, "size": 0})
            self.reply(200, json.dumps(direct).encode())
        else:
            about = {"_id": "1", "id": repo, "sha": sha, "siblings": [{"rfilename": name} for name in files]}
            self.reply(200, json.dumps(about | {"private": False, "gated": False, "disabled": False}).encode())

    do_GET = do_POST = do_HEAD = answer

    def send(self, content: bytes | None, sha: str) -> None:
        if content is None:
            self.reply(404, b"", {"x-error-code": "EntryNotFound"})
            return
        headers = {"etag": f'"{hashlib.sha1(content).hexdigest()}"', "x-repo-commit": sha}
        wanted = self.headers.get("range")
        if not wanted:
            self.reply(200, content, headers)
            return
        first, last = wanted.removeprefix("bytes=").split("-")
        end = min(int(last or len(content)), len(content) - 1)
        headers["content-range"] = f"bytes {first}-{end}/{len(content)}"
        self.reply(206, content[int(first) : end + 1], headers)

    def reply(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"content-length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


READ = """
import json, sys
from neox.corpus import read_documents
from neox.corpus.readers import Document, ErrorPolicy, Chunk, find_sources, read_chunk, read_source
for name in sys.argv[1:]:
    try:
        source, *_ = find_sources(name.split())
        rows = [list(document[:2]) for document in read_source(source, "text", ErrorPolicy("fail"))]
        print(json.dumps([rows, source.size, source.manifest_entry]))
    except ValueError as error:
        print(json.dumps(str(error)))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, str], list[str]]]:
    """The environment of a process that takes the server for the hub, and the paths that it was asked for."""
    folder = tmp_path_factory.mktemp("hub")
    asked: list[str] = []
    handler = type("Handler", (Hub,), {"files": hub_files(folder), "asked": asked})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    place = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(folder / "home"), "NO_PROXY": "*"}
    yield {**os.environ, **place, "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "HF_TOKEN": ""}, asked
    server.shutdown()
    server.server_close()
    thread.join()


def read(environment: dict[str, str], *names: str) -> list[Any]:
    done = subprocess.run(
        [sys.executable, "-c", READ, *names], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_hub_dataset_is_streamed(hub: tuple[dict[str, str], list[str]]) -> None:
    environment, asked = hub
    names = ["hf:o/table", "hf:o/lines#test", "hf:o/two:two", "hf:o/lines@old", "hf:o/two:one@main#train"]
    table, lines, second, old, first = read(environment, *names)
    records, size, noted = table
    assert [text for text, _ in records] == HUB_ROWS
    assert (size, sum(share for _, share in records)) == (45000, pytest.approx(45000))
    assert noted == {"path": "hf:o/table", "bytes": 45000, "revision": COMMITS["main"]}
    assert lines[:2] == [[["c", 1]], None]  # nothing says how much there is: the bar shows bytes of text
    assert second[0] == [["second", 6]]
    assert old[0] == [["from the old one", 16]]
    assert old[2]["revision"] == COMMITS["old"]
    assert first[0] == [["first", 5]]
    # All that was read was asked for by the commit, so that a push in between changes nothing.
    read_paths = [path for path in asked if "/resolve/" in path]
    assert read_paths
    assert all(any(sha in path for sha in COMMITS.values()) for path in read_paths)


def test_hub_dataset_errors_are_one_line(hub: tuple[dict[str, str], list[str]]) -> None:
    names = {
        "hf:o/none": "cannot be opened: 404 Client Error",
        "hf:o/lines@never": "cannot be opened: 404 Client Error",
        "hf:o/lines#valid": "cannot be opened: Bad split: valid. Available splits: ['train', 'test']",
        "hf:o/lines:big": "cannot be opened: BuilderConfig 'big' not found. Available: ['default']",
        "hf:o/two": "cannot be opened: Config name is missing. Please pick one among the available configs",
        "hf:o/bad": "row 0: cannot be read on: ",
        "hf:o/n/m": "not a name on the hub; write hf:OWNER/NAME[:CONFIG][@REVISION][#SPLIT]",
        "hf:": "not a name on the hub",
        "hf:o/n#": "not a name on the hub",
        "hf:o/lines hf:o/lines:default@main#train": "is the same as hf:o/lines; its text would come twice",
    }
    for name, found in zip(names, read(hub[0], *names), strict=True):
        assert isinstance(found, str), name
        assert found.startswith(name.split()[-1])
        assert f": {names[name]}" in found
        assert "\n" not in found
        assert len(found) < 400


@pytest.mark.slow
def test_hub_dataset_through_the_command_line(hub: tuple[dict[str, str], list[str]], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "neox", "prepare", "hf:o/table", f"out={tmp_path / 'out'}", "vocab_size=300"]
    done = subprocess.run(command, env=hub[0], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    file, tokenizer = TokenFile(tmp_path / "out"), Tokenizer.from_file(f"{tmp_path / 'out'}-tokenizer.json")
    assert [tokenizer.decode(file.document(n).tolist()[:-1]) for n in range(len(file))] == HUB_ROWS
    noted = json.loads((tmp_path / "out.json").read_text())["sources"]
    assert noted == [{"path": "hf:o/table", "bytes": 45000, "revision": COMMITS["main"]}]
    assert "45.0/45.0 kB" in done.stderr


def test_a_data_set_of_many_files_is_opened_once(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    class Counted:
        def __init__(self, name: str) -> None:
            opened.append(name)

        def documents(self, piece: Chunk, *_: Any) -> Iterator[Document]:
            yield Document(f"file {piece.start}")

    monkeypatch.setattr("neox.corpus.readers.hub_datasets.HubDataset", Counted)
    pieces = [Chunk("hf:o/counted@c#train", "hub", number) for number in range(3)]
    texts = [document.text for piece in pieces for document in read_chunk(piece, "text", ErrorPolicy("fail"))]
    assert texts == ["file 0", "file 1", "file 2"]
    assert opened == ["hf:o/counted@c#train"]

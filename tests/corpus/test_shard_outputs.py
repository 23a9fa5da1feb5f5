"""Prepare by parts: the same bytes from any number of processes, after any interruption; and each way it can fail."""

import hashlib
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from neox.corpus import prepare
from neox.data import TokenFile
from neox.tokenizer import Tokenizer, train_bpe

ROOT = Path(__file__).resolve().parents[2]
ROWS = [f"document {n}: " + "the cat sat on the mat, the dog on the log\n" * (n % 7) for n in range(600)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["the cat sat on the mat, the dog on the log"] * 20, 290, progress=False)


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("readers.chunks", "readers.streams", "readers.text", "readers.columns", "shards"):
        monkeypatch.setattr(f"neox.corpus.{module}.CHUNK_BYTES", 9000)
    monkeypatch.setattr("neox.corpus.plan.PATIENCE", 0.3)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """The rows, a third of them in each of three kinds of files."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    lines = [json.dumps({"text": row}).encode() + b"\n" for row in ROWS]
    (folder / "a.jsonl").write_bytes(b"".join(lines[:200]))
    (folder / "b.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(b"".join(lines[200:400])))
    table = pa.table({"text": ROWS[400:]})
    plain = {"write_page_checksum": True, "use_dictionary": False, "compression": "none"}
    pq.write_table(table, folder / "c.parquet", row_group_size=50, **plain)
    return folder


def content(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}.{suffix}").read_bytes() for suffix in ("bin", "idx")]


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_same_bytes_from_any_number_of_workers(tmp_path: Path, corpus: Path, tokenizer: Tokenizer) -> None:
    """And the same as one document after another by the reference."""
    manifests = []
    for workers in (1, 2, 3):
        prefix = tmp_path / f"out{workers}" / "c"
        report = prepare(corpus, prefix, tokenizer, progress=False, workers=workers)
        assert listing(prefix.parent) == ["c.bin", "c.idx", "c.json"]
        assert content(prefix) == content(tmp_path / "out1" / "c")
        manifests.append(json.loads(Path(f"{prefix}.json").read_text()))
    assert manifests[1:] == manifests[:1] * 2
    file = TokenFile(tmp_path / "out1" / "c")
    assert [file.document(i).tolist() for i in range(len(file))] == [[*tokenizer.encode(row), 0] for row in ROWS]
    assert (report.documents, report.tokens, report.bytes) == (600, len(file.tokens), len("".join(ROWS)))
    assert manifests[0]["sha256"] == hashlib.sha256(content(prefix)[0]).hexdigest()


def test_a_finished_run_reads_nothing(
    tmp_path: Path, corpus: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(corpus, tmp_path / "c", tokenizer, progress=False, workers=1)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in tmp_path.glob("c.*")}
    with monkeypatch.context() as patch:
        patch.setattr("neox.corpus.worker.reader", None)
        again = prepare(corpus, tmp_path / "c", tokenizer, progress=False, workers=1)
    assert again.done_before
    assert not first.done_before
    assert (again.documents, again.tokens, again.bytes) == (first.documents, first.tokens, first.bytes)
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in tmp_path.glob("c.*")} == before
    options = {"append_eod": False, "progress": False, "workers": 1}
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"c\.idx: exists, and not from this text with these settings: choose anoth"
        ):
            prepare(corpus, tmp_path / "c", tokenizer, **options)
        assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in tmp_path.glob("c.*")} == before
        (corpus / "a.jsonl").write_text('{"text": "another"}')
    assert prepare(corpus, tmp_path / "c", tokenizer, overwrite=True, **options).documents == 401
    assert prepare(corpus, tmp_path / "c", tokenizer, **options).done_before


def test_a_foreign_bin_file_is_not_overwritten(tmp_path: Path, corpus: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "c.bin").write_bytes(b"somebody's")
    with pytest.raises(ValueError, match=r"c\.bin: exists, and not from this text"):
        prepare(corpus, tmp_path / "c", tokenizer, progress=False, workers=1)
    assert (tmp_path / "c.bin").read_bytes() == b"somebody's"


def test_what_a_kill_after_the_end_left_is_removed(
    tmp_path: Path, corpus: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output is complete, the working folders are there still; those of another plan stay."""
    out, options = tmp_path / "out" / "c", {"progress": False, "workers": 1, "dedup": "exact"}
    unlink, deleted = Path.unlink, 0
    complete = out.with_suffix(".json")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    def killed_midway(path: Path, missing_ok: bool = False) -> None:
        nonlocal deleted
        if path.parent.name == "c.parts" and complete.exists() and (deleted := deleted + 1) == 3:
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    for name, value in {"neox.corpus.plan.ShardOutputs.remove": killed, "pathlib.Path.unlink": killed_midway}.items():
        with monkeypatch.context() as patch:
            patch.setattr(name, value)
            with pytest.raises(KeyboardInterrupt):
                prepare(corpus, out, tokenizer, **options)
        assert {"c.bin", "c.cleaning", "c.idx", "c.json", "c.parts"} <= set(listing(out.parent))
        assert prepare(corpus, out, tokenizer, **options).done_before
        assert listing(out.parent) == ["c.bin", "c.idx", "c.json", "c.removed.jsonl"]
        for name in listing(out.parent):
            unlink(out.parent / name)
    prepare(corpus, out, tokenizer, progress=False, workers=1)
    with monkeypatch.context() as patch:
        patch.setattr("neox.corpus.preparation._Job.join", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(corpus, out, tokenizer, append_eod=False, progress=False, workers=1, overwrite=True)
    parts = listing(out.parent / "c.parts")
    assert prepare(corpus, out, tokenizer, progress=False, workers=1).done_before
    assert listing(out.parent / "c.parts") == parts


KILLED = """
import sys
from neox.corpus import prepare
from neox.tokenizer import Tokenizer
for module in ("chunks", "streams", "text", "columns"):
    __import__(f"neox.corpus.readers.{module}")
    setattr(sys.modules[f"neox.corpus.readers.{module}"], "CHUNK_BYTES", 9000)
import neox.corpus.shards
neox.corpus.shards.CHUNK_BYTES = 9000
corpus, out, tokenizer, workers = sys.argv[1:]
prepare(corpus, out, Tokenizer.from_file(tokenizer), progress=False, workers=int(workers))
"""


def start(corpus: Path, out: Path, tokenizer: Path, workers: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", KILLED, str(corpus), str(out), str(tokenizer), str(workers)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def kill_and_go_on(corpus: Path, out: Path, tokenizer: Path, delays: Iterator[float], workers: int) -> int:
    """Kills run after run until one is done; how many were killed."""
    killed = 0
    while True:
        process = start(corpus, out, tokenizer, workers)
        try:
            _, err = process.communicate(timeout=next(delays, 100))
            assert process.returncode == 0, err
            return killed
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            killed += 1
            assert not Path(f"{out}.idx").exists() or TokenFile(out)


def test_resume_after_a_kill_gives_the_same_bytes(
    tmp_path: Path, corpus: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed once parts are there: they are not made again."""
    tokenizer.save(tmp_path / "t.json")
    prepare(corpus, tmp_path / "expected", tokenizer, progress=False, workers=1)
    out = tmp_path / "out" / "c"
    process = start(corpus, out, tmp_path / "t.json", 1)
    parts = tmp_path / "out" / "c.parts"
    deadline = time.monotonic() + 60
    while len(list(parts.glob("*.idx"))) < 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    process.communicate()
    made = {path.name: path.stat().st_ino for path in parts.glob("*.idx")}
    assert made
    assert not Path(f"{out}.idx").exists()
    module = importlib.import_module("neox.corpus.preparation")
    real, seen = module.write_shard, []

    def noted(parts: Any, plan: Any, shard: Any, *rest: Any) -> None:
        seen.append(shard.number)
        real(parts, plan, shard, *rest)

    monkeypatch.setattr(module, "write_shard", noted)
    prepare(corpus, out, tokenizer, progress=False, workers=1)
    assert seen
    assert not {int(name[:6]) for name in made} & set(seen)
    assert content(out) == content(tmp_path / "expected")
    assert listing(out.parent) == ["c.bin", "c.idx", "c.json"]


@pytest.mark.alone
@pytest.mark.slow
def test_resume_after_kills_at_ten_random_moments(tmp_path: Path, corpus: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(tmp_path / "t.json")
    prepare(corpus, tmp_path / "expected", tokenizer, progress=False, workers=1)
    draw = random.Random(5)
    started = time.monotonic()
    assert kill_and_go_on(corpus, tmp_path / "whole" / "c", tmp_path / "t.json", iter(()), 2) == 0
    whole = time.monotonic() - started
    killed = rounds = 0
    while killed < 10:
        out = tmp_path / f"out{rounds}" / "c"
        rounds += 1
        killed += kill_and_go_on(corpus, out, tmp_path / "t.json", (draw.uniform(0.2, whole) for _ in range(4)), 2)
        assert content(out) == content(tmp_path / "expected")
        assert listing(out.parent) == ["c.bin", "c.idx", "c.json"]
        assert rounds < 40


# --- policy ----------------------------------------------------------------------------------------------------------


def fails(corpus: Path, out: Path, tokenizer: Tokenizer, words: str, **options: Any) -> None:
    """One line that says `words`, and nothing at the output's name."""
    with pytest.raises((ValueError, OSError), match=words) as caught:
        prepare(corpus, out, tokenizer, progress=False, **{"workers": 1, **options})
    assert "\n" not in str(caught.value)
    assert not Path(f"{out}.idx").exists()
    assert not Path(f"{out}.bin.tmp").exists()


def damage(corpus: Path) -> dict[str, str]:
    """A cut zstd frame, a broken row group, a bad line: what is said of each file."""
    packed = corpus / "b.jsonl.zst"
    packed.write_bytes(packed.read_bytes()[:-200])
    table = bytearray((corpus / "c.parquet").read_bytes())
    table[table.index(b"document 470") + 3] ^= 1
    (corpus / "c.parquet").write_bytes(table)
    with (corpus / "a.jsonl").open("ab") as file:
        file.write(b"no json\n")
    return {
        "a.jsonl": r"a\.jsonl:201: not JSON",
        "b.jsonl.zst": r"b\.jsonl\.zst:[0-9]+: cut short",
        "c.parquet": r"c\.parquet: row [0-9]+: damaged",
    }


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_damaged_is_named_and_the_rest_goes_on(
    tmp_path: Path, corpus: Path, tokenizer: Tokenizer, workers: int
) -> None:
    for name, words in damage(corpus).items():
        fails(corpus / name, tmp_path / "one" / "c", tokenizer, f"{words}.*data.on_error=skip$", workers=workers)
    out = tmp_path / "c"
    report = prepare(corpus, out, tokenizer, progress=False, workers=workers, on_error="skip")
    rows = [json.loads(line) for line in Path(f"{out}.skipped.jsonl").read_text().splitlines()]
    assert [(row["reason"], Path(row["what"].partition(":")[0]).name) for row in rows] == [
        ("not JSON", "a.jsonl"),
        ("damaged", "b.jsonl.zst"),
        ("damaged", "c.parquet"),
    ]
    assert sum(row["documents"] for row in rows) == sum(kept.documents for kept in report.skipped.values())
    file = TokenFile(out)
    texts = [tokenizer.decode(file.document(n).tolist()[:-1]) for n in range(len(file))]
    assert texts[-150:] == ROWS[400:450] + ROWS[500:]
    assert texts[:-150] == ROWS[: len(texts) - 150]
    assert len(texts) >= 350


def test_finished_shards_of_a_failed_run_are_kept(tmp_path: Path, corpus: Path, tokenizer: Tokenizer) -> None:
    """The same command goes on once the data are mended, or with the fault left out."""
    (corpus / "d.jsonl").write_bytes(b'{"text": "one"}\nno json\n' + b'{"text": "two"}\n' * 800)
    out = tmp_path / "c"
    fails(corpus, out, tokenizer, r"d\.jsonl:2: not JSON.*data\.on_error=skip")
    made = {path.name: path.stat().st_ino for path in (tmp_path / "c.parts").glob("*.idx")}
    assert made
    assert prepare(corpus, out, tokenizer, progress=False, workers=1, on_error="skip").documents == 1401
    assert not (tmp_path / "c.parts").exists()
    with pytest.raises(ValueError, match=r"d\.jsonl:2: not JSON"):  # what was left out is wanted again
        prepare(corpus, out, tokenizer, progress=False, workers=1, overwrite=True)


def interrupted(corpus: Path, out: Path, tokenizer: Tokenizer) -> None:
    """A run that fails at its last shard, with all others done."""
    (corpus / "z.jsonl").write_bytes(b'{"text": "one"}\n' * 900 + b"no json\n")
    fails(corpus, out, tokenizer, r"z\.jsonl:901: not JSON")
    (corpus / "z.jsonl").unlink()


def test_a_file_that_changed_after_it_was_tokenized(tmp_path: Path, corpus: Path, tokenizer: Tokenizer) -> None:
    out = tmp_path / "c"
    interrupted(corpus, out, tokenizer)
    raw = (corpus / "a.jsonl").read_bytes()
    (corpus / "a.jsonl").write_bytes(raw.replace(b"document 3:", b"DOCUMENT 3:"))
    for _ in range(2):
        fails(corpus, out, tokenizer, r"a\.jsonl: has changed since this run of prepare began: put it back")
    report = prepare(corpus, out, tokenizer, progress=False, workers=1, on_error="skip")
    assert list(report.skipped) == ["changed"]
    file = TokenFile(out)
    texts = [tokenizer.decode(file.document(n).tolist()[:-1]) for n in range(len(file))]
    assert texts == [row.replace("document 3:", "DOCUMENT 3:") for row in ROWS]


def test_a_change_that_kept_size_and_time_is_noticed(tmp_path: Path, corpus: Path, tokenizer: Tokenizer) -> None:
    out, path = tmp_path / "c", corpus / "a.jsonl"
    interrupted(corpus, out, tokenizer)
    status, raw = path.stat(), path.read_bytes()
    path.write_bytes(raw.replace(b"document 3:", b"DOCUMENT 3:"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    for _ in range(2):
        fails(corpus, out, tokenizer, r"a\.jsonl: has changed since this run of prepare began")
    assert prepare(corpus, out, tokenizer, progress=False, workers=1, on_error="skip").documents == 600
    assert tokenizer.decode(TokenFile(out).document(3).tolist()[:-1]).startswith("DOCUMENT 3:")


def test_a_file_that_changes_while_it_is_tokenized(
    tmp_path: Path, corpus: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = importlib.import_module("neox.corpus.shards")
    real = shards.read_chunk

    def meanwhile(piece: Any, *rest: Any) -> Any:
        yield from real(piece, *rest)
        if piece.name.endswith("b.jsonl.zst"):
            os.utime(piece.name, (1, 1))

    monkeypatch.setattr(shards, "read_chunk", meanwhile)
    fails(corpus, tmp_path / "c", tokenizer, r"b\.jsonl\.zst: has changed since this run of prepare began")


@pytest.mark.parametrize(
    ("other", "what"),
    [({"text_key": "id"}, "data.text_key"), ({"append_eod": False}, "data.append_eod"), ({}, "tokenizer")],
)
def test_finished_shards_of_other_settings_are_refused(
    tmp_path: Path, corpus: Path, tokenizer: Tokenizer, other: dict[str, Any], what: str
) -> None:
    out = tmp_path / "c"
    interrupted(corpus, out, tokenizer)
    changed = tokenizer if other else train_bpe(["other text than before"] * 9, 290, progress=False)
    (corpus / "c.parquet").unlink()  # has no column "id", which would be said first
    for on_error in ("fail", "skip"):
        fails(corpus, out, changed, rf"c\.parts: its parts were made with another {what} ", on_error=on_error, **other)


def test_output_lock_refuses_a_second_run(tmp_path: Path, corpus: Path, tokenizer: Tokenizer) -> None:
    from neox.corpus.plan import ShardOutputs

    with ShardOutputs(tmp_path / "c").locked():
        fails(corpus, tmp_path / "c", tokenizer, r"c\.parts: another run is writing this output now; wait for it")
    assert prepare(corpus, tmp_path / "c", tokenizer, progress=False, workers=1).documents == 600


def test_a_damaged_shard_is_noticed(
    tmp_path: Path, corpus: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "c"
    interrupted(corpus, out, tokenizer)
    part = sorted((tmp_path / "c.parts").glob("*.bin"))[1]
    raw = bytearray(part.read_bytes())
    raw[10] ^= 1
    part.write_bytes(raw)
    fails(corpus, out, tokenizer, rf"{part.name}: damaged: its sha256 is no longer that of its manifest; remove it")
    part.unlink()
    assert prepare(corpus, out, tokenizer, progress=False, workers=1).documents == 600


@pytest.mark.parametrize("what", ["folder", "part", "temporary", "plan"])
def test_no_link_leads_out_of_the_output(tmp_path: Path, corpus: Path, tokenizer: Tokenizer, what: str) -> None:
    out, outside = tmp_path / "c", tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(b"precious")
    parts = tmp_path / "c.parts"
    if what == "folder":
        parts.symlink_to(outside)
        fails(corpus, out, tokenizer, r"c\.parts: is a link")
    else:
        interrupted(corpus, out, tokenizer)
        part = sorted(parts.glob("*.bin"))[0]
        if what == "part":
            part.unlink()
            part.symlink_to(outside / "file")
            fails(corpus, out, tokenizer, rf"{part.name}: is a link, and no part that prepare made")
        elif what == "temporary":
            part.with_suffix(".idx").unlink()
            part.with_name(part.name + ".tmp").symlink_to(outside / "file")
            fails(corpus, out, tokenizer, r"symbolic link|another process")
        else:
            (parts / "plan.json.tmp").symlink_to(outside / "file")
            fails(corpus, out, tokenizer, "symbolic link")
    assert [(path.name, path.read_bytes()) for path in outside.iterdir()] == [("file", b"precious")]


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path: Path, corpus: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "c.parts").mkdir()
    (tmp_path / "c.parts" / "thesis.txt").write_text("precious")
    fails(corpus, tmp_path / "c", tokenizer, r"c\.parts: is no folder of prepare; choose another output name")
    assert (tmp_path / "c.parts" / "thesis.txt").read_text() == "precious"


def test_killed_while_it_wrote_the_plan(tmp_path: Path, corpus: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "c.parts").mkdir()
    (tmp_path / "c.parts" / "plan.json.tmp").write_bytes(b'{"format": 1, "sett')
    assert prepare(corpus, tmp_path / "c", tokenizer, progress=False, workers=1).documents == 600
    assert not (tmp_path / "c.parts").exists()


def test_a_plan_that_is_none(tmp_path: Path, corpus: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "c.parts").mkdir()
    (tmp_path / "c.parts" / "plan.json").write_bytes(b"\x80\x04cos\nsystem\n.")
    fails(corpus, tmp_path / "c", tokenizer, r"plan\.json: no plan that `neox prepare` wrote; remove the folder")


@pytest.mark.parametrize("workers", [1, 2])
def test_disk_full_is_named_and_gone_on_from(tmp_path: Path, corpus: Path, tokenizer: Tokenizer, workers: int) -> None:
    tokenizer.save(tmp_path / "t.json")
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))\n" + KILLED
    out = tmp_path / "out" / "c"
    arguments = [str(corpus), str(out), str(tmp_path / "t.json"), str(workers)]
    done = subprocess.run([sys.executable, "-c", limited, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "File too large" in last
    assert str(out) in last
    assert not Path(f"{out}.idx").exists()
    assert not list(out.parent.rglob("*.tmp"))
    assert prepare(corpus, out, tokenizer, progress=False, workers=1).documents == 600


def test_a_process_that_is_killed_is_named(
    tmp_path: Path, corpus: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from neox.corpus import pool

    real = subprocess.Popen

    def doomed(*arguments: Any, **named: Any) -> Any:
        process = real(*arguments, **named)
        process.kill()
        return process

    monkeypatch.setattr(pool.subprocess, "Popen", doomed)
    fails(corpus, tmp_path / "c", tokenizer, r"a process that worked on it was killed by signal 9", workers=2)
    assert not (tmp_path / "c.parts").exists()


def test_no_process_outlives_a_run_that_was_killed(tmp_path: Path, corpus: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(tmp_path / "t.json")
    process = start(corpus, tmp_path / "c", tmp_path / "t.json", 2)
    lock = tmp_path / "c.parts" / "lock"
    while not (lock.exists() and children(process.pid)) and process.poll() is None:
        time.sleep(0.005)
    below = children(process.pid)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in below) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert below
    assert not any(Path(f"/proc/{pid}").exists() for pid in below)


def children(pid: int) -> list[int]:
    task = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(word) for word in task.read_text().split()] if task.exists() else []

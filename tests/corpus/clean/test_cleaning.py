"""What is left out of a corpus, as a whole: what stays, what is said of the rest, kills, workers, memory."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from neox.corpus import shards as shards_module
from neox.corpus.clean.cleaning import Cleaning
from neox.corpus.plan import Plan
from neox.corpus.readers import find_sources
from neox.corpus.shards import documents

EXAM = " ".join(f"exam{i}" for i in range(20))


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four files of a few documents, each file a shard, or several."""
    monkeypatch.setattr(shards_module, "CHUNK_BYTES", 1)
    draw = random.Random(3)
    texts = [" ".join(draw.choices([f"w{i}" for i in range(999)], k=120)) for _ in range(30)]
    texts += [*texts[5:15], *(text + " more" for text in texts[10:20]), texts[0] + f" {EXAM} " + texts[1], "", "", EXAM]
    draw.shuffle(texts)
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(4):
        rows = [json.dumps({"text": text}) for text in texts[number::4]]
        (folder / f"{number}.jsonl").write_text("\n".join(rows))
    (tmp_path / "exam.jsonl").write_text(json.dumps({"q": EXAM}))
    return folder


def cut(corpus: Path) -> Plan:
    plan = Plan.of(find_sources(corpus), {"text_key": "text"})
    assert len(plan.shards) == 4
    return plan


def cleaned(*arguments, workers: int = 1) -> Cleaning:
    cleaning = Cleaning.of(*arguments)
    with cleaning.found(workers, progress=False):
        pass
    return cleaning


def result(cleaning: Cleaning) -> tuple[list[str], list[dict], dict]:
    """The texts that stay, the rows on those that do not, and the counts."""
    texts = [document.text for shard in cleaning.shards for document in cleaning.documents(shard)]
    counts = cleaning.finish(cleaning.folder / "removed.jsonl")
    return texts, [json.loads(line) for line in (cleaning.folder / "removed.jsonl").open()], counts


def test_each_removed_duplicate_is_named_with_the_one_kept(corpus: Path, tmp_path: Path):
    plan = cut(corpus)
    texts, rows, counts = result(cleaned(plan, tmp_path / "out", "exact"))
    everything = [[document.text for document in documents(shard)] for shard in plan.shards]
    seen: set[str] = set()
    stays, goes = [], []
    for shard, of_shard in enumerate(everything):
        for number, text in enumerate(of_shard):
            (goes if text and text in seen else stays).append((shard, number, text))
            seen.add(text)
    assert texts == [text for _, _, text in stays]
    assert [(row["shard"], row["document"]) for row in rows] == [(shard, number) for shard, number, _ in goes]
    for row, (_, _, text) in zip(rows, goes, strict=True):
        kept = row["kept"]
        assert everything[kept["shard"]][kept["document"]] == text
        assert (kept["shard"], kept["document"]) < (row["shard"], row["document"])
        assert row["reason"] == "duplicate"
        for named in (row, kept):  # the file that it says, where each file is a shard
            assert named["source"] == str(corpus / f"{named['shard']}.jsonl")
    assert counts == {"duplicate": len(goes) == 10 and 10}


def test_near_duplicates_and_overlaps_together(corpus: Path, tmp_path: Path):
    exam = str(tmp_path / "exam.jsonl")
    cleaning = cleaned(cut(corpus), tmp_path / "out", "minhash", [exam])
    texts, rows, counts = result(cleaning)
    assert counts["near-duplicate"] == 20
    assert counts["overlap"] == {
        "documents": 2,
        "whole": 1,
        "sets": [{"name": exam, "examples": 1, "short": 0, "runs": 8, "documents": 2}],
    }
    assert not any("exam5" in text for text in texts)
    whole, parted = sorted((row for row in rows if row["reason"] == "overlap"), key=lambda row: row["pieces"])
    assert (whole["pieces"], whole["left"], whole["characters"]) == (0, 0, len(EXAM))
    assert parted["pieces"] == 2
    assert parted["overlaps"][0]["set"] == exam
    assert parted["overlaps"][0]["words"] == " ".join(EXAM.split()[:13])


def test_the_bar_gets_all_bytes_and_metadata_stay(corpus: Path, tmp_path: Path):
    cleaning = cleaned(cut(corpus), tmp_path / "out", "exact")
    shard = cleaning.shards[0]
    found = list(cleaning.documents(shard, meta_key="text"))
    assert all(document.meta == document.text for document in found)
    assert sum(document.taken for document in found) <= shard.size


def test_dedup_does_not_depend_on_the_number_of_workers(corpus: Path, tmp_path: Path):
    plan = cut(corpus)
    one = cleaned(plan, tmp_path / "one", "minhash")
    two = cleaned(plan, tmp_path / "two", "minhash", workers=2)
    assert result(one) == result(two)


def test_duplicates_are_reused_until_a_file_changes(corpus: Path, tmp_path: Path):
    first = cleaned(cut(corpus), tmp_path / "out", "exact")
    done = tmp_path / "out" / "repeats" / "done.json"
    before = done.stat().st_mtime_ns
    assert cleaned(cut(corpus), tmp_path / "out", "exact") == first
    assert done.stat().st_mtime_ns == before
    with (corpus / "3.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"text": "one more"}))
    with pytest.raises(ValueError, match=r"3.jsonl: changed while it was read; prepare it again"):
        result(first)
    second = cleaned(cut(corpus), tmp_path / "out", "exact")
    assert second.key != first.key
    assert result(second)[0][-1] == "one more"


@pytest.mark.parametrize("workers", [1, 2])
def test_decontaminate_read_errors_are_one_line(corpus: Path, tmp_path: Path, workers: int):
    (corpus / "2.jsonl").write_text("{")
    with pytest.raises(ValueError, match=r"2.jsonl:1: not JSON"):
        cleaned(cut(corpus), tmp_path / "out", "exact", workers=workers)
    (tmp_path / "short.jsonl").write_text('{"q": "too short"}')
    with pytest.raises(ValueError, match="none of its 1 examples has 13 words"):
        cleaned(cut(corpus), tmp_path / "out", None, [str(tmp_path / "short.jsonl")])


KILLED = """
import os, signal, sys
import rensa  # once, and not in every child
from pathlib import Path
from neox.corpus import shards as shards_module
from neox.corpus.clean.cleaning import Cleaning
from neox.corpus.plan import Plan
from neox.corpus.readers import find_sources

shards_module.CHUNK_BYTES = 1
corpus, exam, out, step = sys.argv[1:5]
fsync = os.fsync

def run(folder, last):
    calls = 0
    def counted(handle):
        nonlocal calls
        calls += 1
        if calls == last:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(handle)
    os.fsync = counted
    plan = Plan.of(find_sources(corpus), {"text_key": "text"})
    cleaning = Cleaning.of(plan, folder, "minhash", [exam])
    with cleaning.found(progress=False):
        texts = [document.text for shard in plan.shards for document in cleaning.documents(shard)]
    (folder / "texts").write_text(repr(texts))
    cleaning.finish(folder / "removed.jsonl")

for last in range(0, 60, int(step)):  # 0 kills never
    for attempt in (last, 0):
        child = os.fork()
        if not child:
            run(Path(out) / str(last), attempt)
            os._exit(0)
        killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert not (killed and not attempt)
        if last and attempt and not killed:
            print(last)  # it came to its end before
            sys.exit()
"""


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_dedup_killed_at_any_write_resumes_to_the_same_bytes(corpus: Path, tmp_path: Path, step: int):
    out = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED, str(corpus), str(tmp_path / "exam.jsonl"), str(out), str(step)]
    attempts = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert 10 < attempts < 60
    for name in ("texts", "removed.jsonl"):
        whole = (out / "0" / name).read_bytes()
        assert len(whole) > 1000
        assert all((out / str(last) / name).read_bytes() == whole for last in range(step, attempts, step))


PEAK = """
import resource, sys
from pathlib import Path
from neox.corpus.clean.cleaning import Cleaning
from neox.corpus.plan import Plan
from neox.corpus.readers import find_sources

plan = Plan.of(find_sources(sys.argv[1]), {"text_key": "text"})
cleaning = Cleaning.of(plan, Path(sys.argv[2]), "minhash", [sys.argv[3]])
with cleaning.found(progress=False):
    kept = sum(1 for shard in cleaning.shards for document in cleaning.documents(shard))
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.alone
@pytest.mark.slow
def test_dedup_memory_does_not_grow_with_the_text(tmp_path: Path):
    """20 times the text: less than 40 MB more at the peak, most of it the pages of key files that are mapped."""
    draw = random.Random(4)
    vocabulary = [f"word{i}" for i in range(20000)]
    texts = [" ".join(draw.choices(vocabulary, k=400)) for _ in range(3000)]
    (tmp_path / "exam.jsonl").write_text(json.dumps({"q": EXAM}))
    peaks = []
    for copies in (1, 20):  # 10 and 200 MB; each copy is another text, by a word in each place of 40
        path = tmp_path / f"{copies}.jsonl"
        with path.open("w") as file:
            for copy in range(copies):
                for text in texts:
                    file.write(json.dumps({"text": text.replace("7 ", f"7x{copy} ")}) + "\n")
        command = [sys.executable, "-c", PEAK, str(path), str(tmp_path / f"out{copies}"), str(tmp_path / "exam.jsonl")]
        kept, peak = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
        assert kept > 0.9 * copies * len(texts)
        peaks.append(peak * 1024)
    assert peaks[1] - peaks[0] < 40e6, f"{peaks[0] / 1e6:.0f} MB, then {peaks[1] / 1e6:.0f} MB"

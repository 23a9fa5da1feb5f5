"""prepare with what it leaves out: the tokens are those of the text that stays, from any number of processes."""

import importlib
import json
from pathlib import Path

import pytest

from neox.cli import main
from neox.corpus import prepare
from neox.corpus import shards as shards_module
from neox.corpus.clean.cleaning import Cleaning
from neox.data import TokenFile
from neox.tokenizer import Tokenizer, train_bpe

EXAM = " ".join(f"exam{i}" for i in range(20))
PAGE = " ".join(f"page{i}" for i in range(100))
LEAF = PAGE.replace("page", "leaf")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe([EXAM, PAGE, LEAF], vocab_size=300)


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three files, a shard each: the second repeats the first, the third holds an exam between two pages."""
    monkeypatch.setattr(shards_module, "CHUNK_BYTES", 1)
    folder = tmp_path / "corpus"
    folder.mkdir()
    texts = [["one", PAGE, ""], [PAGE, "two"], [f"{LEAF} {EXAM} {LEAF}", EXAM]]
    for number, of_file in enumerate(texts):
        (folder / f"{number}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in of_file))
    (tmp_path / "exam.jsonl").write_text(json.dumps({"question": EXAM}))
    return folder


@pytest.mark.parametrize("workers", [1, 2])
def test_prepare_dedup_and_decontaminate_tokens(corpus: Path, tmp_path: Path, tokenizer: Tokenizer, workers: int):
    out, exam = tmp_path / "out" / "clean", str(tmp_path / "exam.jsonl")

    def run():
        return prepare(
            corpus, out, tokenizer, progress=False, workers=workers, dedup="exact", decontaminate=[exam]
        )  # fmt: skip

    report = run()
    file = TokenFile(out)
    texts = [tokenizer.decode(file.document(n).tolist()[:-1]) for n in range(len(file))]
    assert texts == ["one", PAGE, "two", LEAF[:-199], LEAF[199:]]
    rows = [json.loads(line) for line in Path(f"{out}.removed.jsonl").read_text().splitlines()]
    assert [(row["shard"], row["document"], row["reason"]) for row in rows] == [
        (1, 0, "duplicate"),
        (2, 0, "overlap"),
        (2, 1, "overlap"),
    ]
    assert rows[0]["kept"] == {"source": str(corpus / "0.jsonl"), "shard": 0, "document": 1}
    assert report.left_out() == [
        "left out: 1 empty",
        "left out: 1 duplicates",
        "cut: 1 documents with overlaps; left out: 1 more of them",
        f"  {exam}: 1 examples in 2 documents",
        f"all of it: {out}.removed.jsonl",
    ]
    kept = ["clean.bin", "clean.idx", "clean.json", "clean.removed.jsonl"]
    assert sorted(path.name for path in out.parent.iterdir()) == kept
    again = run()
    assert again.done_before
    assert again.removed == report.removed
    assert sorted(path.name for path in out.parent.iterdir()) == kept
    assert not prepare(
        corpus, out, tokenizer, progress=False, workers=workers, dedup="exact", overwrite=True
    ).done_before


def test_prepare_reads_the_cleaning_once_a_process(
    corpus: Path, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    real, plans = Cleaning.from_plan, []
    monkeypatch.setattr(Cleaning, "from_plan", lambda plan: plans.append(plan) or real(plan))
    prepare(corpus, tmp_path / "clean", tokenizer, progress=False, workers=1, dedup="exact")
    assert [len(plan.shards) for plan in plans] == [3]


def test_prepare_cleaning_lock_refuses_a_second_run(
    corpus: Path, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    """The second is refused before it touches what the first has found."""
    monkeypatch.setattr("neox.corpus.plan.PATIENCE", 0.3)
    module, out = importlib.import_module("neox.corpus.preparation"), tmp_path / "clean"
    real = module.write_shard

    def content() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in Path(f"{out}.cleaning").rglob("*") if path.is_file()}

    def another(*arguments):
        before = content()
        with pytest.raises(ValueError, match=r"clean\.cleaning: another run is writing this output now"):
            prepare(corpus, out, tokenizer, progress=False, workers=1, dedup="minhash")
        assert content() == before
        real(*arguments)

    monkeypatch.setattr(module, "write_shard", another)
    assert prepare(corpus, out, tokenizer, progress=False, workers=1, dedup="exact").removed == {"duplicate": 1}


def test_prepare_dedup_by_the_command(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "clean"
    assert main(["prepare", str(corpus), f"out={out}", "vocab_size=300", "dedup=minhash", "workers=1"]) == 0
    assert "left out: 1 near-duplicates" in capsys.readouterr().out
    assert len(TokenFile(out)) == 5

"""What cannot be trained on is refused in one line, with exit status 1, and nothing half-written stays."""

import gzip
import json

import numpy as np
import pytest

from neox import cli
from neox.data import TokenWriter
from tests.train.helpers import TINY, complete, one_line, rows, token_pair


@pytest.fixture
def refuse(capsys, tmp_path):
    """`neox train ... out=RUN` must fail in one line that has the words, without a step or half a file."""

    def call(*arguments: str, words: tuple[str, ...], run=tmp_path / "run") -> str:
        already = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} if complete(run) else None
        status = cli.main(["train", *TINY, "steps=3", "tokenizer.vocab_size=300", f"out={run}", *arguments])
        out, err = capsys.readouterr()
        assert (status, out) == (1, "")
        line = one_line(err, *words)
        if already is not None:
            assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == already
            return line
        assert not list(run.rglob("*.tmp"))
        assert not list(run.glob("step_*"))
        assert not list(run.rglob("*.idx"))
        assert not (run / "metrics.jsonl").exists()
        return line

    return call


def text(tmp_path, name: str, content: bytes) -> str:
    (tmp_path / name).write_bytes(content)
    return f"data.train={tmp_path / name}"


ENOUGH = b"the quick brown fox jumps over the lazy dog\n" * 100
LINE = b'{"text": "the quick brown fox"}\n'


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", ("no text",)),
        ("empty.jsonl", b"\n\n", ("no text",)),
        ("bad.txt", ENOUGH + b"\xff\n", (r"bad\.txt:101: not UTF-8", "convert")),
        ("bad.jsonl", LINE * 4 + b'{"text": "\xff"}\n', (r"bad\.jsonl:5: not UTF-8", "convert")),
        ("cut.jsonl", LINE * 2 + b'{"text": "the\n', (r"cut\.jsonl:3: not JSON",)),
        ("key.jsonl", LINE + b'{"body": "the"}\n', (r"key\.jsonl:2: no key 'text'", "data.text_key")),
        ("a.docx", ENOUGH, ("unknown kind of file", r"\.txt, \.jsonl")),
        ("a.parquet", ENOUGH, (r"a\.parquet: no Parquet file", "data.on_error=skip")),
        ("cut.jsonl.gz", gzip.compress(LINE * 2, mtime=0)[:-9], (r"cut\.jsonl\.gz:\d: cut short", "fetch it")),
    ],
)
def test_text(tmp_path, refuse, name, content, words):
    refuse(text(tmp_path, name, content), "model.vocab_size=512", words=words)


def test_text_shorter_than_one_window(tmp_path, capsys):
    options = [*TINY, "model.vocab_size=512", "tokenizer.vocab_size=300", text(tmp_path, "short.txt", b"a fox")]
    assert cli.main(["train", *options, f"out={tmp_path / 'run'}"]) == 1
    one_line(capsys.readouterr().err, "seq_length 32 needs at least 33: lower data.seq_length or add text")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_text_that_is_missing_or_bad_only_in_the_held_out_part(tmp_path, refuse):
    refuse(f"data.train={tmp_path / 'absent.txt'}", words=(r"absent\.txt: no such file",))
    good = token_pair(tmp_path / "good")
    refuse(f"data.train={good}", f"data.valid={tmp_path / 'absent.txt'}", words=(r"absent\.txt: no such file",))
    (tmp_path / "valid.txt").write_bytes(ENOUGH)
    refuse(f"data.train={good}", f"data.valid={tmp_path / 'valid.txt'}", words=("good: is tokens", "tokenizer.path"))
    refuse(f"data.train={good}", f"data.valid={token_pair(tmp_path / 'short', tokens=9)}", words=("short.bin has 9",))


def test_data_of_two_tokenizers(tmp_path, refuse, capsys):
    """Ids of one tokenizer mean nothing to a model that is fed those of another."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} {i} {name * 3}\n" for i in range(500)))
        assert cli.main(["prepare", str(tmp_path / f"{name}.txt"), f"out={tmp_path / name}", "vocab_size=300"]) == 0
    capsys.readouterr()
    mixed = [f"data.train={tmp_path / 'a'}", "model.vocab_size=512"]
    refuse(*mixed, f"data.valid={tmp_path / 'b'}", words=(f"{tmp_path / 'b'}: made with another tokenizer",))
    run = tmp_path / "good"
    good = [*TINY, *mixed, f"data.valid={tmp_path / 'a.txt'}", "steps=1", "eval.every=1", f"out={run}"]
    assert cli.main(["train", *good]) == 0
    assert (run / "tokenizer.json").read_bytes() == (tmp_path / "a-tokenizer.json").read_bytes()
    assert (run / "data" / "valid-0.bin").read_bytes() == (tmp_path / "a.bin").read_bytes()


@pytest.mark.parametrize("suffix", ["bin", "idx"])
@pytest.mark.parametrize("damage", ["cut", "empty", "absent"])
def test_token_files(tmp_path, refuse, suffix, damage):
    prefix = token_pair(tmp_path / "tokens")
    file = prefix.with_suffix(f".{suffix}")
    whole = file.read_bytes()
    if damage == "absent":
        file.unlink()
    else:
        file.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"")
    words = "no such token file" if damage == "absent" else "damaged or incomplete"
    refuse(f"data.train={prefix}", words=(rf"tokens\.{suffix}: {words}", "prepare"))


def test_a_token_beyond_the_model(tmp_path, refuse, capsys):
    """Known at the start where `prepare` noted the vocabulary; else at the first batch that holds one."""
    prefix = token_pair(tmp_path / "tokens", vocab=70)
    noted = {"tokenizer_sha256": "", "vocab_size": 70}
    prefix.with_suffix(".json").write_text(json.dumps(noted))
    refuse(f"data.train={prefix}", words=("made with 70 tokens, model.vocab_size is 64: set model.vocab_size=70",))
    prefix.with_suffix(".json").unlink()
    run = tmp_path / "other"
    assert cli.main(["train", *TINY, f"data.train={prefix}", f"out={run}"]) == 1
    one_line(capsys.readouterr().err, r"token 6[4-9], model.vocab_size is 64: raise it")
    with TokenWriter(tmp_path / "negative", np.int32) as writer:
        writer.add_document([5, -1] * 1000)
    run = tmp_path / "third"
    assert cli.main(["train", *TINY, f"data.train={tmp_path / 'negative'}", f"out={run}"]) == 1
    one_line(capsys.readouterr().err, "token -1, model.vocab_size is 64")


def test_nothing_named(tmp_path, refuse):
    refuse(words=("data.train is empty", "neox prepare"))
    refuse(f"data.train={token_pair(tmp_path / 'a')}", "eval.every=1", words=("data.valid is empty", "eval.every=0"))
    assert not (tmp_path / "run").exists()


def test_config(tmp_path, refuse):
    data = f"data.train={token_pair(tmp_path / 'a')}"
    refuse(data, "stepz=3", words=("stepz: no such key; did you mean train.steps?",))
    refuse(data, "seq_length=5000", words=("data.seq_length: 5000 is more than",))
    refuse(data, "device=cuda", words=("device 'cuda' is not available",)) if not _cuda() else None
    (tmp_path / "file").write_text("")
    refuse(data, f"out={tmp_path / 'file'}", words=("file: is a file, no run directory",))


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def test_a_run_directory_that_holds_a_run(tmp_path, refuse, capsys):
    run, data = tmp_path / "run", f"data.train={token_pair(tmp_path / 'a')}"
    assert cli.main(["train", *TINY, data, f"out={run}", "steps=3"]) == 0
    capsys.readouterr()
    refuse(data, words=(f"{run}: holds a run: continue it with `neox train resume={run}`",))
    # Without a checkpoint its rows are what would be lost.
    (complete(run)[0] / ".metadata").unlink()
    assert cli.main(["train", *TINY, data, f"out={run}", "steps=3"]) == 1
    one_line(capsys.readouterr().err, "holds a run")
    assert len(rows(run)) == 3


def test_resume_of_nothing(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for run in (tmp_path / "absent", tmp_path / "empty"):
        assert cli.main(["train", f"resume={run}"]) == 1
        one_line(capsys.readouterr().err, f"{run}: holds no run", f"neox train ... out={run}")
    assert not (tmp_path / "absent").exists()


def test_resume_usage(tmp_path, capsys):
    assert cli.main(["train", "pythia-14m", f"resume={tmp_path}"]) == 2
    one_line(capsys.readouterr().err, "resume= continues the run with its own config: leave out pythia-14m")
    assert cli.main(["train", f"resume={tmp_path}", "out=elsewhere"]) == 2
    one_line(capsys.readouterr().err, "resumed in its own directory")


def test_a_run_that_was_moved_is_resumed_where_it_is(tmp_path):
    data = f"data.train={token_pair(tmp_path / 'a')}"
    assert cli.main(["train", *TINY, data, f"out={tmp_path / 'run'}", "steps=2"]) == 0
    (tmp_path / "run").rename(tmp_path / "moved here")
    assert cli.main(["train", f"resume={tmp_path / 'moved here'}", "steps=3"]) == 0
    assert len(rows(tmp_path / "moved here")) == 3
    assert not (tmp_path / "run").exists()

"""Training from text of any kind: what `neox prepare` reads, tokenized into the run once, and never asked for again."""

import gzip
import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from neox import cli
from neox.corpus import prepare
from neox.tokenizer import Tokenizer
from tests.train.helpers import TINY, one_line, rows

OPTIONS = (*TINY, "model.vocab_size=512", "tokenizer.vocab_size=300", "eval.every=1", "eval.batches=1", "steps=2")
TEXTS = [f"{n} times {n} is {n * n}" for n in range(400)]


@pytest.fixture
def sources(tmp_path):
    """The same text as lines, as a folder of two files, and as Parquet."""
    encoded = [json.dumps({"body": text}).encode() + b"\n" for text in TEXTS]
    (tmp_path / "a.jsonl").write_bytes(b"".join(encoded))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.jsonl").write_bytes(b"".join(encoded[:150]))
    (tmp_path / "folder" / "b.jsonl.gz").write_bytes(gzip.compress(b"".join(encoded[150:])))
    pq.write_table(pa.table({"body": TEXTS}), tmp_path / "a.parquet")
    return [tmp_path / "a.jsonl", tmp_path / "folder", tmp_path / "a.parquet"]


def test_any_source_trains_the_same_model_and_resumes_without_it(tmp_path, sources):
    results = []
    for source in sources:
        run = tmp_path / f"run-{source.name}"
        named = [f"data.train={source}", f"data.valid={source}", "text_key=body", f"out={run}"]
        assert cli.main(["train", *OPTIONS, *named]) == 0
        tokenizer = Tokenizer.from_file(run / "tokenizer.json")
        prepare(source, tmp_path / "beside", tokenizer, text_key="body", progress=False, overwrite=True)
        for kind in ("train", "valid"):
            assert (run / "data" / f"{kind}-0.bin").read_bytes() == (tmp_path / "beside.bin").read_bytes()
        shutil.rmtree(source) if source.is_dir() else source.unlink()
        assert cli.main(["train", f"resume={run}", "steps=3"]) == 0
        results.append([(row["step"], row.get("loss"), row.get("valid_loss")) for row in rows(run)])
    assert len(results[0]) >= 3
    assert results[1:] == results[:1] * 2


def test_faults_of_the_text(tmp_path, sources, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(sources[0].read_bytes() + b"no json\n")
    named = [f"data.train={sources[1]}", f"data.valid={bad}", "text_key=body", f"out={tmp_path / 'run'}"]
    assert cli.main(["train", *OPTIONS, *named]) == 1
    one_line(capsys.readouterr().err, r"bad\.jsonl:401: not JSON", "data.on_error=skip")
    assert cli.main(["train", *OPTIONS, *named, "on_error=skip"]) == 0
    err = capsys.readouterr().err
    assert f"{bad}: left out: 1 not JSON\n{bad}:   {bad}:401: not JSON" in err
    noted = json.loads((tmp_path / "run" / "data" / "valid-0.json").read_text())
    assert noted["skipped"]["not JSON"]["documents"] == 1


def test_what_is_wrong_with_a_later_source_is_said_before_the_first_is_read(tmp_path, sources, capsys):
    def refused(*names, words):
        listed = json.dumps([str(name) for name in names])
        named = [f"data.train={listed}", "text_key=body", f"out={tmp_path / 'run'}", "eval.every=0"]
        assert cli.main(["train", *OPTIONS, *named]) == 1
        one_line(capsys.readouterr().err, *words)
        assert not (tmp_path / "run" / "data").exists()

    (tmp_path / "first.jsonl").write_bytes(b"no json\n")
    refused(tmp_path / "first.jsonl", sources[0], sources[0], words=("is the same as",))
    refused(tmp_path / "first.jsonl", tmp_path / "absent.parquet", words=(r"absent\.parquet: no such file or folder",))
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "b.parquet")
    refused(tmp_path / "first.jsonl", tmp_path / "b.parquet", words=(r"b\.parquet: no key 'body'", "data.text_key"))


def test_tokens_beside_a_folder_of_the_same_name_are_what_is_meant(tmp_path, sources, capsys):
    assert cli.main(["prepare", str(sources[1]), f"out={sources[1]}", "vocab_size=300", "text_key=body"]) == 0
    (sources[1] / "b.jsonl.gz").unlink()  # as text it would be shorter
    named = [f"data.train={sources[1]}", f"data.valid={sources[1]}", f"out={tmp_path / 'run'}"]
    assert cli.main(["train", *OPTIONS, *named]) == 0
    assert not (tmp_path / "run" / "data").exists()

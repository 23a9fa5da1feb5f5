"""The shards under datatrove's own executors: the same bytes as `prepare` makes alone, from any number of tasks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from neox.corpus import prepare
from neox.tokenizer import Tokenizer, train_bpe

pytest.importorskip("datatrove", reason="needs datatrove: pip install 'neox-lm[cluster]'")
from neox.corpus.cluster import TokenizeShards, begin

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["the cat sat on the mat, the dog on the log"] * 20, 290, progress=False)


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for module in ("readers.chunks", "readers.streams", "readers.text", "readers.columns", "shards"):
        monkeypatch.setattr(f"neox.corpus.{module}.CHUNK_BYTES", 3000)
    monkeypatch.setattr("neox.corpus.plan.PATIENCE", 0.3)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {n}: the cat"}) + "\n" for n in range(600)))
    return path


def content(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}.{suffix}").read_bytes() for suffix in ("bin", "idx", "json")]


@pytest.mark.parametrize(("tasks", "workers"), [(1, 1), (3, 2), (9, 1)])
def test_datatrove_local_executor(tmp_path: Path, corpus: Path, tokenizer: Tokenizer, tasks: int, workers: int) -> None:
    from datatrove.executor import LocalPipelineExecutor

    prepare(corpus, tmp_path / "expected", tokenizer, progress=False, workers=1)
    out = tmp_path / "out" / "c"
    shards = begin([corpus], out, tokenizer)
    assert shards == 7
    step = TokenizeShards(out)
    LocalPipelineExecutor([step], tasks=tasks, workers=workers, logging_dir=str(tmp_path / "logs")).run()
    done = {path.name: path.stat().st_ino for path in Path(f"{out}.parts").glob("*.idx")}
    assert len(done) == shards
    with pytest.MonkeyPatch.context() as patch:  # nothing is left but to join
        patch.setattr("neox.corpus.shards.read_chunk", None)
        prepare(corpus, out, tokenizer, progress=False, workers=1)
    assert content(out) == content(tmp_path / "expected")
    assert sorted(path.name for path in out.parent.iterdir()) == ["c.bin", "c.idx", "c.json"]


def test_datatrove_tasks_lock_out_the_join(tmp_path: Path, corpus: Path, tokenizer: Tokenizer) -> None:
    out = tmp_path / "c"
    shards = begin([corpus], out, tokenizer)

    def other() -> None:
        with pytest.raises(ValueError, match=r"c\.parts: another run is writing this output now"):
            prepare(corpus, out, tokenizer, progress=False, workers=1)

    for rank in range(2):  # one after another here; each alone makes every second part
        list(TokenizeShards(out).run(None, rank, 2))
    from neox.corpus.plan import ShardOutputs

    with ShardOutputs(out).locked(shared=True):
        other()
    assert len(list(Path(f"{out}.parts").glob("*.idx"))) == shards


def test_datatrove_task_read_errors(tmp_path: Path, corpus: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(
        ValueError, match=r"none\.parts/plan\.json: no such plan; call neox\.corpus\.cluster\.begin first"
    ):
        list(TokenizeShards(tmp_path / "none").run())
    begin([corpus], tmp_path / "c", tokenizer)
    with corpus.open("a") as file:
        file.write("no json\n")
    with pytest.raises(ValueError, match=r"a\.jsonl: has changed since"):
        begin([corpus], tmp_path / "c", tokenizer)
    begin([corpus], tmp_path / "d", tokenizer)
    with pytest.raises(ValueError, match=r"a\.jsonl:601: not JSON"):
        list(TokenizeShards(tmp_path / "d").run())


def test_slurm_recipe_sends_a_job_array(tmp_path: Path, corpus: Path, tokenizer: Tokenizer) -> None:
    """With an sbatch of our own: datatrove writes the script, whose tasks are run as SLURM would, one by one."""
    tokenizer.save(tmp_path / "t.json")
    recipe = ROOT / "recipes" / "prepare_slurm.py"
    bin = tmp_path / "bin"
    bin.mkdir()
    fakes = {
        "sbatch": f'cat "${{@: -1}}" > {tmp_path}/job-$(ls {tmp_path} | grep -c job-).sh; echo Submitted batch job 7',
        "scontrol": "echo host",
        "srun": 'while [[ $1 != launch* ]]; do shift; done; exec "$@"',
    }
    for name, script in fakes.items():
        (bin / name).write_text(f"#!/bin/bash\n{script}\n")
        (bin / name).chmod(0o755)
    paths = f"{bin}:{Path(sys.executable).parent}:/usr/bin:/bin"
    environment = {"PATH": paths, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    command = [sys.executable, str(recipe), str(corpus), str(tmp_path / "c"), str(tmp_path / "t.json"), "tasks=2"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    job = tmp_path / "job-0.sh"
    assert "#SBATCH --array=0-" in job.read_text()
    environment |= {"SLURM_ARRAY_TASK_ID": "0", "SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NODELIST": "host"}
    done = subprocess.run(["bash", job], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "c.parts").glob("*.idx"))
    assert prepare(str(corpus), tmp_path / "c", tokenizer, progress=False, workers=1).documents == 600
    assert not (tmp_path / "c.parts").exists()

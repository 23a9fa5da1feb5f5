"""What `resume=` and `out=` may name: a run, one of its steps, and nothing else; no folder of others is written to."""

import hashlib
import shutil
from pathlib import Path

import pytest

import neox
from neox import cli
from neox.checkpoint.steps import folder_kind
from neox.train import run_config
from tests.tiny import ours
from tests.train.helpers import TINY, complete, one_line, rows, token_pair

STEPS = ("steps=8", "checkpoint.every=2", "checkpoint.early=0")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 8 steps with checkpoints at 2, 4, 6 and 8."""
    folder = tmp_path_factory.mktemp("finished")
    options = [*TINY, *STEPS, f"data.train={token_pair(folder / 'a')}", f"out={folder / 'run'}"]
    assert cli.main(["train", *options]) == 0
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def numbers(run: Path) -> list[int]:
    return [int(folder.name.removeprefix("step_")) for folder in complete(run)]


def test_a_step_is_resumed_in_its_run(run, finished, capsys):
    """Nothing is written inside the checkpoint; what lies beyond is set aside, and said; the losses come again."""
    step = digests(run / "step_00000004")
    for number, spelling in enumerate((run / "step_00000004", f"{run}/step_00000004/"), 1):
        later = [digests(run / name) for name in ("step_00000006", "step_00000008")]
        assert cli.main(["train", f"resume={spelling}", "steps=8"]) == 0
        said = capsys.readouterr().err
        aside = run / "set_aside" / f"step_00000004-{number}"
        assert f"goes on from step 4; set aside in {aside}: the checkpoints of 6, 8, and the rows" in said
        assert [digests(aside / name) for name in ("step_00000006", "step_00000008")] == later, (
            "bytes of what was there"
        )
        assert numbers(aside) == [6, 8]
        assert run_config(aside).train.steps == 8, "a run of its own"
        assert len(rows(aside)) == 8
        assert digests(run / "step_00000004") == step
        assert numbers(run) == [2, 4, 6, 8]
        assert [row["loss"] for row in rows(run)] == [row["loss"] for row in rows(finished)]


def test_a_damaged_step_is_refused_and_nothing_is_set_aside(run, capsys):
    file = run / "step_00000004" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    before = digests(run)
    assert cli.main(["train", f"resume={run / 'step_00000004'}"]) == 1
    one_line(capsys.readouterr().err, "step_00000004: is damaged: go on from another step")
    assert digests(run) == before


def test_a_step_with_nothing_beyond_is_the_run(run, capsys):
    assert cli.main(["train", f"resume={run / 'step_00000008'}"]) == 0
    assert "finished at step 8" in capsys.readouterr().out
    assert cli.main(["train", f"resume={run / 'step_00000008'}", "steps=9"]) == 0
    assert "set aside" not in capsys.readouterr().err
    assert numbers(run)[-1] == 9


def test_an_incomplete_step_is_refused(run, capsys):
    (run / "step_00000004" / ".metadata").unlink()
    before = digests(run)
    assert cli.main(["train", f"resume={run / 'step_00000004'}"]) == 1
    one_line(capsys.readouterr().err, "step_00000004: is no complete checkpoint")
    assert digests(run) == before


def test_a_run_whose_checkpoints_are_gone_is_not_begun_anew(run, capsys):
    """A disk that is not mounted, a purge: the rows stay as they are."""
    for folder in complete(run):
        shutil.rmtree(folder)
    before = digests(run)
    for resume in (f"resume={run}", "resume=auto"):
        arguments = [resume] if resume != "resume=auto" else [*TINY, f"out={run}", resume]
        assert cli.main(["train", *arguments, "steps=12"]) == 1
        one_line(
            capsys.readouterr().err, "metrics.jsonl goes up to step 8, but the checkpoints are gone: put them back"
        )
        assert digests(run) == before | {".lock": digests(run)[".lock"]}


def test_a_run_killed_before_its_first_checkpoint_begins_again_and_says_so(run, capsys):
    for folder in complete(run):
        shutil.rmtree(folder)
    (run / ".saved").unlink()  # its rows lie there
    assert cli.main(["train", f"resume={run}"]) == 0
    assert "no checkpoint had been written: begins again at step 1" in capsys.readouterr().err
    assert [row["step"] for row in rows(run)] == list(range(1, 9))


def test_what_a_run_directory_names_is_not_run_on_its_own_word(run, tmp_path, capsys):
    """A config.toml in a run that somebody sends may name task files, whose YAML imports functions."""
    evil = tmp_path / "evil"
    evil.mkdir()
    (evil / "task.yaml").write_text("task: evil\ndataset_path: json\ndoc_to_text: !function code.text\n")
    (evil / "code.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\ndef text(doc): return ''\n")
    text = (run / "config.toml").read_text()
    for key, value in (("include_path", f'"{evil}"'), ("tasks", f'["{evil / "task.yaml"}"]')):
        changed = text.replace("[eval]", f"[eval]\n{key} = {value}\ntasks_every = 1", 1)
        lines, seen = [], set()
        for line in changed.splitlines():  # the first of equal keys in a section
            name = line.partition(" =")[0]
            if line.startswith("["):
                seen = set()
            elif name and name in seen:
                continue
            seen.add(name)
            lines.append(line)
        (run / "config.toml").write_text("\n".join(lines))
        assert cli.main(["train", f"resume={run}", "steps=9"]) == 1
        one_line(capsys.readouterr().err, f"eval.{key} names {evil}", "name it again on the command line")
        assert not (tmp_path / "executed").exists()
        assert cli.main(["train", f"resume={run}", "steps=9", "eval.tasks_every=0"]) == 0
        capsys.readouterr()
        assert not (tmp_path / "executed").exists()


def test_a_new_run_writes_into_no_folder_of_others(finished, tmp_path, capsys):
    text, model = tmp_path / "text", tmp_path / "model"
    text.mkdir()
    (text / "a.txt").write_text("words " * 400)
    neox.save(ours(), model)
    home = tmp_path / "home"
    (home / "Documents").mkdir(parents=True)
    (home / ".profile").write_text("")
    (tmp_path / "file").write_text("")
    shutil.copytree(finished, tmp_path / "run")
    data = f"data.train={finished.parent / 'a'}"
    before = digests(tmp_path)
    for folder, words in (
        (tmp_path / "run" / "step_00000004", "is a checkpoint of"),
        (tmp_path / "run" / "step_00000004" / "new", "lies in the checkpoint"),
        (tmp_path / "run", "holds a run"),
        (model, "holds files that are no part of a run"),
        (text, "holds files that are no part of a run"),
        (home, "holds files that are no part of a run"),
        (tmp_path, "holds files that are no part of a run"),
        (tmp_path / "file", "is a file, no run directory"),
    ):
        for more in ((), ("resume=auto",) if folder != tmp_path / "run" else ()):
            assert cli.main(["train", *TINY, data, f"out={folder}", *more]) == 1, folder
            one_line(capsys.readouterr().err, words)
            changed = {name for name, digest in digests(tmp_path).items() if before.get(name) != digest}
            assert changed <= {"run/.lock"}, folder
    for folder in (model, text, home, tmp_path / "file", tmp_path / "nothing"):
        assert cli.main(["train", f"resume={folder}"]) == 1, folder
        one_line(capsys.readouterr().err, "holds no run")
    assert digests(tmp_path).keys() == before.keys() | {"run/.lock"}


def test_a_folder_with_logs_takes_a_run(finished, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "slurm-1.out").write_text("")
    data = f"data.train={finished.parent / 'a'}"
    assert cli.main(["train", *TINY, data, f"out={tmp_path / 'run'}", "steps=1"]) == 0


def test_kinds_of_folders(finished, tmp_path):
    model, empty = tmp_path / "model", tmp_path / "empty"
    neox.save(ours(), model)
    empty.mkdir()
    copied = shutil.copytree(finished, tmp_path / "copied")
    (copied / ".lock").unlink()
    kinds = {finished: "run", copied: "run", finished / "step_00000002": "step", model: "huggingface", empty: "empty"}
    kinds |= {tmp_path: "other", tmp_path / "absent": "absent", model / "config.json": "other"}
    assert {path: folder_kind(path) for path in kinds} == kinds


def test_a_run_may_be_named_like_a_step(finished, tmp_path):
    for name in ("step_test", "step_00000001"):
        run = shutil.copytree(finished, tmp_path / name)
        assert folder_kind(run) == "run"
        neox.load(run)
        assert cli.main(["train", f"resume={run}", "steps=9"]) == 0
        assert numbers(run)[-1] == 9


def test_a_restart_goes_on_where_the_step_was_pruned(run, monkeypatch):
    """torchrun gives each attempt the same arguments; the step that they name may be gone by then."""
    shutil.rmtree(run / "step_00000002")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    (run / ".launch").write_text("job")
    assert cli.main(["train", f"resume={run / 'step_00000002'}", "steps=9"]) == 0
    assert numbers(run) == [4, 6, 8, 9]


def test_a_run_that_saved_its_last_step_alone_is_not_begun_anew_either(finished, tmp_path, capsys):
    """No checkpoint was due before the end: the rows alone do not say that there was one."""
    run = tmp_path / "run"
    settings = [*TINY, f"data.train={finished.parent / 'a'}", "steps=3", "checkpoint.every=0", "checkpoint.early=0"]
    assert cli.main(["train", *settings, f"out={run}"]) == 0
    assert numbers(run) == [3]
    shutil.rmtree(run / "step_00000003")
    before = digests(run)
    assert cli.main(["train", f"resume={run}", "steps=4"]) == 1
    one_line(capsys.readouterr().err, "the checkpoints are gone", "after removing .saved and metrics.jsonl")
    assert digests(run) == before
    for name in (".saved", "metrics.jsonl"):  # as the line says
        (run / name).unlink()
    assert cli.main(["train", f"resume={run}"]) == 0

"""The command line: help, targets and options, errors in one line, exit statuses, a fast start."""

import gzip
import importlib.util
import json
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

import neox
from neox import cli
from neox.config import load_config, presets
from neox.planning import show

ROOT = Path(neox.__file__).parents[1]


def run(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "neox", *arguments], cwd=ROOT, text=True, capture_output=True, timeout=60, **options
    )


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def neox_(capsys):
    """Run a command in this process: (exit status, stdout, stderr)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        status = cli.main(arguments)
        return (status, *capsys.readouterr())

    return call


def fails(result: tuple[int, str, str], status: int, *words: str) -> None:
    assert result[0] == status
    assert result[1] == ""
    assert result[2].startswith("neox: error: ")
    assert result[2].count("\n") == 1
    for word in words:
        assert word in result[2]


# --- help and a fast start -------------------------------------------------------------------------------------------


def test_help_has_a_line_for_each_verb(neox_):
    status, out, err = neox_("--help")
    for same in ((), ("-h",), ("help",)):
        assert neox_(*same) == (status, out, err), same
    assert (status, err) == (0, "")
    lines = {line.split()[0]: line for line in out.splitlines() if line.startswith("  ")}
    for name in cli.VERBS:
        assert importlib.import_module(f"neox.cli.{name}").__doc__.splitlines()[0] in lines[name]
    assert "Examples:" in out
    assert max(map(len, out.splitlines())) <= 100


def test_each_verb_has_help_with_examples(neox_):
    for name in cli.VERBS:
        for arguments in ([name, "--help"], [name, "target", "key=value", "-h"]):
            status, out, err = neox_(*arguments)
            assert (status, err) == (0, ""), arguments
            assert "Examples:" in out, name
            assert f"\n  neox {name}" in out, name
            assert max(map(len, out.splitlines())) <= 100, name


def test_version_is_that_of_the_package(neox_):
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert neox_("--version") == (0, f"neox {declared}\n", "")


@pytest.mark.parametrize(
    "code", ["import neox", "import neox; dir(neox)", "from neox.cli import main; main(['--help'])"]
)
def test_neither_torch_nor_pydantic_is_loaded(code):
    report = "import sys; print([m for m in ('torch', 'pydantic', 'numpy', 'rich') if m in sys.modules])"
    assert python(f"{code}; {report}").splitlines()[-1] == "[]"


def test_show_does_not_load_torch():
    code = "from neox.cli import main; main(['show', 'neox-20b']); import sys; print('torch' in sys.modules)"
    assert python(code).splitlines()[-1] == "False"


def test_help_is_fast():
    def once() -> float:
        started = time.perf_counter()
        assert run("--help").returncode == 0
        return time.perf_counter() - started

    assert min(once() for _ in range(5)) < 0.15


# --- show ------------------------------------------------------------------------------------------------------------


def test_show_lists_the_presets(neox_):
    status, out, _ = neox_("show")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()[1:]] == list(presets.names())


def test_show_resolves_targets_and_options(neox_, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("[optim]\nlr = 3e-4\n[train]\nsteps = 7\n")
    expected = load_config("pythia-70m", [file], ["steps=9"])
    assert (expected.optim.lr, expected.train.steps) == (3e-4, 9)
    for order in (["pythia-70m", str(file), "steps=9"], ["steps=9", str(file), "pythia-70m"]):
        assert neox_("show", *order) == (0, show(expected) + "\n", "")
    assert neox_("show", str(file)) == (0, show(load_config(files=[file])) + "\n", "")
    assert neox_("show", "lr=0.5") == (0, show(load_config(overrides=["lr=0.5"])) + "\n", "")


# --- errors ----------------------------------------------------------------------------------------------------------


def test_errors_of_what_was_given_exit_1(neox_, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("[train]\nstepz = 3\n")
    fails(neox_("show", "neox-21b"), 1, "no preset 'neox-21b'; did you mean neox-20b?")
    fails(neox_("show", "neox-20b", "stepz=3"), 1, "did you mean train.steps?")
    fails(neox_("show", str(file)), 1, f"{file}:2", "did you mean train.steps?")
    fails(neox_("show", "absent.toml"), 1, "absent.toml: no such file")


def test_errors_of_usage_exit_2(neox_):
    fails(neox_("shwo"), 2, "no verb 'shwo'; did you mean show?")
    fails(neox_("zzz"), 2, "no verb 'zzz'", *cli.VERBS)
    fails(neox_("show", "neox-20b", "--steps=3"), 2, "no flag --steps=3", "key=value")
    fails(neox_("show", "neox-20b", "pythia-14m"), 2, "one preset at a time")


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ValueError("two\nlines"), 1, "two lines"),
        (FileNotFoundError(2, "No such file or directory", "a.bin"), 1, "a.bin: No such file or directory"),
        (OSError("the disk is full"), 1, "the disk is full"),
        (cli.UsageError("not so"), 2, "not so"),
    ],
)
def test_what_a_verb_raises_becomes_one_line(neox_, monkeypatch, error, status, message):
    def failing(targets, options):
        raise error

    monkeypatch.setattr("neox.cli.show.run", failing)
    assert neox_("show") == (status, "", f"neox: error: {message}\n")


def test_an_interrupt_is_quiet(neox_, monkeypatch):
    def interrupted(targets, options):
        raise KeyboardInterrupt

    monkeypatch.setattr("neox.cli.show.run", interrupted)
    assert neox_("show") == (130, "", "")


def test_a_bug_is_not_hidden(monkeypatch):
    def broken(targets, options):
        raise AssertionError("an invariant")

    monkeypatch.setattr("neox.cli.show.run", broken)
    with pytest.raises(AssertionError, match="an invariant"):
        cli.main(["show"])


def test_a_reader_that_leaves_is_no_error():
    command = [sys.executable, "-m", "neox", "show"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert (process.wait(timeout=60), err) == (141, b"")


def test_arguments_are_split_into_targets_and_options(monkeypatch):
    seen = []
    monkeypatch.setattr("neox.cli.show.run", lambda targets, options: seen.append((targets, options)))
    assert cli.main(["show", "a.txt", "lr=1", "./x=y", "train.steps=a=b", "runs/a=b", "-", "out="]) == 0
    assert seen == [(["a.txt", "./x=y", "runs/a=b", "-"], ["lr=1", "train.steps=a=b", "out="])]


# --- prepare ---------------------------------------------------------------------------------------------------------


def test_prepare_usage(neox_):
    fails(neox_("prepare", "out=x"), 2, "needs a SOURCE")
    fails(neox_("prepare", "a.txt"), 2, "needs out=PREFIX")
    fails(neox_("prepare", "a.txt", "out=x", "lr=3"), 2, "prepare has no option lr;")
    fails(neox_("prepare", "a.txt", "out=x", "text_kee=3"), 2, "prepare has no option text_kee; did you mean text_key?")
    fails(neox_("prepare", "a.txt", "out=x", "vocab_size=none"), 1, "tokenizer.vocab_size: must be a valid integer")
    fails(neox_("prepare", "a.txt", "out=x", "vocab_size=9", "tokenizer=t.json"), 2, "not both")


def test_prepare_trains_a_tokenizer_or_takes_one(neox_, tmp_path):
    from neox.data import TokenFile
    from neox.tokenizer import Tokenizer

    text = "the quick brown fox jumps over the lazy dog\n" * 50
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.jsonl").write_text('{"body": "the lazy dog"}\n{"body": "a quick fox"}\n')
    trained, again = tmp_path / "new" / "a", tmp_path / "new" / "b"
    status, out, _ = neox_("prepare", str(tmp_path / "a.txt"), f"out={trained}", "vocab_size=300")
    assert status == 0
    tokenizer = Tokenizer.from_file(f"{trained}-tokenizer.json")
    assert tokenizer.vocab_size <= 300
    file = TokenFile(trained)
    assert tokenizer.decode(file.document(0).tolist()[:-1]) == text
    assert f"{len(file.document(0))} tokens" in out.replace(",", "")

    status, _, _ = neox_(
        "prepare",
        str(tmp_path / "b.jsonl"),
        f"out={again}",
        f"tokenizer={trained}-tokenizer.json",
        "text_key=body",
        "append_eod=false",
    )
    assert status == 0
    file = TokenFile(again)
    assert [tokenizer.decode(file.document(n).tolist()) for n in range(len(file))] == ["the lazy dog", "a quick fox"]
    sources = [str(tmp_path / "a.txt"), str(tmp_path / "absent.txt")]
    fails(neox_("prepare", *sources, f"out={tmp_path / 'other' / 'c'}"), 1, "absent.txt")
    assert not (tmp_path / "other").exists()


def test_prepare_says_what_it_left_out(neox_, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "the lazy dog"}\nno json\n{"text": ""}\n'))
    (folder / "notes.md").touch()
    options = (str(folder), f"out={tmp_path / 'out'}", "vocab_size=300")
    fails(neox_("prepare", *options), 1, "notes.md: unknown kind of file")
    fails(neox_("prepare", *options, "on_error=maybe"), 1, "data.on_error: must be 'fail' or 'skip'")
    status, out, _ = neox_("prepare", *options, "on_error=skip")
    assert status == 0
    lines = [line.partition(": unknown kind")[0].partition(": not JSON")[0] for line in out.splitlines()[2:]]
    assert lines == [
        "left out: 1 empty",
        "left out: 1 unknown kind",
        f"  {folder / 'notes.md'}",
        "left out: 1 not JSON",
        f"  {folder / 'a.jsonl.gz'}:2",
        f"all of it: {tmp_path / 'out.skipped.jsonl'}",
    ]
    rows = [json.loads(line) for line in (tmp_path / "out.skipped.jsonl").read_text().splitlines()]
    assert [(row["reason"], row["documents"]) for row in rows] == [("unknown kind", 1), ("not JSON", 1)]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out*")}
    status, out, _ = neox_("prepare", *options, "on_error=skip")
    assert status == 0
    assert "done before" in out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("out*")} == before
    other = (*options, "on_error=skip", "vocab_size=290")
    fails(neox_("prepare", *other), 1, "exists, and was not trained on this text with these options")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("out*")} == before
    assert neox_("prepare", *other, "overwrite=true")[0] == 0
    assert Path(tmp_path / "out-tokenizer.json").stat().st_mtime_ns > before[tmp_path / "out-tokenizer.json"]


# --- public names ----------------------------------------------------------------------------------------------------

PUBLIC = {
    "Config": "neox.config",
    "ModelConfig": "neox.config",
    "preset": "neox.config.presets",
    "Tokenizer": "neox.tokenizer",
    "GPTNeoX": "neox.model.decoder",
    "load": "neox.checkpoint",
    "save": "neox.checkpoint",
    "Trainer": "neox.train",
    "Engine": "neox.generate",
    "evaluate": "neox.evaluation",
}


def test_public_names():
    assert set(neox.__all__) == set(PUBLIC)
    assert set(PUBLIC) | {"__version__"} <= set(dir(neox))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = neox.nonsense


@pytest.mark.parametrize("name", [name for name, home in PUBLIC.items() if importlib.util.find_spec(home)])
def test_a_public_name_is_the_object_of_its_module(name):
    assert getattr(neox, name) is getattr(importlib.import_module(PUBLIC[name]), name)

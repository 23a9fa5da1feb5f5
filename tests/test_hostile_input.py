"""Hostile files and options over every reader: one line, not zero, at once; nothing runs, nothing changes.

A case is a verb's command, the file that is exchanged for it, and what lies there instead.
"""

import hashlib
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import neox
from neox import cli
from neox.tokenizer import train_bpe
from tests.tiny import ours
from tests.train.helpers import TINY, token_pair

TEXT = "the cat sat on the mat\n" * 400
DEEP = 100_000


class Evil:
    """A pickle that makes a file when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("EXECUTED",)


CONTENTS: dict[str, bytes] = {
    "nothing": b"",
    "no UTF-8": b"\xff\xfe\x00\x01",
    "a list": b"[]",
    "a number": b"7",
    "null": b"null",
    "an open object": b'{"a": ',
    "nested objects": b'{"a":' * DEEP,
    "nested lists": b"[" * DEEP + b"]" * DEEP,
    "a number of 5,000 digits": b'{"step": ' + b"9" * 5000 + b"}",
    "a pickle": pickle.dumps(Evil()),
    "nested TOML": b"a = " + b"[" * DEEP + b"]" * DEEP,
    "control sequences": b'\x1b[2J\x1b]0;owned\x07 = "',
}
NODES = ("a pipe", "a device", "a folder", "a loop of links")


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A run, a model, tokens and a recipe, all sound."""
    place = tmp_path_factory.mktemp("good")
    (place / "text.txt").write_text(TEXT)
    tokenizer = train_bpe([TEXT], 290, progress=False)
    tokenizer.save(place / "tokenizer.json")
    token_pair(place / "tokens")
    options = [*TINY, "steps=2", "checkpoint.every=2", "checkpoint.early=0", "log.out=run", "data.train=tokens"]
    here = Path.cwd()
    os.chdir(place)
    try:
        assert cli.main(["train", *options]) == 0
        assert cli.main(["prepare", "text.txt", "out=corpus", "tokenizer=tokenizer.json"]) == 0
    finally:
        os.chdir(here)
    neox.save(ours(vocab_size=300, num_hidden_layers=4), place / "model", tokenizer, shard_bytes=40_000)
    neox.save(ours(vocab_size=300), place / "single", tokenizer)
    (place / "recipe.toml").write_text("[train]\nsteps = 1\n")
    (place / "prompts.jsonl").write_text('{"prompt": "the"}\n')
    (place / "schema.json").write_text('{"type": "object"}')
    return place


def put(path: Path, what: str) -> None:
    """Exchange a file for something else."""
    if path.exists():
        path.unlink()
    if what in CONTENTS:
        path.write_bytes(CONTENTS[what])
    elif what == "a pipe":
        os.mkfifo(path)
    elif what == "a device":
        path.symlink_to("/dev/zero")
    elif what == "a folder":
        path.mkdir()
    else:
        path.symlink_to(path.name)


STEP = "run/step_00000002"
NEXT = ["train", "resume=run", "steps=3"]
ASK = ["prompt=the", "max_tokens=1", "temperature=0"]
# file: (command that reads it, what may lie there without harm: it is written anew, or means the same)
READERS: dict[str, tuple[list[str], set[str]]] = {
    "recipe.toml": (["train", "recipe.toml", *TINY, "data.train=tokens", "out=new"], {"nothing"}),
    "run/config.toml": (NEXT, set()),
    f"{STEP}/config.toml": (NEXT, set()),
    f"{STEP}/state.json": (NEXT, set()),
    f"{STEP}/checksums.json": (NEXT, set()),
    f"{STEP}/.metadata": (NEXT, set()),
    "model/config.json": (["generate", "model", *ASK], set()),
    "model/model.safetensors.index.json": (["generate", "model", *ASK], set()),
    "single/model.safetensors": (["generate", "single", *ASK], set()),
    "single/tokenizer.json": (["generate", "single", *ASK], set()),
    "tokens.idx": (["train", *TINY, "data.train=tokens", "out=new", "steps=1"], set()),
    "corpus.json": (["prepare", "text.txt", "out=corpus", "tokenizer=tokenizer.json"], set()),
    "tokenizer.json": (["prepare", "text.txt", "out=new", "tokenizer=tokenizer.json"], set()),
    "prompts.jsonl": (["generate", "single", "prompts=prompts.jsonl", "out=new.jsonl", "max_tokens=1"], set()),
    "schema.json": (["generate", "single", *ASK, "json_schema=schema.json"], set()),
}
CASES = [(file, what) for file in READERS for what in (*CONTENTS, *NODES) if what not in READERS[file][1]]


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink() and path.name != ".lock")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_there_are_a_hundred_cases_and_more():
    assert len(CASES) >= 100


@pytest.mark.parametrize("file", READERS)
def test_hostile_files_end_in_one_line(good, tmp_path, monkeypatch, capsys, file):
    command, harmless = READERS[file]
    if "json_schema=schema.json" in command:
        pytest.importorskip("llguidance")
    place = tmp_path / "place"
    shutil.copytree(good, place)
    monkeypatch.chdir(place)

    def stuck(*_: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, stuck)
    sound = (place / file).read_bytes()
    try:
        for what in (*CONTENTS, *NODES):
            if what in harmless:
                continue
            put(place / file, what)
            kept = digests(place)
            signal.alarm(20)
            status = cli.main(command)
            signal.alarm(0)
            err = capsys.readouterr().err
            assert status != 0, (what, err)
            assert "Traceback" not in err, (what, err)
            errors = [line for line in err.splitlines() if line.startswith("neox: error: ")]
            assert len(errors) == 1, (what, err)
            assert len(errors[0]) < 1200, (what, err)
            assert "\x1b" not in errors[0], (what, err)
            assert not (place / "EXECUTED").exists(), what
            assert digests(place).items() >= kept.items(), what
            target = place / file
            shutil.rmtree(target) if target.is_dir() and not target.is_symlink() else target.unlink()
            target.write_bytes(sound)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


ABSURD = {
    "a model of more memory than the machine has": (
        ["train", "data.train=tokens", *TINY, "model.vocab_size=1000000000", "model.hidden_size=1000000", "out=new"],
        "needs .* TB, this machine has",
    ),
    "layers without end": (
        ["train", "data.train=tokens", *TINY, "model.num_hidden_layers=1000000000"],
        "num_hidden_layers",
    ),
    "a seed of 21 digits": (["generate", "single", "prompt=a", "seed=100000000000000000000"], "generate.seed"),
    "an option of 5,000 digits": (["train", "steps=" + "9" * 5000, "data.train=tokens"], "train.steps"),
    "an option of nested lists": (["train", "data.train=" + "[" * 5000, "out=new"], "File name too long"),
    "a name with control sequences": (["generate", "\x1b[2Jmodel", "prompt=a"], r"\\x1b\[2Jmodel"),
    "a verb with control sequences": (["\x1b[2J"], r"no verb"),
}


def test_absurd_sizes_and_names_are_refused_before_anything_is_built(good, tmp_path, monkeypatch, capsys):
    shutil.copytree(good, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    for name, (command, words) in ABSURD.items():
        assert cli.main(command) in (1, 2), name
        err = capsys.readouterr().err
        lines = [line for line in err.splitlines() if line.startswith("neox: error: ")]
        assert len(lines) == 1, (name, err)
        assert "\x1b" not in err, name
        assert re.search(words, lines[0]), (name, lines)


def test_absurd_sizes_in_a_config_of_a_model_are_refused(good, tmp_path, monkeypatch, capsys):
    shutil.copytree(good, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    raw = json.loads(Path("single/config.json").read_text())
    for changes in (
        {"num_hidden_layers": 10**9},
        {"hidden_size": 10**9, "intermediate_size": 4 * 10**9, "num_attention_heads": 2},
        {"vocab_size": 10**12},
        {"max_position_embeddings": 10**30},
        {"hidden_size": -4},
    ):
        Path("single/config.json").write_text(json.dumps(raw | changes))
        assert cli.main(["generate", "single", *ASK]) == 1, changes
        err = capsys.readouterr().err
        assert err.count("neox: error: ") == 1, (changes, err)
        assert "Traceback" not in err, (changes, err)


def test_a_closed_or_broken_standard_output_ends_quietly(good):
    environment = dict(os.environ, PYTHONPATH=str(Path(neox.__file__).parents[1]))
    command = f"{sys.executable} -m neox show pythia-14m"
    for shell in (f"{command} >&-", f"{command} | head -1 > /dev/null", f"{command} >&- 2>&-"):
        done = subprocess.run(shell, shell=True, cwd=good, env=environment, capture_output=True, text=True, timeout=120)
        assert "Traceback" not in done.stderr, (shell, done.stderr)
        assert "Exception ignored" not in done.stderr, (shell, done.stderr)

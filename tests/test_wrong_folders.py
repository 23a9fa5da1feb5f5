"""Each verb that writes, pointed at every wrong kind of folder: nothing changes but what the verb owns."""

import hashlib
from pathlib import Path

import pytest

import neox
from neox import cli
from neox.tokenizer import train_bpe
from tests.tiny import ours
from tests.train.helpers import TINY, token_pair

TEXT = "the cat sat on the mat\n" * 400


@pytest.fixture
def place(tmp_path):
    """A home-like folder: a run with steps, a model, tokens, text, documents of other programs."""
    data, run = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    (data / "text.txt").write_text(TEXT)
    tokenizer = train_bpe([TEXT], 290, progress=False)
    tokenizer.save(data / "tokenizer.json")
    token_pair(data / "tokens")
    options = [*TINY, "steps=4", "checkpoint.every=2", "checkpoint.early=0", f"data.train={data / 'tokens'}"]
    assert cli.main(["train", *options, f"out={run}"]) == 0
    neox.save(ours(vocab_size=300), tmp_path / "model", tokenizer)
    (tmp_path / "home" / "Documents").mkdir(parents=True)
    (tmp_path / "home" / "Documents" / "letter.txt").write_text("dear")
    (tmp_path / "home" / "config.toml").write_text("[editor]\n")
    return tmp_path


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


FOLDERS = ("run/step_00000002", "run", "model", "data", "home", "home/config.toml", "data/text.txt")


def commands(place: Path, target: Path) -> dict[str, list[str]]:
    """Every verb with an output, writing to `target`."""
    train = ["train", *TINY, f"data.train={place / 'data' / 'tokens'}", f"out={target}", "steps=1"]
    return {
        "train": train,
        "train, resume=auto": [*train, "resume=auto"],
        "train, resume": ["train", f"resume={target}", "steps=1"],
        "convert": ["convert", str(place / "model"), f"out={target}"],
        "convert, overwrite": ["convert", str(place / "model"), f"out={target}", "overwrite=true"],
        "eval": ["eval", str(place / "model"), "tasks=arc_easy", f"out={target}"],
        "generate": ["generate", str(place / "model"), "prompt=the", "max_tokens=1", f"out={target}"],
        "quickstart": ["quickstart", f"out={target}"],
    }


NAMES = list(commands(Path(), Path()))
# Where a command may write: resume of a run (which is finished: it says so), a model that overwrite replaces.
ALLOWED = {("train, resume=auto", "run"), ("train, resume", "run"), ("convert, overwrite", "model")}


def test_no_verb_writes_into_a_folder_that_it_does_not_own(place, capsys):
    before = digests(place)
    for folder in FOLDERS:
        for name in NAMES:
            if (name, folder) in ALLOWED or (name, folder) == ("train, resume", "run/step_00000002"):
                continue
            status = cli.main(commands(place, place / folder)[name])
            err = capsys.readouterr().err
            assert status != 0, (name, folder)
            assert "Traceback" not in err, (name, folder)
            assert digests(place) == before, (name, folder)


def test_prepare_keeps_files_that_it_did_not_write(place, capsys):
    """At the names of its own output: another program's .bin, .json, tokens of other text."""
    text, tokenizer = place / "data" / "text.txt", place / "data" / "tokenizer.json"
    other = place / "data" / "other"
    for name in ("other.bin", "other.idx", "other.json"):
        path = place / "data" / name
        path.write_text("{}" if name.endswith("json") else "somebody's")
        before = digests(place)
        assert cli.main(["prepare", str(text), f"out={other}", f"tokenizer={tokenizer}"]) == 1, name
        assert "choose another out" in capsys.readouterr().err, name
        assert digests(place) == before, name
        path.unlink()
    before = digests(place)
    assert cli.main(["prepare", str(text), f"out={place / 'data' / 'tokens'}", f"tokenizer={tokenizer}"]) == 1
    assert "overwrite=true" in capsys.readouterr().err
    assert digests(place) == before


def test_prepare_keeps_a_tokenizer_that_it_did_not_write(place, capsys):
    """A tokenizer of another program at the name of the copy; a refusal leaves no tokenizer of its own behind."""
    text, tokenizer = place / "data" / "text.txt", place / "data" / "tokenizer.json"
    kept = place / "data" / "new-tokenizer.json"
    command = ["prepare", str(text), f"out={place / 'data' / 'new'}", f"tokenizer={tokenizer}"]
    kept.write_text('{"mine": 1}')
    before = digests(place)
    assert cli.main(command) == 1
    assert "new-tokenizer.json: exists" in capsys.readouterr().err
    assert digests(place) == before
    assert cli.main([*command, "overwrite=true"]) == 0
    assert kept.read_bytes() == tokenizer.read_bytes()
    kept.unlink()  # tokens of another tokenizer than the one that would be trained
    for name in ("new", "foreign", "begun"):
        out = place / "data" / name
        if name != "new":
            Path(f"{out}.bin").write_bytes(b"somebody's")
        if name == "begun":  # a folder that only looks like the parts of prepare
            Path(f"{out}.parts").mkdir()
            Path(f"{out}.parts", "letter.txt").write_text("dear")
        before = digests(place)
        assert cli.main(["prepare", str(text), f"out={out}", "vocab_size=284"]) == 1, name
        assert "overwrite=true" in capsys.readouterr().err, name
        assert digests(place) == before, name


def test_the_same_work_again_is_done_before_or_replaced_on_request(place, capsys):
    text, tokenizer = place / "data" / "text.txt", place / "data" / "tokenizer.json"
    command = ["prepare", str(text), f"out={place / 'data' / 'new.v1'}", f"tokenizer={tokenizer}"]
    assert cli.main(command) == 0
    before = digests(place)
    assert before.keys() >= {f"data/new.v1{end}" for end in (".bin", ".idx", ".json", "-tokenizer.json")}
    assert cli.main(command) == 0
    assert "done before" in capsys.readouterr().out
    assert digests(place) == before
    assert cli.main([*command, "append_eod=false"]) == 1
    assert cli.main([*command, "append_eod=false", "overwrite=true"]) == 0
    convert = ["convert", str(place / "model"), f"out={place / 'copy'}"]
    assert cli.main(convert) == 0
    before = digests(place)
    assert cli.main([*convert, "dtype=bf16"]) == 1
    assert "overwrite=true" in capsys.readouterr().err
    assert digests(place) == before
    assert cli.main([*convert, "dtype=bf16", "overwrite=true"]) == 0

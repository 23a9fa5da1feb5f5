"""Token files whose bytes have changed at equal size: found by the hash in their manifest."""

import threading

import pytest

from neox import cli
from neox.corpus import prepare
from neox.data import byte_check
from neox.data.byte_check import check_bytes
from neox.data.manifest import manifest_file
from neox.tokenizer import train_bpe
from tests.train.helpers import TINY, complete, one_line


@pytest.fixture
def prefix(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("".join(f"line {number} of the text\n" for number in range(500)))
    prepare([text], tmp_path / "corpus", train_bpe([text.read_text()], 300, progress=False))
    return tmp_path / "corpus"


def change(prefix):
    file = prefix.with_suffix(".bin")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_changed_token_file_is_not_trained_on(prefix, tmp_path, capsys):
    """Neither by a new run nor by one that goes on; before the first step, as the file is small."""
    settings = [*TINY, "model.vocab_size=384", f"data.train={prefix}", "steps=2", f"out={tmp_path / 'run'}"]
    assert cli.main(["train", *settings]) == 0
    change(prefix)
    for arguments in ([f"resume={tmp_path / 'run'}", "steps=4"], [*settings, f"out={tmp_path / 'other'}"]):
        capsys.readouterr()
        assert cli.main(["train", *arguments]) == 1
        one_line(
            capsys.readouterr().err, "corpus.bin: its bytes are not those that `neox prepare` wrote", "corpus.json"
        )
    assert [step.name for step in complete(tmp_path / "run")] == ["step_00000002"]
    manifest_file(prefix).unlink()  # as of a pair that another program wrote: nothing to compare with
    check_bytes([prefix])()


def test_a_large_token_file_is_checked_in_the_background(prefix, monkeypatch, capsys):
    monkeypatch.setattr(byte_check, "AT_ONCE", 0)
    check_bytes([prefix], quiet=False)()
    assert "GB of token files are compared with their manifests in the background\n" in capsys.readouterr().err
    change(prefix)
    found = check_bytes([prefix])
    for thread in threading.enumerate():
        if thread.name == "token file check":
            thread.join()
    with pytest.raises(ValueError, match=r"corpus\.bin: its bytes"):
        found()


def test_a_change_found_in_the_background_ends_the_run(prefix, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(byte_check, "AT_ONCE", 0)
    change(prefix)
    settings = [*TINY, "model.vocab_size=384", f"data.train={prefix}", "steps=100000", f"out={tmp_path / 'run'}"]
    assert cli.main(["train", *settings]) == 1
    one_line(capsys.readouterr().err, "corpus.bin: its bytes are not those")

"""Checksums: every changed byte is detected and its file named; the checkpoint before takes its place."""

import hashlib
import io
import json
import random
import shutil

import pytest
import torch

import neox
from neox import cli
from neox.checkpoint import CheckpointError, DamagedCheckpoint, complete_steps, is_valid, load_tensors, read_step
from neox.checkpoint.checksums import Checksums
from neox.config import load_config
from neox.model.decoder import GPTNeoX
from neox.train import build_optimizers
from tests.train.helpers import TINY, assert_same_run, cut_back, one_line, rows, tensors, token_pair

FILES = {".metadata", "__0_0.distcp", "checksums.json", "config.toml", "state.json"}
OPTIONS = ("steps=6", "checkpoint.every=2")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One undisturbed run: never written to, only copied."""
    folder = tmp_path_factory.mktemp("run")
    data = f"data.train={token_pair(folder / 'train')}"
    assert cli.main(["train", *TINY, data, *OPTIONS, f"out={folder / 'run'}"]) == 0
    return folder / "run"


@pytest.fixture
def run(whole, tmp_path):
    return cut_back(whole, tmp_path / "run", 4)


def read_all(step):
    config, _ = read_step(step)
    model = GPTNeoX(config.model)
    load_tensors(step, [model], build_optimizers([model], config.optim))


def flip(path, draw=None):
    content = bytearray(path.read_bytes())
    place = draw.randrange(len(content)) if draw else len(content) // 2
    content[place] ^= draw.randrange(1, 256) if draw else 1
    path.write_bytes(content)


def test_checksums_json_is_as_described(whole):
    step = complete_steps(whole)[-1]
    assert {path.name for path in step.iterdir()} == FILES
    table = json.loads((step / "checksums.json").read_text())

    def digest(content):
        return hashlib.blake2b(content, digest_size=16).hexdigest()

    for name in (".metadata", "config.toml", "state.json"):
        assert table["files"].pop(name) == digest((step / name).read_bytes())
    assert not table["files"]
    content = (step / "__0_0.distcp").read_bytes()
    found = []
    for length, expected in table["pieces"]["__0_0.distcp"]:
        piece, content = content[:length], content[length:]
        assert expected == digest(piece)
        found.append(torch.load(io.BytesIO(piece), weights_only=True))
    assert content == b""
    stored = tensors(step, whole.parent)
    assert sum(tensor.numel() for tensor in found) == sum(tensor.numel() for tensor in stored.values())


def test_every_flipped_byte_fails_its_checksum(whole, tmp_path):
    step = shutil.copytree(whole / "step_00000006", tmp_path / "step_00000006")
    read_all(step)
    draw = random.Random(3)
    for number in range(60):
        path = step / sorted(FILES)[number % len(FILES)]
        good = path.read_bytes()
        flip(path, draw)
        with pytest.raises(DamagedCheckpoint) as caught:
            read_all(step)
        assert str(caught.value).startswith(f"{path}: "), number
        assert "it is damaged: remove the folder" in str(caught.value)
        assert ("(in tensor " in str(caught.value)) == (path.suffix == ".distcp")
        assert not is_valid(step)
        path.write_bytes(good)
    assert is_valid(step)


def test_a_truncated_or_missing_file_fails_its_checksum(whole, tmp_path):
    step = shutil.copytree(whole / "step_00000006", tmp_path / "step_00000006")
    for name in sorted(FILES - {".metadata"}):  # without .metadata the checkpoint is incomplete
        path = step / name
        content = path.read_bytes()
        for share in (0.0, 0.5, 0.9999, None):
            path.unlink()
            if share is not None:
                path.write_bytes(content[: int(share * len(content))])
            with pytest.raises(DamagedCheckpoint) as caught:
                read_all(step)
            assert str(caught.value).startswith(f"{path}: "), share
            path.write_bytes(content)


def test_a_failed_checksum_names_the_tensor(whole, tmp_path):
    step = shutil.copytree(whole / "step_00000006", tmp_path / "step_00000006")
    sums = Checksums(step)
    (file, offset), _ = list(sums.pieces.items())[5]
    with open(step / file, "r+b") as out:
        out.seek(offset + 700)
        byte = out.read(1)[0]
        out.seek(offset + 700)
        out.write(bytes([byte ^ 64]))
    with pytest.raises(DamagedCheckpoint, match=r"__0_0.distcp: its bytes .* \(in tensor (model|optim)\.[a-z]"):
        read_all(step)


# --- the one before it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["__0_0.distcp", "state.json", ".metadata"])
def test_resume_falls_back_from_a_damaged_checkpoint(run, whole, tmp_path, capsys, name):
    flip(run / "step_00000004" / name)
    assert cli.main(["train", f"resume={run}", "checkpoint.keep_last=2"]) == 0
    err = capsys.readouterr().err
    (line,) = [line for line in err.splitlines() if "warning" in line]
    assert line.startswith(f"neox: warning: {run / 'step_00000004' / name}: ")
    assert line.endswith(": damaged, using the checkpoint before it")
    assert [path.name for path in complete_steps(run)] == ["step_00000004", "step_00000006"]
    assert all(is_valid(path) for path in complete_steps(run))  # step 4 was written again
    assert_same_run(run, whole, tmp_path)


def test_keep_last_does_not_count_a_damaged_checkpoint(run, capsys):
    """Otherwise keep_last would remove the valid checkpoint that the run resumed from."""
    flip(run / "step_00000004" / "__0_0.distcp")
    assert cli.main(["train", f"resume={run}", "steps=3", "checkpoint.keep_last=1"]) == 0
    assert [path.name for path in complete_steps(run)] == ["step_00000003"]
    assert (run / "step_00000004" / ".metadata.damaged").exists()


def test_resume_of_a_finished_run_rewrites_its_damaged_checkpoint(whole, tmp_path, capsys):
    run = cut_back(whole, tmp_path / "run", 6)
    flip(run / "step_00000006" / "__0_0.distcp")
    assert cli.main(["train", f"resume={run}"]) == 0
    assert "6 steps done" in capsys.readouterr().out
    assert_same_run(run, whole, tmp_path)
    assert cli.main(["train", f"resume={run}"]) == 0
    assert "finished at step 6" in capsys.readouterr().out


def test_all_checkpoints_damaged_is_one_line(run, capsys):
    for step in complete_steps(run):
        flip(step / "__0_0.distcp")
    before = {path: path.read_bytes() for path in run.rglob("step_*/*")}
    assert cli.main(["train", f"resume={run}"]) == 1
    err = capsys.readouterr().err
    one_line(err, "run: no checkpoint can be used, 2 damaged, the newest: .*step_00000004/__0_0.distcp: its bytes")
    assert err.count("warning") == 1
    assert {path: path.read_bytes() for path in run.rglob("step_*/*")} == before
    for step in complete_steps(run):
        flip(step / "state.json")
    with pytest.raises(CheckpointError, match="2 damaged"):
        neox.load(run)


def test_load_and_convert_fall_back_from_a_damaged_checkpoint(run, tmp_path, capsys):
    newest, older = complete_steps(run)[::-1]
    good = neox.load(newest)[0]
    assert torch.equal(neox.load(run)[0].embed_in.weight, good.embed_in.weight)
    content = bytearray((newest / "__0_0.distcp").read_bytes())
    content[::997] = bytes(byte ^ 1 for byte in content[::997])  # across all of its tensors
    (newest / "__0_0.distcp").write_bytes(content)
    model = neox.load(run)[0]
    assert torch.equal(model.embed_in.weight, neox.load(older)[0].embed_in.weight)
    assert not torch.equal(model.embed_in.weight, good.embed_in.weight)
    assert cli.main(["convert", str(run), f"out={tmp_path / 'hf'}"]) == 0
    err = capsys.readouterr().err
    assert err.count(f"neox: warning: {newest / '__0_0.distcp'}: its bytes are not those that were written") == 2
    assert err.count("\n") == 2
    assert torch.equal(neox.load(tmp_path / "hf")[0].embed_in.weight, model.embed_in.weight)
    # Asked for by name, it is never replaced by another.
    with pytest.raises(DamagedCheckpoint):
        neox.load(newest)
    assert cli.main(["convert", str(newest), f"out={tmp_path / 'other'}"]) == 1
    one_line(capsys.readouterr().err, "step_00000004/__0_0.distcp: its bytes are not those")
    assert not (tmp_path / "other").exists()


def test_a_config_that_does_not_fit_is_the_users_error(run, capsys):
    assert cli.main(["train", f"resume={run}", "model.hidden_size=64"]) == 1
    err = capsys.readouterr().err
    one_line(err, "step_00000004: tensor .* has shape")
    assert "warning" not in err


def test_the_config_of_a_copied_run_comes_from_a_valid_checkpoint(run, whole, tmp_path):
    (run / "config.toml").unlink()
    (run / "step_00000004" / "config.toml").write_bytes(b"\x00" * 40)
    assert cli.main(["train", f"resume={run}"]) == 0
    assert_same_run(run, whole, tmp_path)
    assert load_config(files=[run / "config.toml"]).train.steps == 6
    assert len(rows(run)) == 6

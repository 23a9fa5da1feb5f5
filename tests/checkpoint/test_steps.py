"""Checkpoints of a run: any complete one resumes bit for bit; incomplete, damaged or hostile ones are refused."""

import errno
import json
import os
import pickle
import random
import resource
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from neox import cli
from neox.checkpoint import CheckpointError, complete_steps, load_tensors, read_step, save_step
from neox.config import load_config
from neox.model.decoder import GPTNeoX
from neox.train import build_optimizers
from tests.checkpoint.sealing import seal
from tests.train.helpers import (
    TINY,
    Forked,
    assert_same_run,
    complete,
    cut_back,
    incomplete,
    one_line,
    path_of,
    rows,
    tensors,
    token_pair,
)

STEPS = 6


@pytest.fixture(scope="module", params=["adamw fp32", "muon fp32", "adamw bf16"])
def each_run(request, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs"), *request.param.split())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One undisturbed run of the default kind: never written to, only copied."""
    return make_run(tmp_path_factory.mktemp("run"), "adamw", "fp32")


def make_run(folder: Path, optimizer: str, dtype: str) -> Path:
    data = f"data.train={token_pair(folder / 'train')}"
    options = [*TINY, data, f"steps={STEPS}", "checkpoint.every=2", f"optim.name={optimizer}", f"dtype={dtype}"]
    assert cli.main(["train", *options, f"out={folder / 'run'}"]) == 0
    return folder / "run"


@pytest.fixture
def run(whole, tmp_path):
    """A copy of the run as it was at step 4, to be damaged."""
    return cut_back(whole, tmp_path / "run", 4)


@pytest.fixture
def only(run):
    """The run with step 4 alone."""
    shutil.rmtree(run / "step_00000002")
    return run


def refused(capsys, run: Path, *words: str, options: tuple[str, ...] = ()) -> None:
    """`neox train resume=` fails in one line that has the words, and changes nothing of the run."""
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    capsys.readouterr()
    assert cli.main(["train", f"resume={run}", *options]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    one_line(err, *words)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"} == before


# --- any complete step continues the run -----------------------------------------------------------------------------


def test_resume_from_any_checkpoint_is_bit_exact(each_run, tmp_path):
    steps = [int(path.name.removeprefix("step_")) for path in complete(each_run)]
    assert steps == [2, 4, 6]
    for step in steps[:-1]:
        copy = cut_back(each_run, tmp_path / f"from-{step}", step)
        assert len(rows(copy)) == STEPS
        assert cli.main(["train", f"resume={copy}"]) == 0
        assert_same_run(copy, each_run, tmp_path)


def test_an_incomplete_checkpoint_is_ignored_and_replaced(run, whole, tmp_path):
    half = run / "step_00000006"
    shutil.copytree(run / "step_00000004", half)
    (half / ".metadata").rename(half / ".metadata.tmp")
    (run / "step_00000005").mkdir()
    assert [path.name for path in complete_steps(run)] == ["step_00000002", "step_00000004"]
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        read_step(half)
    assert cli.main(["train", f"resume={run}"]) == 0
    assert not (half / ".metadata.tmp").exists()
    assert_same_run(run, whole, tmp_path)


@pytest.mark.parametrize("tail", [b'{"step": 5, "lo', b"\x00" * 40, b"7\n", b'{"other": 1}\n', b""])
def test_resume_drops_rows_beyond_the_checkpoint_and_a_cut_row(run, whole, tmp_path, tail):
    metrics = run / "metrics.jsonl"
    metrics.write_bytes(b"".join(metrics.read_bytes().splitlines(keepends=True)[:5]) + tail)
    assert cli.main(["train", f"resume={run}"]) == 0
    assert_same_run(run, whole, tmp_path)


def test_resume_without_the_run_s_config_takes_that_of_its_checkpoint(run, whole, tmp_path):
    (run / "config.toml").unlink()
    assert cli.main(["train", f"resume={run}"]) == 0
    assert_same_run(run, whole, tmp_path)
    assert load_config(files=[run / "config.toml"]).train.steps == STEPS


def test_options_changed_on_resume_stay_changed(run):
    """Also when the process is killed before its first checkpoint: the next resume needs no reminding."""
    assert cli.main(["train", f"resume={run}", "steps=5"]) == 0
    assert load_config(files=[run / "config.toml"]).train.steps == 5
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4, 5]


# --- damage ----------------------------------------------------------------------------------------------------------


def test_a_truncated_or_missing_tensor_file(only, capsys):
    file = only / "step_00000004" / "__0_0.distcp"
    content, table = file.read_bytes(), (file.parent / "checksums.json").read_bytes()
    for keep in (0.0, 0.3, 0.999):
        file.write_bytes(content[: int(keep * len(content))])
        words = "no checkpoint can be used, 1 damaged", "has .* bytes, .* were written", "begin the run anew"
        refused(capsys, only, *words)
        seal(file.parent)
        refused(capsys, only, "step_00000004: cannot be read")
        (file.parent / "checksums.json").write_bytes(table)
    file.unlink()
    refused(capsys, only, "__0_0.distcp: is missing", "restore one from a copy")


class Runs:
    """Unpickled without restriction, this runs a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("where", ["top", "inside", "tensor"])
def test_hostile_metadata_executes_nothing(only, capsys, tmp_path, where):
    planted = tmp_path / "planted"
    hostile = Runs(f"touch {planted}")
    step = only / "step_00000004"
    if where == "tensor":  # what DCP itself would unpickle from the data file
        file = step / "__0_0.distcp"
        file.write_bytes(pickle.dumps(hostile).ljust(file.stat().st_size, b"\x00"))
    else:
        metadata = pickle.loads((step / ".metadata").read_bytes())
        metadata.planner_data = hostile
        (step / ".metadata").write_bytes(pickle.dumps(hostile if where == "top" else metadata))
    seal(step)
    refused(capsys, only, "step_00000004.*cannot be read")
    assert not planted.exists()
    os.system(f"touch {planted}")
    assert planted.exists(), "the trap itself works"


def test_metadata_that_describes_something_else(only, capsys):
    metadata = only / "step_00000004" / ".metadata"
    for content in (pickle.dumps({"a": 1}), pickle.dumps(None), b"", b"no pickle", b"\x80\x04."):
        metadata.write_bytes(content)
        seal(metadata.parent)
        refused(capsys, only, "step_00000004/.metadata: cannot be read", "restore one from a copy")


def test_a_tensor_with_a_part_missing(only, capsys):
    """No chunk covers that part, and uninitialised memory would take its place."""
    path = only / "step_00000004" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata.state_dict_metadata["model.embed_in.weight"].chunks.clear()
    path.write_bytes(pickle.dumps(metadata))
    seal(path.parent)
    refused(capsys, only, "tensor model.embed_in.weight is not whole", "restore one from a copy")


def test_flipped_bytes_of_metadata_are_refused_or_harmless(whole, tmp_path):
    """No flip of a byte lets through tensors that are not those that were saved, or an error that is not ours."""
    step = Path(shutil.copytree(whole / "step_00000006", tmp_path / "step_00000006"))
    saved = {name: tensor for name, tensor in tensors(step, tmp_path).items() if name.startswith("model.")}
    good = (step / ".metadata").read_bytes()
    config, _ = read_step(step)
    draw = random.Random(2)
    refusals = 0
    for _ in range(150):
        damaged = bytearray(good)
        damaged[draw.randrange(len(good))] ^= draw.randrange(1, 256)
        (step / ".metadata").write_bytes(damaged)
        seal(step)
        model = GPTNeoX(config.model)
        try:
            load_tensors(step, [model], build_optimizers([model], config.optim))
        except CheckpointError:
            refusals += 1
        else:
            assert all(torch.equal(p, saved[f"model.{name}"]) for name, p in model.named_parameters())
    assert 20 < refusals < 150


def test_a_wrong_state_json_is_one_line(only, capsys):
    file = only / "step_00000004" / "state.json"
    good = json.loads(file.read_text())
    for content, words in (
        (json.dumps(good | {"format_version": 9}), "format version 9, this neox reads 1: upgrade neox"),
        (json.dumps(good | {"step": "four"}), "state.json: step or samples is no number"),
        (json.dumps(good | {"samples": 17}), "batch_sizes give "),
        (json.dumps({key: value for key, value in good.items() if key != "read"}), "state.json: cannot be read"),
        (json.dumps(good)[:20], "state.json: not valid JSON"),
    ):
        file.write_text(content)
        seal(file.parent)
        refused(capsys, only, words)


def test_config_with_an_unknown_key_names_file_and_line(only, capsys):
    for file in (only / "step_00000004" / "config.toml", only / "config.toml"):
        lines = file.read_text().splitlines()
        number = lines.index("[train]") + 1
        file.write_text("\n".join([*lines[:number], "stepz = 3", *lines[number:]]))
        seal(only / "step_00000004")
        refused(capsys, only, f"{file}:{number + 1}", "did you mean train.steps?")


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("model.hidden_size=64", (r"model\.\S+ has shape \[\S+ ?\S*\], this config expects \[",)),
        ("model.num_hidden_layers=3", (r"tensor model\.layers\.2\.\S+ is missing",)),
        ("model.num_hidden_layers=1", (r"tensor \S+layers\.1\.\S+ is not part of",)),
        ("model.tie_word_embeddings=true", (r"tensor \S+embed_out\S+ is not part of",)),
        ("optim.name=muon", (r"tensor optim\.layers\.0\.\S+\.momentum_buffer is missing",)),
    ],
)
def test_tensors_that_do_not_fit_the_config(run, capsys, option, words):
    refused(capsys, run, "step_00000004: tensor", *words, "the run's own model and optim settings", options=(option,))
    assert cli.main(["train", f"resume={run}"]) == 0  # the change that did not fit was not kept


@pytest.mark.parametrize("kind", ["missing", "extra", "misshapen", "state"])
def test_optimizer_state_must_be_whole(only, capsys, tmp_path, kind):
    """Missing optimizer state would silently start from zero."""
    step = only / "step_00000004"
    stored = tensors(step, tmp_path)
    name = "optim.layers.0.attention.dense.weight.exp_avg"
    if kind == "missing":
        del stored[name]
    elif kind == "state":
        stored = {key: value for key, value in stored.items() if not key.startswith("optim.")}
    else:
        stored[name if kind == "misshapen" else "optim.embed_in.weight.other"] = torch.zeros(3)
    (step / ".metadata").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(stored, checkpoint_id=step, no_dist=True)
    (step / "checksums.json").unlink()
    seal(step)
    words = {"missing": f"{name} is missing", "misshapen": r"has shape \[3\]", "extra": "is not part of"}
    refused(capsys, only, "step_00000004: tensor optim", words.get(kind, "is missing"))


# --- a full disk -----------------------------------------------------------------------------------------------------


def test_disk_full_during_a_checkpoint(run, whole, tmp_path):
    """By the limit on file sizes, which the system itself enforces: the tensors do not fit."""
    largest = (run / "step_00000004" / "__0_0.distcp").stat().st_size
    for limit in (largest - 1, largest // 2, 40_000):
        status, out, err = Forked(tmp_path / "log", f"resume={run}", setup=limit_files, size=limit).finish()
        assert (status, out) == (1, "")
        one_line(err, "step_00000006: File too large: nothing was kept of this checkpoint; free space, then resume")
        assert [path.name for path in complete(run)] == ["step_00000002", "step_00000004"]
        assert not incomplete(run)
    assert Forked(tmp_path / "log", f"resume={run}").finish()[0] == 0
    assert_same_run(run, whole, tmp_path)


def test_a_checkpoint_that_is_half_removed_does_not_read_as_complete(run, monkeypatch):
    """The last sync fails, after .metadata is in place, and the process is killed while it cleans up."""
    config, state = read_step(run / "step_00000004")
    model = GPTNeoX(config.model)
    optimizers = build_optimizers([model], config.optim)
    load_tensors(run / "step_00000004", [model], optimizers)

    def sync(folder):
        if folder == run:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("neox.checkpoint.writer.sync_folder", sync)
    monkeypatch.setattr(shutil, "rmtree", lambda *arguments, **named: None)
    with pytest.raises(OSError, match="Input/output error: nothing was kept of this checkpoint"):
        save_step(run, [model], optimizers, config, state | {"step": 5})
    assert (run / "step_00000005" / "__0_0.distcp").exists()
    assert [path.name for path in complete_steps(run)] == ["step_00000002", "step_00000004"]


def limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


# Which call on which file meets a full disk, and what the line must name.
FULL = [
    ("write", "config.toml.tmp", "run/config.toml"),
    ("write", "metrics.jsonl", "metrics.jsonl: No space left on device: free space"),
    ("fsync", "metrics.jsonl", "metrics.jsonl: No space left on device: free space"),
    ("fsync", "metrics.jsonl.tmp", "metrics.jsonl: No space left on device"),
    ("write", "step_00000006/config.toml", "step_00000006: No space left on device: nothing was kept of this"),
    ("fsync", "step_00000006/state.json", "step_00000006: No space left on device: nothing was kept of this"),
    ("fsync", "step_00000006/__0_0.distcp", "step_00000006: No space left on device: nothing was kept of this"),
    ("fsync", "step_00000006/.metadata.tmp", "step_00000006: No space left on device: nothing was kept of this"),
    ("fsync", "step_00000006", "step_00000006: No space left on device: nothing was kept of this"),
    ("mkdir", "step_00000006", "step_00000006: No space left on device: nothing was kept of this"),
]


@pytest.mark.parametrize(("call", "name", "words"), FULL, ids=[f"{call}-{name}" for call, name, _ in FULL])
def test_disk_full_at_each_place(run, whole, tmp_path, call, name, words):
    if call == "write" and not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full to write to")
    status, out, err = Forked(tmp_path / "log", f"resume={run}", setup=fill, call=call, name=name).finish()
    assert (status, out) == (1, "")
    assert "Exception ignored" not in err
    one_line(err, words)
    assert [path.name for path in complete(run)] == ["step_00000002", "step_00000004"]
    assert not incomplete(run)
    assert not list(run.rglob("*.tmp"))
    assert Forked(tmp_path / "log", f"resume={run}").finish()[0] == 0
    assert_same_run(run, whole, tmp_path)


def fill(call: str, name: str) -> None:
    """This process finds the disk full at the given call on the given file."""
    import builtins

    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if call == "mkdir":
        plain_mkdir = os.mkdir

        def mkdir(path, *arguments, **named):
            if str(path).endswith(name):
                raise OSError(full.errno, full.strerror, str(path))
            plain_mkdir(path, *arguments, **named)

        os.mkdir = mkdir
    elif call == "fsync":
        plain_sync = os.fsync

        def fsync(handle):
            if path_of(handle).endswith(f"/{name}"):
                raise full
            plain_sync(handle)

        os.fsync = fsync
    else:
        plain_open = builtins.open

        def opened(path, mode="r", *arguments, **named):
            file = plain_open(path, mode, *arguments, **named)
            if not str(path).endswith(f"/{name}") or mode == "r":
                return file
            file.close()
            return plain_open("/dev/full", mode, *arguments, **named)

        builtins.open = opened

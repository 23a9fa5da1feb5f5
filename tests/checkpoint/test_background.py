"""Asynchronous checkpointing: the state of the call, whole or absent, one save at a time."""

import errno
import json
import os
import shutil
import signal
import threading

import pytest
import torch

from neox import cli
from neox.checkpoint import Saver, complete_steps, is_valid, load_tensors
from neox.checkpoint import writer as writer_module
from neox.config import CheckpointConfig, Config, ModelConfig, load_config
from neox.model.decoder import GPTNeoX
from neox.system.processes import OtherProcessFailed, Processes
from neox.train import Trainer, build_optimizers
from tests.checkpoint.test_steps import FULL, fill
from tests.parallel.helpers import together
from tests.train.helpers import (
    TINY,
    Forked,
    assert_same_run,
    assert_same_step,
    complete,
    cut_back,
    incomplete,
    one_line,
    rows,
    tensors,
    token_pair,
    wait_for,
)

LATER = "checkpoint.asynchronous=true"
CONFIG = Config(model=ModelConfig(vocab_size=97, hidden_size=32, num_attention_heads=2, num_hidden_layers=1))


@pytest.fixture
def model():
    return GPTNeoX(CONFIG.model).initialize()


@pytest.fixture
def gate(monkeypatch):
    """Writes begin, and wait until the gate is set; `gate.order` notes when."""
    event = threading.Event()
    event.order = []
    plain = writer_module.dcp.save

    def save(*arguments, **named):
        event.order.append("begun")
        assert event.wait(60)
        plain(*arguments, **named)
        event.order.append("done")

    monkeypatch.setattr(writer_module.dcp, "save", save)
    return event


def state(step: int) -> dict:
    return {"step": step, "samples": step, "updates": step, "loss_scaler": {}, "order": ""}


def saver(folder, **options) -> Saver:
    return Saver(folder, CheckpointConfig(asynchronous=True, **options))


# --- the state of the moment -----------------------------------------------------------------------------------------


def test_asynchronous_save_holds_the_state_of_the_call(tmp_path, model, gate):
    optimizers = build_optimizers([model], CONFIG.optim)
    model(torch.tensor([[1, 2, 3]])).square().mean().backward()
    optimizers[0].step()
    expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    moments = {name: optimizers[0].state[p]["exp_avg"].clone() for name, p in model.named_parameters()}
    with saver(tmp_path) as background:
        for step in (1, 2):  # the second copy goes where the first one was
            gate.clear()
            folder = background.save([model], optimizers, CONFIG, state(step))
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(torch.nan)
                    optimizers[0].state[parameter]["exp_avg"].fill_(torch.nan)
            assert not complete_steps(tmp_path)[step - 1 :]
            gate.set()
            background.wait()
            load_tensors(folder, [model], optimizers)
            for name, parameter in model.named_parameters():
                assert torch.equal(parameter, expected[name])
                assert torch.equal(optimizers[0].state[parameter]["exp_avg"], moments[name])
    assert all(is_valid(step) for step in complete_steps(tmp_path))


@pytest.fixture(scope="module")
def each_step(tmp_path_factory):
    """A run that saves each of six steps at once: never written to, only copied."""
    folder = tmp_path_factory.mktemp("run")
    data = f"data.train={token_pair(folder / 'train')}"
    assert cli.main(["train", *TINY, data, "steps=6", "checkpoint.every=1", f"out={folder / 'run'}"]) == 0
    return folder / "run"


def test_asynchronous_checkpoints_equal_synchronous_ones(each_step, tmp_path):
    run = cut_back(each_step, tmp_path / "run", 1)
    assert cli.main(["train", f"resume={run}", LATER]) == 0
    assert_same_run(run, each_step, tmp_path)
    assert len(complete(run)) == 6
    for mine, theirs in zip(complete(run), complete(each_step), strict=True):
        assert is_valid(mine)
        assert_same_step(mine, theirs, tmp_path)


def test_rows_have_the_seconds_of_asynchronous_saves(each_step, tmp_path):
    run = cut_back(each_step, tmp_path / "run", 1)
    assert cli.main(["train", f"resume={run}", LATER]) == 0
    for folder, first in ((run, 3), (each_step, 2)):
        found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        stalls = {row["step"]: row["save_stall"] for row in found if "save_stall" in row}
        assert set(stalls) >= set(range(first, 7))
        assert all(seconds > 0 for seconds in stalls.values())
        assert any(row.get("save_seconds", 0) > 0 for row in found)


# --- one at a time, and the last one too ------------------------------------------------------------------------------


def test_the_next_asynchronous_save_waits_for_the_one_in_flight(tmp_path, model, gate):
    with saver(tmp_path) as background:
        background.save([model], [], CONFIG, state(1))
        background.poll()  # does not wait
        threading.Timer(0.2, gate.set).start()
        background.save([model], [], CONFIG, state(2))
        assert gate.order[:2] == ["begun", "done"]
        assert background.take_timings()["save_stall"] > 0.15
    assert gate.order == ["begun", "done"] * 2
    assert len(complete_steps(tmp_path)) == 2


def test_keep_last_removes_older_checkpoints_when_the_newer_is_complete(tmp_path, model, gate):
    gate.set()
    with saver(tmp_path, keep_last=1) as background:
        background.save([model], [], CONFIG, state(1))
        background.wait()
        gate.clear()
        background.save([model], [], CONFIG, state(2))
        assert [path.name for path in complete_steps(tmp_path)] == ["step_00000001"]
        gate.set()
    assert [path.name for path in complete_steps(tmp_path)] == ["step_00000002"]


def save_and_raise(folder, model, error: BaseException) -> None:
    with saver(folder) as background:
        background.save([model], [], CONFIG, state(1))
        raise error


def test_an_error_of_the_run_does_not_lose_the_asynchronous_save_before_it(tmp_path, model, gate):
    threading.Timer(0.1, gate.set).start()
    with pytest.raises(ValueError, match="elsewhere"):
        save_and_raise(tmp_path, model, ValueError("elsewhere"))
    assert is_valid(complete_steps(tmp_path)[0])


def test_a_keyboard_interrupt_does_not_wait_for_the_asynchronous_save(tmp_path, model, gate):
    with pytest.raises(KeyboardInterrupt):
        save_and_raise(tmp_path, model, KeyboardInterrupt())
    assert "done" not in gate.order
    gate.set()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_with_its_asynchronous_save_complete(each_step, tmp_path, number):
    run = cut_back(each_step, tmp_path / "run", 1)
    process = Forked(tmp_path / "log", f"resume={run}", "steps=100000", LATER)
    wait_for(lambda: len(complete(run)) > 3, process)
    process.send(number)
    status, out, err = process.finish()
    assert status == 128 + number, err
    last = complete(run)[-1]
    assert f"saved at step {int(last.name[5:])} of" in out
    assert is_valid(last)
    assert rows(run)[-1]["step"] == int(last.name[5:])
    assert not incomplete(run)


# --- a full disk ------------------------------------------------------------------------------------------------------


def poll_on(background: Saver) -> None:
    while True:
        background.poll()


def test_a_failed_asynchronous_save_is_raised_at_the_next_step(tmp_path, model, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(writer_module.dcp, "save", full)
        background = saver(tmp_path)
        folder = background.save([model], [], CONFIG, state(1))
        with pytest.raises(OSError, match="nothing was kept of this checkpoint") as caught:
            poll_on(background)
    assert caught.value.filename == str(folder)
    assert not folder.exists()
    background.poll()  # it is said once
    background.save([model], [], CONFIG, state(2))
    background.wait()
    assert is_valid(complete_steps(tmp_path)[0])


@pytest.mark.parametrize(("call", "name", "words"), [case for case in FULL if "step_" in case[1]])
def test_disk_full_at_each_place(each_step, tmp_path, call, name, words):
    if call == "write" and not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full to write to")
    run = cut_back(each_step, tmp_path / "run", 4)
    status, out, err = Forked(tmp_path / "log", f"resume={run}", LATER, setup=fill, call=call, name=name).finish()
    assert (status, out) == (1, ""), err
    one_line(err, words)
    assert [path.name for path in complete(run)][3:] == ["step_00000004", "step_00000005"]
    assert not incomplete(run)
    assert all(is_valid(path) for path in complete(run))


# --- several processes ------------------------------------------------------------------------------------------------


def fit(*each: Config) -> None:
    for settings in each:
        Trainer(settings, quiet=True).fit()


def test_asynchronous_save_of_several_processes(tmp_path):
    options = (*TINY, f"data.train={token_pair(tmp_path / 'train')}", "steps=3", "checkpoint.every=1")
    runs = [load_config(overrides=(*options, f"out={tmp_path / name}", *more)) for name, more in RUNS.items()]
    together(2, tmp_path / "ranks", fit, *runs)
    now, later = (complete_steps(tmp_path / name) for name in RUNS)
    assert len(now) == len(later) == 3
    for mine, theirs in zip(later, now, strict=True):
        assert is_valid(mine)
        assert_same_step(mine, theirs, tmp_path)


RUNS = {"now": (), "later": (LATER, "parallel.zero=3")}


def save_where_one_cannot(folder, rank: int) -> str:
    """Save in the background where one rank's disk is full: what each rank is told."""
    world = torch.distributed.get_world_size()
    own = torch.distributed.get_rank()
    background = Saver(folder, CheckpointConfig(asynchronous=True), Processes(own, world))
    if own == rank:
        fill("fsync", f"__{rank}_0.distcp")
    # Different tensors on each rank, so that each writes a file.
    model = torch.nn.ParameterDict({f"w{own}": torch.nn.Parameter(torch.ones(5))})
    background.save([model], [], CONFIG, state(1))
    try:
        poll_on(background)
    except (OSError, OtherProcessFailed) as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("rank", [0, 1])
def test_disk_full_of_one_of_several(tmp_path, rank):
    first, second = together(2, tmp_path / "ranks", save_where_one_cannot, tmp_path / "run", rank)
    assert "No space left on device: nothing was kept of this checkpoint" in first
    assert second == "OtherProcessFailed: rank 0 could not save"
    assert not list((tmp_path / "run").glob("*"))


def test_the_copy_reads_back_as_it_was(each_step, tmp_path):
    """The file of a background save holds no more than that of a plain one: shared storages are not written whole."""
    run = cut_back(each_step, tmp_path / "run", 5)
    shutil.rmtree(run / "step_00000005")
    assert cli.main(["train", f"resume={run}", LATER]) == 0
    mine, theirs = (tensors(folder / "step_00000006", tmp_path) for folder in (run, each_step))
    assert mine.keys() == theirs.keys()
    sizes = [(folder / "step_00000006" / "__0_0.distcp").stat().st_size for folder in (run, each_step)]
    assert sizes[0] == sizes[1]

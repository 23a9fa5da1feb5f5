"""Ctrl-C and SIGTERM save and say how to go on; what follows is what would have followed."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.train.helpers import (
    TINY,
    Forked,
    assert_same_run,
    assert_same_step,
    complete,
    finish,
    incomplete,
    path_of,
    rows,
    start,
    token_pair,
    wait_for,
)


def slow_steps(seconds: float) -> None:
    """Each step takes at least so long, so that a signal finds the run in the middle of one."""
    from neox.train import Trainer

    plain = Trainer.train_step

    def step(self):
        time.sleep(seconds)
        return plain(self)

    Trainer.train_step = step


def arguments(tmp_path, steps: int, out: str) -> list[str]:
    data = f"data.train={token_pair(tmp_path / 'train')}"
    return [*TINY, data, f"steps={steps}", f"out={tmp_path / out}", "checkpoint.every=0"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_resumed_run_is_the_undisturbed_one(tmp_path, number):
    run = tmp_path / "run"
    process = Forked(tmp_path / "log", *arguments(tmp_path, 12, "run"), setup=slow_steps, seconds=0.1)
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(rows(run)) >= 3, process)
    process.send(number)
    status, out, err = process.finish()
    assert status == 128 + number
    assert "Traceback" not in err
    assert "stopping after this step; Ctrl-C again stops at once" in err
    stopped = int(complete(run)[-1].name.removeprefix("step_"))
    assert 3 <= stopped < 12
    assert len(rows(run)) == stopped
    assert f"{run}: stopped by {number.name}, saved at step {stopped} of 12, loss " in out
    assert out.endswith(f"; continue: neox train resume={run}\n")
    assert out.count("\n") == 1

    reference = Forked(tmp_path / "log", *arguments(tmp_path, 12, "reference"))
    assert reference.finish()[0] == 0
    command = out.rstrip().rpartition("continue: neox train ")[2].split()
    assert Forked(tmp_path / "log", *command).finish()[0] == 0
    assert_same_run(run, tmp_path / "reference", tmp_path)


def test_sigterm_to_the_command_itself(tmp_path):
    run = tmp_path / "run"
    process = start(*arguments(tmp_path, 100000, "run"))
    wait_for(lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size, process)
    process.terminate()
    status, out, _ = finish(process)
    assert status == 128 + signal.SIGTERM
    assert f"continue: neox train resume={run}" in out
    assert len(complete(run)) == 1


def test_a_second_interrupt_stops_at_once_and_harms_nothing(tmp_path):
    run = tmp_path / "run"
    options = [*arguments(tmp_path, 6, "run"), "checkpoint.every=2"]
    process = Forked(tmp_path / "log", *options, setup=stuck_after, step=3)
    wait_for((run / "stuck").exists, process)
    started = time.monotonic()
    process.send(signal.SIGINT)
    time.sleep(0.2)
    assert process.poll() is None, "the first one waits for the step"
    process.send(signal.SIGINT)
    status, out, err = process.finish()
    assert time.monotonic() - started < 5
    assert (status, out) == (130, "")
    assert "Traceback" not in err
    assert err.endswith(f"neox: interrupted; continue from the last checkpoint: neox train resume={run}\n")
    assert [step.name for step in complete(run)] == ["step_00000002"]
    assert not incomplete(run)
    assert Forked(tmp_path / "log", *arguments(tmp_path, 6, "reference")).finish()[0] == 0
    assert Forked(tmp_path / "log", f"resume={run}").finish()[0] == 0
    assert_same_run(run, tmp_path / "reference", tmp_path)


def stuck_after(step: int) -> None:
    """The step after this one does not end; once it has begun there is a file RUN/stuck."""
    from neox.train import Trainer

    plain = Trainer.train_step

    def train_step(self):
        if self.step == step:
            (self.run / "stuck").touch()
            time.sleep(60)
        return plain(self)

    Trainer.train_step = train_step


@pytest.mark.parametrize("file", ["state.json", "__0_0.distcp", ".metadata.tmp"])
def test_a_second_interrupt_inside_a_checkpoint_removes_what_it_wrote(tmp_path, file):
    run = tmp_path / "run"
    options = [*arguments(tmp_path, 4, "run"), "checkpoint.every=2"]
    process = Forked(tmp_path / "log", *options, setup=stuck_in_save, name=f"step_00000004/{file}")
    wait_for(lambda: (tmp_path / "run" / "step_00000004" / file).exists(), process)
    time.sleep(0.05)
    for _ in range(2):
        process.send(signal.SIGINT)
        time.sleep(0.1)
    status, _, err = process.finish()
    assert status == 130
    assert "Traceback" not in err
    assert [step.name for step in run.glob("step_*")] == ["step_00000002"]
    assert Forked(tmp_path / "log", *arguments(tmp_path, 4, "reference")).finish()[0] == 0
    assert Forked(tmp_path / "log", f"resume={run}").finish()[0] == 0
    assert_same_step(complete(run)[-1], complete(tmp_path / "reference")[-1], tmp_path)


def stuck_in_save(name: str) -> None:
    plain = os.fsync

    def fsync(handle):
        if path_of(handle).endswith(name):
            time.sleep(60)
        plain(handle)

    os.fsync = fsync


def test_interrupted_while_the_text_is_tokenized(tmp_path):
    """Nothing is worth saving yet: the first Ctrl-C stops at once, and the run can be resumed all the same."""
    (tmp_path / "a.txt").write_text("".join(f"{i} times {i} is {i * i}\n" for i in range(600)))
    options = [*TINY, "model.vocab_size=512", "tokenizer.vocab_size=300", f"data.train={tmp_path / 'a.txt'}", "steps=2"]
    run = tmp_path / "run"
    reached = tmp_path / "reached"
    process = Forked(tmp_path / "log", *options, f"out={run}", setup=stuck_in_prepare, reached=reached)
    wait_for(reached.exists, process)
    assert (run / "data" / "train-0.bin.tmp").exists()
    process.send(signal.SIGINT)
    status, out, err = process.finish()
    assert (status, out) == (130, ""), err
    assert "Traceback" not in err
    assert err.endswith(f"neox train resume={run}\n")
    assert list((run / "data").iterdir()) == []
    assert Forked(tmp_path / "log", f"resume={run}").finish()[0] == 0
    assert [row["step"] for row in rows(run)] == [1, 2]


def stuck_in_prepare(reached: Path) -> None:
    from neox.data import TokenWriter

    def add_tokens(self, tokens):
        reached.touch()
        time.sleep(60)

    TokenWriter.add_tokens = add_tokens

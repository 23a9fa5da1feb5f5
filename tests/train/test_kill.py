"""A run that is killed, at any moment, goes on as if nothing had happened; two processes never write one run."""

import os
import random
import signal
import time

import pytest

from neox.train.metrics import read_rows
from tests.train.helpers import (
    TINY,
    Forked,
    assert_same_run,
    complete,
    finish,
    incomplete,
    one_line,
    rows,
    start,
    token_pair,
    wait_for,
)

SLOW_SYNC = 0.02  # a checkpoint syncs eight times: it then takes longer than a step, and a kill finds it half written


def options(tmp_path, steps: int) -> list[str]:
    data = [f"data.{kind}={token_pair(tmp_path / kind, seed=seed)}" for seed, kind in enumerate(("train", "valid"))]
    return [*TINY, *data, f"steps={steps}", "checkpoint.every=2", "eval.every=3", "eval.batches=1"]


def slow_down() -> None:
    plain = os.fsync

    def fsync(handle):
        time.sleep(SLOW_SYNC)
        plain(handle)

    os.fsync = fsync


def kill_many(tmp_path, steps: int, moments: list[str], seed: int, fork: bool, *more: str) -> int:
    """Start a run, kill it at each of the moments, resume it each time, compare it with the undisturbed run.

    Returns how many kills left half a checkpoint. Moments: `write` is inside a checkpoint, `start` is within the
    process's first seconds, `step` is anywhere after its first step. `fork` saves the time of importing torch. `more`
    are options of the run that is killed alone.
    """
    draw = random.Random(seed)
    arguments = options(tmp_path, steps)
    reference, run = tmp_path / "reference", tmp_path / "run"
    undisturbed = Forked(tmp_path / "log", *arguments, f"out={reference}")
    halves = 0
    for number, moment in enumerate(moments):
        begun = (run / "config.toml").exists()
        again = [f"resume={run}"] if begun else [*arguments, *more, f"out={run}"]
        if fork:
            process = Forked(tmp_path / "killed", *again, setup=slow_down)
        else:
            process = start(*again, slow_sync=SLOW_SYNC, folder=tmp_path / "slow")
        old, newest = set(incomplete(run)), max((row["step"] for row in _rows(run)), default=0)
        done = len(complete(run))
        if moment == "start":
            time.sleep(draw.uniform(0, 3))
        elif moment == "write":
            wait_for(lambda done=done: len(complete(run)) > done, process)
            wait_for(lambda old=old: set(incomplete(run)) - old, process)
            time.sleep(draw.uniform(0, 4 * SLOW_SYNC))
        else:
            seen = (run / "metrics.jsonl").stat().st_mtime_ns if newest else 0
            wait_for(lambda seen=seen: _rows(run) and (run / "metrics.jsonl").stat().st_mtime_ns > seen, process)
            time.sleep(draw.uniform(0, 0.6))
        os.kill(process.pid, signal.SIGKILL)
        status, _, err = process.finish() if fork else finish(process)
        assert status == -signal.SIGKILL, f"kill {number} ({moment}) came too late: {err}"
        halves += bool(incomplete(run))
    status, out, err = finish(start(f"resume={run}"))
    assert status == 0, err
    assert f"{run}: {steps} steps done, loss " in out
    assert undisturbed.finish()[0] == 0
    assert not incomplete(run)
    assert [path.name for path in complete(run)] == [path.name for path in complete(reference)]
    assert_same_run(run, reference, tmp_path)
    assert [row["step"] for row in rows(run) if "loss" in row] == list(range(1, steps + 1))
    return halves


def _rows(run):
    path = run / "metrics.jsonl"
    return read_rows(path) if path.exists() else []


def test_killed_three_times(tmp_path):
    assert kill_many(tmp_path, 24, ["write", "step", "write"], seed=3, fork=True) >= 1


@pytest.mark.slow
def test_killed_twenty_times(tmp_path):
    """Twenty seeded moments of one run; several of them lie inside a checkpoint write."""
    moments = ["write"] * 7 + ["step"] * 9 + ["start"] * 4
    random.Random(7).shuffle(moments)
    assert kill_many(tmp_path, 150, moments, seed=11, fork=False) >= 4


@pytest.mark.slow
def test_killed_while_it_saves_in_the_background(tmp_path):
    moments = ["write"] * 6 + ["step"] * 2
    random.Random(5).shuffle(moments)
    assert kill_many(tmp_path, 60, moments, 13, True, "checkpoint.asynchronous=true") >= 3


def test_killed_before_its_first_step(tmp_path):
    """Before anything is written, and in each stage of making tokens out of text; text and tokenizer are then kept."""
    (tmp_path / "a.txt").write_text("".join(f"{i} times {i} is {i * i}\n" for i in range(600)))
    arguments = [*TINY, "model.vocab_size=512", "tokenizer.vocab_size=300", f"data.train={tmp_path / 'a.txt'}"]
    arguments += ["steps=3", "checkpoint.every=0"]
    reference = tmp_path / "reference"
    assert Forked(tmp_path / "log", *arguments, f"out={reference}").finish()[0] == 0
    for number, stage in enumerate(("mkdir", "config.toml", "tokenizer.json", "train-0.bin", "train-0.idx")):
        run = tmp_path / f"run-{number}"
        log = tmp_path / f"log-{number}"
        killed = Forked(log, *arguments, f"out={run}", setup=kill_self_at, name=stage)
        assert killed.finish()[0] == -signal.SIGKILL
        assert not complete(run)
        if stage in ("mkdir", "config.toml"):
            status, _, err = Forked(log, f"resume={run}").finish()
            assert status == 1
            one_line(err, "holds no run", "neox train ... out=")
            again = [*arguments, f"out={run}"]
        else:
            again = [f"resume={run}"]
        assert Forked(log, *again).finish()[0] == 0
        assert_same_run(run, reference, tmp_path)
        assert (run / "tokenizer.json").read_bytes() == (reference / "tokenizer.json").read_bytes()
        for suffix in ("bin", "idx"):
            pairs = [(folder / "data" / f"train-0.{suffix}").read_bytes() for folder in (run, reference)]
            assert pairs[0] == pairs[1]


def kill_self_at(name: str) -> None:
    """SIGKILL the moment that a file of this name is about to be put in place, or the run directory made."""
    plain, mkdir = os.replace, os.mkdir

    def replace(source, target):
        if os.path.basename(target) == name:
            os.kill(os.getpid(), signal.SIGKILL)
        plain(source, target)

    def make(*arguments, **named):
        if name == "mkdir":
            os.kill(os.getpid(), signal.SIGKILL)
        mkdir(*arguments, **named)

    os.replace, os.mkdir = replace, make


def test_a_start_that_never_took_a_step_leaves_nothing_of_its_text_behind(tmp_path):
    """The same run directory, started anew with other text after a failure, trains on the other text."""
    for name, word in (("a", "apple"), ("b", "brown")):
        (tmp_path / f"{name}.txt").write_text("".join(f"{word} {i}\n" for i in range(600)))
    arguments = [*TINY, "tokenizer.vocab_size=300", "steps=1", f"out={tmp_path / 'run'}"]
    status, _, err = Forked(tmp_path / "log", *arguments, f"data.train={tmp_path / 'a.txt'}").finish()
    assert status == 1
    one_line(err, "the tokenizer has", "set model.vocab_size=384")
    good = [*arguments, "model.vocab_size=384", f"data.train={tmp_path / 'b.txt'}"]
    assert Forked(tmp_path / "log", *good).finish()[0] == 0
    reference = [*good, f"out={tmp_path / 'reference'}"]
    assert Forked(tmp_path / "log", *reference).finish()[0] == 0
    assert_same_run(tmp_path / "run", tmp_path / "reference", tmp_path)
    # A resumed run is not talked into other text either.
    other = (f"resume={tmp_path / 'run'}", "steps=2", f"data.train={tmp_path / 'a.txt'}")
    status, _, err = Forked(tmp_path / "log", *other).finish()
    assert status == 1
    one_line(err, "holds the tokens of .*b.txt, data.train names .*a.txt")


def test_killed_after_the_last_step(tmp_path):
    arguments = [*options(tmp_path, 4), f"out={tmp_path / 'run'}"]
    reference = [*options(tmp_path, 4), f"out={tmp_path / 'reference'}"]
    for each in (arguments, reference):
        assert Forked(tmp_path / "log", *each).finish()[0] == 0
    # As it is when the kill comes after the last row and before the last checkpoint.
    last = complete(tmp_path / "run")[-1]
    (last / ".metadata").unlink()
    assert Forked(tmp_path / "log", f"resume={tmp_path / 'run'}").finish()[0] == 0
    assert_same_run(tmp_path / "run", tmp_path / "reference", tmp_path)
    # And when it comes after that: there is nothing left to do, and nothing is touched.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    status, out, err = Forked(tmp_path / "log", f"resume={tmp_path / 'run'}").finish()
    assert (status, err) == (0, "")
    assert out == f"{tmp_path / 'run'}: finished at step 4; train on: neox train resume={tmp_path / 'run'} steps=8\n"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
    assert Forked(tmp_path / "log", f"resume={tmp_path / 'run'}", "steps=5").finish()[0] == 0
    assert rows(tmp_path / "run")[:-2] == rows(tmp_path / "reference")
    assert Forked(tmp_path / "log", f"resume={tmp_path / 'run'}").finish()[1].count("finished at step 5") == 1


def test_a_second_writer_is_refused(tmp_path):
    run = tmp_path / "run"
    arguments = [*options(tmp_path, 100000), f"out={run}"]
    first = Forked(tmp_path / "first", *arguments)
    wait_for(lambda: complete(run), first)
    for second in (arguments, [f"resume={run}"]):
        status, out, err = Forked(tmp_path / "second", *second).finish()
        assert (status, out) == (1, "")
        assert err.count("\n") == 1
        one_line(err, f"process {first.pid} is writing this run")
    first.send(signal.SIGKILL)
    assert first.finish()[0] == -signal.SIGKILL
    steps = int(complete(run)[-1].name.removeprefix("step_")) + 1
    assert Forked(tmp_path / "second", f"resume={run}", f"steps={steps}").finish()[0] == 0

"""The deadline after SIGTERM, the watch over steps that do not end, and one command that begins a run or goes on."""

import json
import math
import re
import signal
import threading
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from neox.config import TrainConfig
from neox.system.processes import Processes, agreed_attempt
from neox.train.watchdog import Watchdog
from tests.train.helpers import TINY, Forked, assert_same_run, complete, rows, token_pair, wait_for
from tests.train.test_signals import slow_steps, stuck_after


def options(tmp_path, *more: str) -> list[str]:
    prefix = tmp_path / "train"
    if not prefix.with_suffix(".idx").exists():
        token_pair(prefix)
    return [*TINY, f"data.train={prefix}", *more]


def watched(tmp_path, *more: str) -> list[str]:
    """A run that evaluates, and shows what the model writes, after each second step."""
    text = tmp_path / "a.txt"
    text.write_text("".join(f"{i} times {i} is {i * i}\n" for i in range(600)))
    named = (f"data.train={text}", f"data.valid={text}", "model.vocab_size=320", "tokenizer.vocab_size=300")
    every = ("eval.every=2", "eval.batches=1", "log.sample_every=2", "log.sample_tokens=4", "checkpoint.every=0")
    return [*TINY, *named, *every, *more]


def samples(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def test_sigterm_skips_evaluation_and_the_resumed_run_makes_up_for_it(tmp_path):
    """SIGTERM comes in step 4, after which an evaluation and a sample are due."""
    run = tmp_path / "run"
    process = Forked(tmp_path / "log", *watched(tmp_path, "steps=7", f"out={run}"), setup=sigterm_in_step, step=4)
    status, out, err = process.finish()
    assert status == 128 + signal.SIGTERM, err
    assert re.search(r"saved at step 4 of 7, loss \d.\d+, \d+\.\d s after the signal; continue: ", out)
    assert [row["step"] for row in rows(run) if "valid_loss" in row] == [2]
    assert [row["step"] for row in samples(run)] == [0, 2]
    assert Forked(tmp_path / "log", f"resume={run}").finish()[0] == 0
    assert Forked(tmp_path / "log", *watched(tmp_path, "steps=7", f"out={tmp_path / 'reference'}")).finish()[0] == 0
    assert_same_run(run, tmp_path / "reference", tmp_path)
    assert samples(run) == samples(tmp_path / "reference")


def sigterm_in_step(step: int) -> None:
    import os

    from neox.train import Trainer

    plain = Trainer.train_step

    def train_step(self):
        if self.step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self)

    Trainer.train_step = train_step


def test_a_step_that_outlasts_the_grace_is_given_up(tmp_path):
    run = tmp_path / "run"
    command = options(tmp_path, "steps=9", f"out={run}", "checkpoint.every=2", "train.grace=1")
    process = Forked(tmp_path / "log", *command, setup=stuck_after, step=3)
    wait_for((run / "stuck").exists, process)
    process.send(signal.SIGTERM)
    status, out, err = process.finish()
    assert (status, out) == (143, "")
    assert "Traceback" not in err
    said = err.splitlines()[-1]
    assert said.startswith(f"neox: {run}: stopped by SIGTERM after step 3, not done within train.grace=1 s: ")
    assert said.endswith(f"the newest checkpoint is {run / 'step_00000002'}; continue: neox train resume={run}")


def test_a_hang_is_written_down(tmp_path):
    run = tmp_path / "run"
    command = options(tmp_path, "steps=5", f"out={run}", "checkpoint.every=2", "train.timeout=2")
    status, out, err = Forked(tmp_path / "log", *command, setup=stuck_after, step=3).finish()
    assert (status, out) == (124, "")
    assert "Traceback" not in err
    said = err.splitlines()[-1]
    assert said == (
        f"neox: {run}: hang detected: no step finished for 2 s (train.timeout); stacks and collective calls of rank 0: "
        f"{run / 'hang' / 'rank_0.txt'}, .json"
    )
    assert json.loads((run / "hang" / "rank_0.json").read_text())["step"] == 3
    assert "in train_step" in (run / "hang" / "rank_0.txt").read_text()
    assert Forked(tmp_path / "log", f"resume={run}").finish()[0] == 0  # the lock is free
    assert Forked(tmp_path / "log", *options(tmp_path, "steps=5", f"out={tmp_path / 'reference'}")).finish()[0] == 0
    assert_same_run(run, tmp_path / "reference", tmp_path)


def test_a_long_start_is_no_hang(tmp_path):
    with Watchdog(TrainConfig(timeout=0.2), tmp_path, Processes()) as watch, watch.paused():
        threading.Event().wait(0.6)


def test_a_grace_that_is_too_short_is_said_once(tmp_path, capfd):
    watch = Watchdog(TrainConfig(grace=10), tmp_path, Processes())
    watch.done(1, 100.0)
    watch.saved(5.0)  # the first step may have been compiled
    watch.done(2, 4.0)
    watch.saved(5.0)
    assert capfd.readouterr().err == ""
    watch.saved(8.0)
    watch.saved(8.0)
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert "a step and its save take 12.0 s, train.grace is 10 s" in err
    assert "set train.grace=18 and have the scheduler send it as early (SLURM: --signal=TERM@18)" in err
    assert watch.terminated == math.inf


def test_the_same_command_begins_a_run_and_goes_on_with_it(tmp_path):
    run = tmp_path / "run"
    command = options(tmp_path, f"out={run}", "resume=auto", "checkpoint.every=2", "train.grace=5")
    first = Forked(tmp_path / "log", *command, "steps=100000", setup=slow_steps, seconds=0.05)
    wait_for(lambda: complete(run), first)
    first.send(signal.SIGTERM)
    assert first.finish()[0] == 143
    saved = int(complete(run)[-1].name.removeprefix("step_"))
    status, out, _ = Forked(tmp_path / "log", *command, f"steps={saved + 2}").finish()
    assert status == 0
    assert f"{run}: {saved + 2} steps done" in out
    assert [row["step"] for row in rows(run)] == list(range(1, saved + 3))
    status, out, err = Forked(tmp_path / "log", *command, f"steps={saved + 2}").finish()
    assert (status, err) == (0, "")
    assert out.startswith(f"{run}: finished at step {saved + 2}; train on: ")


@pytest.mark.parametrize("world", [2, 5])
def test_an_attempt_is_not_misled_by_what_earlier_ones_left_in_the_store(world):
    """Three attempts through one store: in the second not all ranks come, as it is where one is killed early."""
    server = dist.TCPStore("localhost", 0, None, True, timedelta(seconds=20))

    def attempt(ranks: range) -> dict[int, str]:
        found: dict[int, str] = {}

        def join(rank: int) -> None:
            client = dist.TCPStore("localhost", server.port, None, False, timedelta(seconds=2))
            try:
                found[rank] = agreed_attempt(client, rank, world, timedelta(seconds=1.5))
            except (TimeoutError, dist.DistStoreError):
                found[rank] = ""

        threads = [threading.Thread(target=join, args=(rank,)) for rank in ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    first, second, third = attempt(range(world)), attempt(range(1, world)), attempt(range(world))
    assert set(second.values()) == {""}
    assert len(first) == len(third) == world
    assert len(set(first.values())) == len(set(third.values())) == 1
    assert "" not in (first[0], third[0])
    assert first[0] != third[0]

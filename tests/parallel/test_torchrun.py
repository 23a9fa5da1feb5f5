"""The command as a user gives it: torchrun, `-m neox train`, a signal, another number of processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.train.helpers import ROOT, TINY, complete, one_line, rows, token_pair

pytestmark = [pytest.mark.slow, pytest.mark.alone]


def torchrun(processes: int, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), GLOO_SOCKET_IFNAME="lo")
    return subprocess.Popen(
        [*command, "-m", "neox", "train", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def options(folder: Path, *more: str) -> tuple[str, ...]:
    prefix = folder / "train"
    if not prefix.with_suffix(".idx").exists():
        token_pair(prefix, 40_000)
    steady = ("optim.eps=1e-3", "schedule.min_lr=1e-3", "schedule.warmup=0")  # a rate that no number of steps changes
    return (*TINY, *steady, f"data.train={prefix}", "checkpoint.every=0", *more)


def test_sigterm_saves_and_another_number_of_processes_goes_on(tmp_path):
    run = tmp_path / "run"
    process = torchrun(2, *options(tmp_path, f"out={run}", "steps=100000"))
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len(rows(run)) < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert out.count("saved at step") == 1, out + err
    saved = int(complete(run)[-1].name.removeprefix("step_"))
    assert f"stopped by SIGTERM, saved at step {saved} of 100000" in out
    again = torchrun(3, f"resume={run}", f"steps={saved + 2}")
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert out.count("steps done") == 1
    found = rows(run)
    assert [row["step"] for row in found] == list(range(1, saved + 3))
    alone = subprocess.run(
        [sys.executable, "-m", "neox", "train", *options(tmp_path, f"out={tmp_path / 'alone'}", f"steps={saved + 2}")],
        env=dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)),
        check=True,
        capture_output=True,
    )
    assert alone.returncode == 0
    for mine, theirs in zip(found, rows(tmp_path / "alone"), strict=True):  # hundreds of steps, perhaps
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-4)


def test_an_error_of_rank_0_is_said_once(tmp_path):
    process = torchrun(2, *options(tmp_path, f"out={tmp_path / 'run'}", "steps=2", f"tokenizer.path={tmp_path / 'no'}"))
    _, err = process.communicate(timeout=120)
    assert process.returncode
    line = next(line for line in err.splitlines() if line.startswith("neox: error"))
    assert one_line(line + "\n", "no such tokenizer")
    assert err.count("neox: error: ") == 1


@pytest.mark.parametrize("wrong", ["train.stepz=2", "parallel.tp=5"])
def test_a_wrong_option_is_said_once(tmp_path, wrong):
    process = torchrun(2, *options(tmp_path, f"out={tmp_path / 'run'}", wrong))
    _, err = process.communicate(timeout=120)
    assert process.returncode
    assert err.count("neox: error: ") == 1
    assert wrong.partition("=")[0] in err

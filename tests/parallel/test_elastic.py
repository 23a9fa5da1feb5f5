"""torchrun restarts: ranks that are killed, that hang, that come and go; and the processes that `neox train` starts."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.parallel.helpers import STEADY, config, fit, together
from tests.train.helpers import HANGS, ROOT, TINY, assert_same_run, complete, incomplete, rows, token_pair, wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.alone,
    pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="finds ranks in /proc"),
]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
HERE = ("--standalone", "--nproc-per-node=2")
SLOW_SYNC = 0.02  # as in tests/train/test_kill.py


class Launched:
    """A launcher, whose processes are found by what it set in their environment; `setup` runs in each of them first."""

    def __init__(self, folder: Path, *command: str, setup: str = "") -> None:
        folder.mkdir(exist_ok=True)
        (folder / "sitecustomize.py").write_text(setup)
        self.err = folder / "stderr"
        path = f"{folder}{os.pathsep}{ROOT}"
        environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=path, GLOO_SOCKET_IFNAME="lo")
        with open(self.err, "w") as err:
            self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=err, text=True)
        self.poll = self.process.poll

    def ranks(self, restarts: int = 0, world: int = 2) -> dict[int, int]:
        """Process numbers by rank, of a group of `world`, once the launcher has started it so often anew."""
        found = {}
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for child in children:
            try:
                text = Path(f"/proc/{child}/environ").read_bytes().decode()
            except OSError:
                continue
            set_ = dict(entry.split("=", 1) for entry in text.split("\0") if "=" in entry)
            if (set_.get("TORCHELASTIC_RESTART_COUNT"), set_.get("WORLD_SIZE")) == (str(restarts), str(world)):
                found[int(set_["RANK"])] = int(child)
        return found

    def finish(self) -> tuple[int, str, str]:
        out, _ = self.process.communicate(timeout=HANGS)
        return self.process.returncode, out, self.err.read_text()


def arguments(tmp_path: Path, *more: str) -> list[str]:
    prefix = tmp_path / "train"
    if not prefix.with_suffix(".idx").exists():
        token_pair(prefix)
    return [*TINY, *STEADY, "checkpoint.early=0", f"data.train={prefix}", *more]


def wait_for_rows(run: Path, number: int, launched: Launched) -> None:
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(_whole_rows(run)) >= number, launched)


def _whole_rows(run: Path) -> list[bytes]:
    return (run / "metrics.jsonl").read_bytes().split(b"\n")[:-1]


SLOW_DISK = f"""
import os, time
plain = os.fsync
def fsync(handle):
    time.sleep({SLOW_SYNC})
    plain(handle)
os.fsync = fsync
"""


@pytest.mark.parametrize(("seed", "moments", "more"), [
    (3, ["write"] * 5 + ["step"] * 4 + ["start"] * 3, ()),
    (4, ["write"] * 4 + ["step"] * 3 + ["start"], ("checkpoint.asynchronous=true",)),
])  # fmt: skip
def test_random_ranks_killed_twenty_times(tmp_path, seed, moments, more):
    """Twelve and eight seeded moments; torchrun starts both ranks again each time, four times and more in
    the middle of a checkpoint. At the end all is as in a run that was left alone, bit for bit.
    """
    draw = random.Random(seed)
    draw.shuffle(moments)
    steady = ("steps=90", "checkpoint.every=3", "checkpoint.early=0")
    together(2, tmp_path / "ranks", fit, config(tmp_path, "reference", *steady))
    run = tmp_path / "run"
    command = arguments(tmp_path, *steady, *more, f"out={run}")
    launched = Launched(
        tmp_path / "torchrun", *TORCHRUN, *HERE, f"--max-restarts={len(moments)}", "-m", "neox", "train", *command,
        setup=SLOW_DISK,
    )  # fmt: skip
    halves = 0
    for number, moment in enumerate(moments):
        wait_for(lambda number=number: len(launched.ranks(number)) == 2, launched)
        ranks = launched.ranks(number)
        old, done = set(incomplete(run)), len(complete(run))
        if moment == "start":
            time.sleep(draw.uniform(0, 4))
        else:
            wait_for(lambda done=done: len(complete(run)) > done, launched)
            if moment == "write":
                wait_for(lambda old=old: set(incomplete(run)) - old, launched)
            time.sleep(draw.uniform(0, 4 * SLOW_SYNC if moment == "write" else 0.2))
        rank = ranks[draw.randrange(2)]
        os.kill(rank, signal.SIGSTOP)  # what it is in the middle of stays so
        halves += bool(set(incomplete(run)) - old)
        os.kill(rank, signal.SIGKILL)
    status, out, err = launched.finish()
    assert status == 0, err
    assert err.count("exitcode: -9") == len(moments), err
    assert f"{run}: 90 steps done" in out
    assert "Traceback" not in err
    assert halves >= moments.count("write") // 2, "hardly a kill came while a checkpoint was written"
    assert not incomplete(run)
    assert_same_run(run, tmp_path / "reference", tmp_path)


def test_two_ranks_then_one_then_three(tmp_path):
    """The same batches on any number: the losses are those of one process."""
    run, steps = tmp_path / "run", ("schedule.min_lr=1e-3", "checkpoint.every=3", "optim.lr=1e-3")
    alone = config(tmp_path, "alone", *steps, "steps=9")
    fit(alone)
    begun = arguments(tmp_path, *steps, f"out={run}", "resume=auto")
    for processes, last in ((2, 3), (1, 6), (3, 9)):
        command = (*TORCHRUN, "--standalone", f"--nproc-per-node={processes}", "-m", "neox", "train", *begun)
        status, out, err = Launched(tmp_path / "torchrun", *command, f"steps={last}").finish()
        assert status == 0, err
        assert f"{run}: {last} steps done" in out
    for mine, theirs in zip(rows(run), rows(tmp_path / "alone"), strict=True):
        assert mine["step"] == theirs["step"]
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=2e-6)


STUCK = """
import os, time
if os.environ.get("RANK") == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    import neox.train.trainer as trainer
    plain = trainer.clip_gradients
    calls = []
    def clip_gradients(*arguments):
        calls.append(1)
        if len(calls) == 5:
            time.sleep(600)
        return plain(*arguments)
    trainer.clip_gradients = clip_gradients
"""


def test_a_hang_is_written_down_and_the_run_goes_on(tmp_path):
    """Rank 1 never comes to the collective call that rank 0 waits in, in the fifth step."""
    run = tmp_path / "run"
    steady = ("steps=7", "checkpoint.every=2")
    together(2, tmp_path / "ranks", fit, config(tmp_path, "reference", *steady, "checkpoint.early=0"))
    command = arguments(tmp_path, *steady, f"out={run}", "train.timeout=3")
    launched = Launched(
        tmp_path / "torchrun", *TORCHRUN, *HERE, "--max-restarts=1", "-m", "neox", "train", *command, setup=STUCK
    )
    status, _, err = launched.finish()
    assert status == 0, err
    assert "Traceback" not in err
    assert err.count("hang detected: no step finished for 3 s") == 2
    told = [json.loads((run / "hang" / f"rank_{rank}.json").read_text()) for rank in range(2)]
    assert [found["step"] for found in told] == [4, 4]
    counts = [found["collectives"] for found in told]
    assert counts[0] == counts[1] + 1, "rank 0 is in one that rank 1 has not begun"
    assert f"rank 0: after step 4, {counts[0]} collective calls begun; rank 1: after step 4, {counts[1]} " in err
    assert told[0]["trace"]["entries"][-1]["profiling_name"] == "gloo:all_reduce"
    stacks = [(run / "hang" / f"rank_{rank}.txt").read_text() for rank in range(2)]
    assert "clip_gradients" in stacks[1]
    assert all("train_step" in stack for stack in stacks)
    assert_same_run(run, tmp_path / "reference", tmp_path)


SLOW_STEPS = "from tests.train.test_signals import slow_steps\nslow_steps(0.03)\n"


def test_agents_of_two_hosts_of_which_one_is_lost(tmp_path):
    """--nnodes=1:2: with both, two processes; when one agent and its process are killed the other goes on alone."""
    run = tmp_path / "run"
    command = arguments(tmp_path, "steps=120", "checkpoint.every=20", f"out={run}", "schedule.min_lr=1e-3")
    meeting = ["--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=2", "--rdzv-backend=c10d", "--rdzv-id=two-hosts"]
    meeting += [f"--rdzv-endpoint=localhost:{free_port()}"]
    patience = "last_call_timeout=10,keep_alive_interval=1,keep_alive_max_attempt=2"
    host = {"a": 1, "b": 0}  # the store that they meet in is with the one that stays
    agents = []
    for name, is_host in host.items():
        meet = (*meeting, f"--rdzv-conf=is_host={is_host},{patience}")
        agents.append(Launched(tmp_path / name, *TORCHRUN, *meet, "-m", "neox", "train", *command, setup=SLOW_STEPS))
    for agent in agents:  # one that comes late has the other's process started again, in a group of two
        wait_for(lambda agent=agent: len(agent.ranks()) == 1, agent)
    wait_for(lambda: complete(run), agents[0])
    (rank,) = agents[1].ranks().values()
    agents[1].process.kill()
    os.kill(rank, signal.SIGKILL)
    agents[1].finish()
    status, out, err = agents[0].finish()
    assert status == 0, err
    assert f"{run}: 120 steps done" in out
    assert f"resumed {run} at step " in err
    assert "Traceback" not in err
    fit(config(tmp_path, "alone", "steps=120", "checkpoint.early=0", "schedule.min_lr=1e-3"))
    for mine, theirs in zip(rows(run), rows(tmp_path / "alone"), strict=True):
        assert mine["step"] == theirs["step"]
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5)  # rounding grows over 120 steps


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


# --- neox train starts the processes itself ----------------------------------------------------------------------


def neox_train(folder: Path, *command: str, setup: str = "") -> Launched:
    return Launched(folder, sys.executable, "-m", "neox", "train", *command, setup=setup)


def test_neox_train_starts_its_processes_and_starts_them_again(tmp_path):
    run = tmp_path / "run"
    steady = ("steps=40", "checkpoint.every=4", "checkpoint.early=0")
    together(2, tmp_path / "ranks", fit, config(tmp_path, "reference", *steady))
    launched = neox_train(tmp_path / "log", *arguments(tmp_path, *steady, f"out={run}", "parallel.tp=1", "dp_shard=2"))
    wait_for(lambda: complete(run), launched)
    os.kill(launched.ranks()[1], signal.SIGKILL)
    status, out, err = launched.finish()
    assert status == 0, err
    assert f"{run}: 40 steps done" in out
    assert "Traceback" not in err
    assert re.search(r"neox: error: rank 0: another process of the run was lost, after step \d+ \(Connection", err)
    assert_same_run(run, tmp_path / "reference", tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_processes_once(tmp_path, number):
    run = tmp_path / "run"
    launched = neox_train(tmp_path / "log", *arguments(tmp_path, "steps=100000", f"out={run}", "dp_shard=2"))
    wait_for_rows(run, 3, launched)
    launched.process.send_signal(number)
    status, out, err = launched.finish()
    assert status == 128 + number
    assert "Traceback" not in err
    saved = int(complete(run)[-1].name.removeprefix("step_"))
    after = r", \d+\.\d s after the signal" if number == signal.SIGTERM else ""
    said = f"{run}: stopped by {number.name}, saved at step {saved} of 100000, loss \\d.\\d+{after}; "
    assert re.fullmatch(f"{said}continue: neox train resume={run}\n", out)
    assert len(rows(run)) == saved


def test_a_second_interrupt_reaches_them_too(tmp_path):
    run = tmp_path / "run"
    stuck = "from tests.train.test_signals import stuck_after\nstuck_after(3)\n"
    launched = neox_train(
        tmp_path / "log", *arguments(tmp_path, "steps=9", f"out={run}", "dp_shard=2", "checkpoint.every=2"), setup=stuck
    )
    wait_for_rows(run, 3, launched)
    ranks = launched.ranks()
    for _ in range(2):
        time.sleep(0.5)
        launched.process.send_signal(signal.SIGINT)
    status, out, err = launched.finish()
    assert (status, out) == (130, "")
    assert "Traceback" not in err
    assert f"continue from the last checkpoint: neox train resume={run}" in err
    assert not any(os.path.exists(f"/proc/{process}") for process in ranks.values())


def test_processes_end_with_a_save_when_their_launcher_is_killed(tmp_path):
    """kill -9 of `neox train` left its processes training for hundreds of steps."""
    run = tmp_path / "run"
    launched = neox_train(tmp_path / "log", *arguments(tmp_path, "steps=100000", f"out={run}", "dp_shard=2"))
    wait_for_rows(run, 3, launched)
    ranks = launched.ranks().values()
    launched.process.kill()
    launched.process.communicate(timeout=HANGS)
    ended = time.monotonic() + 60
    while any(Path(f"/proc/{rank}").exists() for rank in ranks):
        assert time.monotonic() < ended, "a process trains on"
        time.sleep(0.1)
    assert len(rows(run)) == int(complete(run)[-1].name.removeprefix("step_"))

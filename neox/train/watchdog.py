"""The watchdog: a thread that ends the process when a step hangs, or when a stop takes longer than it may.

It costs a step the storing of a time.
"""

import contextlib
import faulthandler
import json
import math
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from neox.checkpoint.steps import complete_steps
from neox.config import TrainConfig
from neox.system.files import write_atomic
from neox.system.processes import Processes, flight_record

STATUS_HUNG = 124  # as timeout(1) has it
OTHERS = 5.0  # seconds that a process which hangs waits for what the others write of it
MARGIN = 0.05  # of the grace, left for the line that is printed and for the end itself


class Watchdog:
    """Ends the process if no step finishes for `train.timeout` seconds, or if it outlives SIGTERM by `train.grace`.

    Both are said in one line; RUN/hang has the details of a hang. Active inside the context manager. Training is not
    held up: work in torch, and waiting for other processes, lets the thread run.
    """

    def __init__(self, config: TrainConfig, run: Path, processes: Processes) -> None:
        self.config, self.run, self.processes = config, run, processes
        self.step = 0
        self.step_seconds = 0.0
        self.terminated = math.inf  # when SIGTERM came
        self._steps = 0
        self._last = time.monotonic()  # when the last step was finished
        self._last_clock = time.time()
        self._told = False

    def done(self, step: int, seconds: float) -> None:
        """Note a finished step and its seconds, without evaluation and checkpoints."""
        self.step, self.step_seconds = step, seconds
        self._steps += 1
        self._last, self._last_clock = time.monotonic(), time.time()

    def saved(self, seconds: float) -> None:
        """Warn, once, if a step and a save of so many seconds are too long for `train.grace`."""
        needed, grace = self.step_seconds + seconds, self.config.grace
        # A first step may have been compiled.
        if needed < grace * (1 - MARGIN) or self._steps < 2 or self._told:
            return
        self._told = True
        if not self.processes.rank:
            enough = math.ceil(1.5 * needed)
            _say(
                f"a step and its save take {needed:.1f} s, train.grace is {grace:g} s: a SIGTERM would lose the steps "
                f"since the last checkpoint; set train.grace={enough} and have the scheduler send it as early "
                f"(SLURM: --signal=TERM@{enough})"
            )

    def terminate(self) -> None:
        """Note that SIGTERM came, to this process or to another one of the run."""
        self.terminated = min(self.terminated, time.monotonic())

    def since_sigterm(self) -> float:
        """Seconds since SIGTERM came."""
        return time.monotonic() - self.terminated

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Suspend the timeout inside."""
        self._last = math.inf
        try:
            yield
        finally:
            self._last = time.monotonic()

    def __enter__(self) -> "Watchdog":
        self._read, self._write = os.pipe()
        for end in (self._read, self._write):
            os.set_blocking(end, False)
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            # Python's own handlers wait until the main thread is back in Python, which may be long.
            self._before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._wait, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._main:
            signal.set_wakeup_fd(self._before)
        os.write(self._write, b"\0")
        self._thread.join()
        os.close(self._read)
        os.close(self._write)

    def _wait(self) -> None:
        timeout = self.config.timeout or math.inf
        while True:
            late = self.terminated + self.config.grace * (1 - MARGIN)
            now = time.monotonic()
            if now >= late:
                self._too_late()
            if now >= self._last + timeout:
                self._hung()
            # A step moves what is waited for: looked at ten times as often as it matters, and once a second at least.
            pause = min(1.0, late - now, timeout / 10)
            if select.select([self._read], [], [], pause)[0]:
                came = os.read(self._read, 4096)
                if 0 in came:
                    return
                if signal.SIGTERM in came:
                    self.terminate()

    def _too_late(self) -> NoReturn:
        if not self.processes.rank:
            kept = complete_steps(self.run)
            newest = f"the newest checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
            _say(
                f"{self.run}: stopped by SIGTERM after step {self.step}, not done within train.grace="
                f"{self.config.grace:g} s: {newest}; continue: neox train resume={self.run}"
            )
        os._exit(128 + signal.SIGTERM)

    def _hung(self) -> NoReturn:
        rank, folder = self.processes.rank, self.run / "hang"
        seconds = time.monotonic() - self._last
        with contextlib.suppress(OSError):  # a disk that hangs, or is full: the process ends all the same
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / f"rank_{rank}.txt", "w") as file:
                faulthandler.dump_traceback(file)
            trace = flight_record()
            begun = sum(int(group["last_enqueued_collective"]) for group in trace.get("pg_status", {}).values())
            found = {"rank": rank, "step": self.step, "collectives": begun, "time": time.time(), "trace": trace}
            write_atomic(folder / f"rank_{rank}.json", json.dumps(found).encode())
        # The first to end would take the others with it before they have written theirs.
        others = self._others(folder)
        line = f"{self.run}: hang detected: no step finished for {seconds:.0f} s (train.timeout); "
        _say(f"{line}stacks and collective calls of rank {rank}: {folder / f'rank_{rank}.txt'}, .json{others}")
        os._exit(STATUS_HUNG)

    def _others(self, folder: Path) -> str:
        """Report, on rank 0, how far each process of the run was."""
        until = time.monotonic() + OTHERS
        found: dict[int, dict[str, Any]] = {}
        while len(found) < self.processes.world and time.monotonic() < until:
            time.sleep(0.05)
            for path in folder.glob("rank_*.json"):
                with contextlib.suppress(OSError, ValueError):
                    if path.stat().st_mtime > self._last_clock:  # else it is of an earlier hang
                        told = json.loads(path.read_bytes())
                        found[told["rank"]] = told
        if self.processes.rank or self.processes.world == 1:
            return ""
        places: dict[str, list[str]] = {}
        for rank in range(self.processes.world):
            place = "no word"
            if rank in found:
                place = f"after step {found[rank]['step']}, {found[rank]['collectives']} collective calls begun"
            places.setdefault(place, []).append(str(rank))
        return "; " + "; ".join(f"rank {', '.join(ranks)}: {place}" for place, ranks in places.items())


def _say(line: str) -> None:
    os.write(2, f"neox: {line}\n".encode())  # not through a stream: the main thread may be in the middle of a write

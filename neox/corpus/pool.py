"""Worker processes for shards: shard numbers in, events out, as lines of JSON.

Each is a fresh Python that runs MODULE.main.

Not multiprocessing: its workers outlive a parent that is killed, and it runs the caller's main script once more. Here
the end of the input, which the system brings about however the parent ends, ends the process.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from neox.corpus.readers import ReadError

REPORT_EVERY = 0.1  # seconds between two reports of one process
Event = dict[str, Any]
Task = Callable[[int, Callable[[float], object]], None]
"""Work on a shard, given by its number; its second argument is called with the bytes as they are done."""


def run_workers(
    command: Sequence[str], names: dict[int, str], workers: int, lock: int, advance: Callable[[float], object]
) -> None:
    """Run `workers` processes over the shards `names` (number -> name in messages).

    `command` is a module and the arguments of its `main`, which calls `worker_loop`.
    `lock` is a file that they keep open. `advance` is told the bytes as they are done.
    Raises what the first of them raised that failed, and OSError where one was killed; the others are ended then.
    """
    todo: SimpleQueue[int] = SimpleQueue()
    for number in names:
        todo.put(number)
    events: SimpleQueue[Event] = SimpleQueue()
    source = str(Path(__file__).parents[2])
    paths = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH", "")]))
    # One thread each: there are as many processes as cores.
    quiet = {"PYTHONPATH": paths, "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    processes = [
        subprocess.Popen(
            # Not -m, which warns of a module that its package has imported by then.
            [sys.executable, "-c", f"import sys; from {command[0]} import main; main(*sys.argv[1:])", *command[1:]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | quiet,
            pass_fds=(lock,),
        )
        for _ in range(workers)
    ]
    try:
        for process in processes:
            threading.Thread(target=_feed, args=(process, todo, events, names), daemon=True).start()
        left = len(names)
        while left:
            event = events.get()
            if "error" in event:
                raise _error(event)
            advance(event["taken"])
            left -= event["done"]
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def _feed(
    process: subprocess.Popen[bytes], todo: SimpleQueue[int], events: SimpleQueue[Event], names: dict[int, str]
) -> None:
    """Give one process a shard at a time; pass its events on."""
    assert process.stdin is not None
    assert process.stdout is not None
    while True:
        try:
            number = todo.get_nowait()
        except Empty:
            return
        try:
            process.stdin.write(b"%d\n" % number)
            process.stdin.flush()
            for line in process.stdout:
                event = json.loads(line)
                events.put(event)
                if event.get("done"):
                    break
            else:
                raise BrokenPipeError
        except OSError:
            status = process.wait()
            how = f"was killed by signal {-status} (9: memory, perhaps)" if status < 0 else f"ended with {status}"
            what = f"{names[number]}: a process that worked on it {how}; what is done stays: run it again"
            events.put({"error": what, "kind": "OSError"})
            return


def _error(event: Event) -> Exception:
    if event["kind"] == "OSError":
        if event.get("errno") is not None:
            return OSError(event["errno"], event["error"], event["file"])
        return OSError(event["error"])
    return ReadError(event["reason"], event["error"]) if "reason" in event else ValueError(event["error"])


def worker_loop(begin: Callable[[], Task]) -> None:
    """Run the task on each shard number read from stdin until EOF.

    `begin` sets the task up. This is the main loop of a process of `run_workers`.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends us
    numbers: SimpleQueue[int] = SimpleQueue()
    threading.Thread(target=_listen, args=(numbers,), daemon=True).start()
    try:
        task = begin()
        while True:
            number = numbers.get()
            report = _ProgressReporter()
            task(number, report)
            report.send(done=1)
    except OSError as error:
        _send(kind="OSError", error=error.strerror or str(error), errno=error.errno, file=str(error.filename))
    except ReadError as error:
        _send(kind="ValueError", error=str(error), reason=error.reason)
    except ValueError as error:
        _send(kind="ValueError", error=str(error))


class _ProgressReporter:
    """Sum of the bytes that are done, reported now and then."""

    def __init__(self) -> None:
        self._taken, self._said = 0.0, time.monotonic()

    def __call__(self, taken: float) -> None:
        self._taken += taken
        if time.monotonic() - self._said > REPORT_EVERY:
            self.send(done=0)

    def send(self, done: int) -> None:
        _send(taken=self._taken, done=done)
        self._taken, self._said = 0.0, time.monotonic()


def _send(**event: Any) -> None:
    print(json.dumps(event), flush=True)


def _listen(numbers: SimpleQueue[int]) -> None:
    for line in sys.stdin:
        numbers.put(int(line))
    os._exit(0)  # the parent has gone, or needs us no longer: what is unfinished is under a temporary name

"""Processes that make parts, each a fresh `python -m neox.data.workers`: shard numbers in, events out, as JSON lines.

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
from collections.abc import Callable
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from neox.data.encode import Backend
from neox.data.plan import Parts, Plan
from neox.data.readers import Fault, OnError
from neox.data.tokenize import encoder_of, make_part
from neox.tokenizer import Tokenizer

TELL = 0.1  # seconds between two reports of one process
Event = dict[str, Any]


def run(
    parts: Parts,
    names: dict[int, str],
    workers: int,
    on_error: OnError,
    backend: Backend,
    lock: int,
    advance: Callable[[float], object],
) -> None:
    """Make the parts of the shards `names` (number to what it is called) in `workers` processes.

    `lock` is a file that they keep open, so that the folder stays locked until the last of them is gone.
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
    command = [sys.executable, "-m", "neox.data.workers", str(parts.folder), on_error, backend]
    processes = [
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | quiet,
            pass_fds=(lock,) if os.name == "posix" else (),
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
    """Give one process a shard at a time, and pass on what it says."""
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
            what = f"{names[number]}: a process that tokenized it {how}; what is done stays: run it again"
            events.put({"error": what, "kind": "OSError"})
            return


def _error(event: Event) -> Exception:
    if event["kind"] == "OSError":
        if event.get("errno") is not None:
            return OSError(event["errno"], event["error"], event["file"])
        return OSError(event["error"])
    return Fault(event["reason"], event["error"]) if "reason" in event else ValueError(event["error"])


def main(folder: str, on_error: OnError, backend: Backend) -> None:
    """What a process does: make each part whose shard's number comes in, until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends us
    numbers: SimpleQueue[int] = SimpleQueue()
    threading.Thread(target=_listen, args=(numbers,), daemon=True).start()
    try:
        parts = Parts(Path(folder).with_suffix(""))
        plan = Plan.read(parts.plan_file)
        tokenizer = Tokenizer.from_file(parts.folder / "tokenizer.json")
        if tokenizer.sha256 != plan.settings["tokenizer_sha256"]:
            raise ValueError(f"{parts.folder / 'tokenizer.json'}: is not the tokenizer of the plan: begin anew")
        encoder = encoder_of(tokenizer, plan.settings, backend)
        while True:
            number = numbers.get()
            teller = _Teller()
            make_part(parts, plan, plan.shards[number], encoder, on_error, teller)
            teller.say(done=1)
    except OSError as error:
        _say(kind="OSError", error=error.strerror or str(error), errno=error.errno, file=str(error.filename))
    except Fault as error:
        _say(kind="ValueError", error=str(error), reason=error.reason)
    except ValueError as error:
        _say(kind="ValueError", error=str(error))


class _Teller:
    """Adds up the bytes that are done, and says so now and then."""

    def __init__(self) -> None:
        self._taken, self._said = 0.0, time.monotonic()

    def __call__(self, taken: float) -> None:
        self._taken += taken
        if time.monotonic() - self._said > TELL:
            self.say(done=0)

    def say(self, done: int) -> None:
        _say(taken=self._taken, done=done)
        self._taken, self._said = 0.0, time.monotonic()


def _say(**event: Any) -> None:
    print(json.dumps(event), flush=True)


def _listen(numbers: SimpleQueue[int]) -> None:
    for line in sys.stdin:
        numbers.put(int(line))
    os._exit(0)  # the parent has gone, or needs us no longer: what is unfinished is under a temporary name


if __name__ == "__main__":
    main(*sys.argv[1:])  # type: ignore[arg-type]

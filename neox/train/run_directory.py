"""A run directory: the config it resumes with, its lock, and signals that end the run with a save."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from neox.checkpoint.steps import complete_steps, latest_valid, read_step
from neox.config import Config, load_config
from neox.system.files import read_rows, try_lock
from neox.system.processes import Processes, launched


def run_config(run: Path, overrides: Iterable[str] = ()) -> Config:
    """Config that a resumed run continues with: its own, with the overrides on top.

    RUN/config.toml holds what the run was last started or resumed with; a copy without it has its newest checkpoint's.
    Raises ValueError where the directory holds neither.
    """
    kept = run / "config.toml"
    if not kept.is_file():
        if not complete_steps(run):
            raise ValueError(f"{run}: holds no run (no config.toml): start one with `neox train ... out={run}`")

        def use(step: Path) -> Path:
            read_step(step)
            return step / "config.toml"

        kept = latest_valid(run, use)
    config = load_config(files=[kept], overrides=overrides)
    # The run may have been moved: it is where it was found.
    return config.model_copy(update={"log": config.log.model_copy(update={"out": str(run)})})


def refuse_existing(run: Path) -> None:
    """Raise ValueError if the directory holds a run: a new one could not be told from it."""
    if complete_steps(run) or (run / "metrics.jsonl").exists():
        raise ValueError(f"{run}: holds a run: continue it with `neox train resume={run}`, or choose another out=")


@contextlib.contextmanager
def opened(run: Path, resume: bool, processes: Processes) -> Iterator[bool]:
    """Inside, the run directory has this run as its only writer; yields True if the run continues.

    It does on `resume`, and where the torchrun job of this process began it. Raises ValueError where another process
    writes the directory, and where it holds a run that is not to be continued.
    """
    run.mkdir(parents=True, exist_ok=True)
    with only_writer(run, processes):
        resume = bool(processes.all_reduce_max(resume or begun_by_this_launch(run)))
        # Looked at under the lock: a run that another process has just finished must not be begun again.
        if not resume:
            refuse_existing(run)
        if not processes.rank:
            note_launch(run)
        yield resume


@contextlib.contextmanager
def only_writer(run: Path, processes: Processes) -> Iterator[None]:
    """Refuse a second writer on a run directory; the lock goes with the process, also when it is killed.

    Of the processes of one run rank 0 holds it for all.
    """
    handle = os.open(run / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with processes.rank_zero_first():
            if not processes.rank:
                if not try_lock(handle):
                    process = os.read(handle, 32).decode(errors="replace").strip() or "unknown"
                    raise ValueError(
                        f"{run}: process {process} is writing this run: wait for it, stop it, or choose another out="
                    )
                with contextlib.suppress(OSError):  # a full disk costs the number in the message, not the lock
                    os.ftruncate(handle, 0)
                    os.write(handle, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(handle)


def note_launch(run: Path) -> None:
    """Record the torchrun job that writes the run, for `begun_by_this_launch`."""
    if launched():
        (run / ".launch").write_text(launched())


def begun_by_this_launch(run: Path) -> bool:
    """True if the torchrun job of this process began the run: a restart, with which the run continues.

    torchrun's count of restarts does not say so: a host that joins a job counts from 0, and a run that was there
    before is refused by every attempt. A job without a name of its own (`--rdzv-id`) is never the same.
    """
    noted = run / ".launch"
    return launched() not in ("", "none") and noted.is_file() and noted.read_text() == launched()


def is_evaluated(run: Path, step: int) -> bool:
    """True if the run's rows hold an evaluation after that step."""
    rows = run / "metrics.jsonl"
    return rows.exists() and any(row.get("step") == step and "valid_loss" in row for row in read_rows(rows))


class StopSignals:
    """Handler of the first Ctrl-C or SIGTERM: noted in `number`, so that the run saves before it ends.

    A second Ctrl-C interrupts at once.
    """

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.number = 0

    def __enter__(self) -> "StopSignals":
        self.before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # elsewhere whoever runs us there handles signals
            self.before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in self.before:
            signal.signal(number, self._note)
        return self

    def _note(self, number: int, _: Any) -> None:
        self.number = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if not self.quiet:  # not through a stream: it may be in the middle of a write
            os.write(2, b"\nneox: stopping after this step; Ctrl-C again stops at once, without saving\n")

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def discard(config: Config, run: Path) -> None:
    """Remove the tokens of a start that never reached a step: they may come from other text than this config's."""
    kept, given = run / "tokenizer.json", config.tokenizer.path
    sources = (Path(given), Path(given) / "tokenizer.json") if given else ()
    if kept.exists() and not any(source.exists() and kept.samefile(source) for source in sources):
        kept.unlink()
    for kind, names in (("train", config.data.train), ("valid", config.data.valid)):
        for number in range(len(names)):
            (run / "data" / f"{kind}-{number}.idx").unlink(missing_ok=True)  # without it the pair is not complete

"""Sinks of a run's rows and samples: its own files, which are the record, the console, and trackers."""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from neox.config import Config
from neox.system.console import progress_bar
from neox.system.files import read_rows, write_atomic

Row = Mapping[str, Any]


class Sink(Protocol):
    """Receiver of a run's rows. Every row has its "step"."""

    def step(self, step: int) -> None:
        """Note a step that no row is written of."""

    def write(self, row: Row) -> None:
        """Write numbers: of a logged step (`metrics.make_row`), an evaluation ("valid_loss"), tasks ("tasks/NAME")."""

    def sample(self, row: Row) -> None:
        """Write text: a "prompt", and the "text" that the model made of it."""

    def sync(self) -> None:
        """Sync to disk all that was written, before the checkpoint that covers it."""

    def close(self) -> None: ...


class Sinks(list[Sink]):
    """Several sinks as one."""

    def step(self, step: int) -> None:
        for sink in self:
            sink.step(step)

    def write(self, row: Row) -> None:
        for sink in self:
            sink.write(row)

    def sample(self, row: Row) -> None:
        for sink in self:
            sink.sample(row)

    def sync(self) -> None:
        for sink in self:
            sink.sync()

    def close(self) -> None:
        for sink in self:
            sink.close()


def build_sinks(config: Config, run: Path, first_step: int, quiet: bool = False) -> Sinks:
    """Open the sinks that a config names, of a run that continues after `first_step`. On rank 0 only.

    Raises OSError where the run's own files cannot be written. A tracker that fails, now or later, says so in one line
    and is disabled from then on (one that is not installed was refused before, by `check_trackers`).
    """
    sinks = Sinks([JsonlSink(run, first_step)])
    say: Callable[[str], None] = _say
    if not quiet:
        console = ConsoleSink(first_step, config.train.steps)
        sinks.append(console)
        say = console.say
        if first_step:
            say(f"resumed {run} at step {first_step} of {config.train.steps}")
    if config.log.tensorboard or config.log.wandb is not None:
        from neox.train.trackers import build_trackers

        sinks.extend(build_trackers(config, run, first_step, say))
    return sinks


def check_trackers(config: Config) -> None:
    """Raise ValueError for a tracker that the config asks for and that is not installed; imports none."""
    from neox.system.optional import check_installed

    for key, wanted in (("tensorboard", config.log.tensorboard), ("wandb", config.log.wandb is not None)):
        if wanted:
            check_installed(key, f"log.{key}", "log")


class JsonlSink:
    """metrics.jsonl and samples.jsonl: one row a line. A resumed run drops rows beyond its checkpoint."""

    def __init__(self, run: Path, first_step: int) -> None:
        """Keep the rows of steps up to `first_step` (a row cut by a crash is dropped) and append from there."""
        # A run that begins once more at step 0 writes that step's sample once more.
        self.last_kept = first_step if first_step else -1
        self.samples_path = run / "samples.jsonl"
        self.rows = _RowFile(run / "metrics.jsonl", self.last_kept)
        self.samples = _RowFile(self.samples_path, self.last_kept) if self.samples_path.exists() else None

    def step(self, step: int) -> None:
        pass

    def write(self, row: Row) -> None:
        self.rows.write(row)

    def sample(self, row: Row) -> None:
        self.samples = self.samples or _RowFile(self.samples_path, self.last_kept)
        self.samples.write(row)

    def sync(self) -> None:
        self.rows.sync()
        if self.samples:
            self.samples.sync()

    def close(self) -> None:
        self.rows.file.close()
        if self.samples:
            self.samples.file.close()


class _RowFile:
    """A file of JSON lines, open for more. OSErrors name the file and say what to do."""

    def __init__(self, path: Path, last_kept: int) -> None:
        kept = [row for row in read_rows(path) if row.get("step", math.inf) <= last_kept] if path.exists() else []
        write_atomic(path, b"".join(json.dumps(row).encode() + b"\n" for row in kept))
        self.path = path
        # Unbuffered: what a full disk refused must not be tried again when the file is closed.
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115

    def write(self, row: Row) -> None:
        # JSON has no NaN: what is not finite is null.
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        left = memoryview(json.dumps(plain, allow_nan=False).encode() + b"\n")
        try:
            while left:
                left = left[self.file.write(left) :]
        except OSError as error:
            raise self._named(error) from None

    def sync(self) -> None:
        try:
            os.fsync(self.file.fileno())
        except OSError as error:
            raise self._named(error) from None

    def _named(self, error: OSError) -> OSError:
        return OSError(error.errno, f"{error.strerror or error}: free space, then resume the run", str(self.path))


class ConsoleSink:
    """Progress bar with the main figures of the last row on a terminal, plain lines elsewhere."""

    WIDE = 120  # columns from which gradient norm and learning rate find room beside the bar

    def __init__(self, first_step: int, steps: int) -> None:
        self.console, self.steps = Console(stderr=True), steps
        self.bar = progress_bar("count", "status", show=self.console.is_terminal, console=self.console)
        self.bar.start()
        self.task = self.bar.add_task("train", total=steps, completed=first_step, status="")

    def step(self, step: int) -> None:
        self.bar.update(self.task, completed=step)

    def write(self, row: Row) -> None:
        if "valid_loss" in row:
            self.say(f"step {row['step']}: held-out loss {row['valid_loss']:.4f}")
            return
        if found := {key.removeprefix("tasks/"): value for key, value in row.items() if key.startswith("tasks/")}:
            self.say(f"step {row['step']}: " + ", ".join(f"{name} {value:.4f}" for name, value in found.items()))
            return
        loss, speed = f"loss {row['loss']:.4f}", f"{row['tokens_per_second']:,.0f} tok/s  MFU {row['mfu']:.2f}"
        full = f"{loss}  norm {row['grad_norm']:.3g}  lr {row['lr']:.2e}  {speed}"
        self.bar.update(
            self.task, completed=row["step"], status=full if self.console.width >= self.WIDE else f"{loss}  {speed}"
        )
        if "skip_reason" in row:
            self.say(f"step {row['step']}: update skipped: {row['skip_reason']}")
        if not self.console.is_terminal:
            self.say(f"step {row['step']}/{self.steps}  {full}  eta {row['eta']:,.0f} s")

    def sample(self, row: Row) -> None:
        self.say(f"step {row['step']}, a sample: {visible(row['prompt'])}▸{visible(row['text'])}")

    def say(self, line: str) -> None:
        _say(line, self.console)

    def sync(self) -> None:
        pass

    def close(self) -> None:
        self.bar.stop()


def _say(line: str, console: Console | None = None) -> None:
    (console or Console(stderr=True)).print(line, highlight=False, markup=False, emoji=False, soft_wrap=True)


def visible(text: str) -> str:
    """Replace control characters by their pictures: a model's text must not steer the terminal."""
    pictures = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
    return text.translate(pictures | dict.fromkeys(range(0x80, 0xA0), 0xFFFD))

"""What a run tells: one JSON row a logged step in metrics.jsonl, and a live line on the console."""

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from neox.files import write_atomic


class JsonlSink:
    """metrics.jsonl: one row a logged step. A resumed run drops the rows after its checkpoint and writes them again."""

    def __init__(self, path: Path, first_step: int) -> None:
        """Keep the rows of steps up to `first_step` (a row cut by a crash is dropped) and append from there."""
        kept = [row for row in read_rows(path) if row.get("step", math.inf) <= first_step] if path.exists() else []
        write_atomic(path, b"".join(json.dumps(row).encode() + b"\n" for row in kept))
        self.path = path
        # Unbuffered: what a full disk refused must not be tried again when the file is closed.
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115

    def write(self, row: dict[str, Any]) -> None:
        left = memoryview(json.dumps(row).encode() + b"\n")
        try:
            while left:
                left = left[self.file.write(left) :]
        except OSError as error:
            raise self._named(error) from None

    def sync(self) -> None:
        """Make the rows so far survive a power cut: called before the checkpoint that covers them."""
        try:
            os.fsync(self.file.fileno())
        except OSError as error:
            raise self._named(error) from None

    def close(self) -> None:
        self.file.close()

    def _named(self, error: OSError) -> OSError:
        return OSError(error.errno, f"{error.strerror or error}: free space, then resume the run", str(self.path))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a metrics.jsonl; a last line that a crash cut short is left out."""
    rows = []
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


class ConsoleSink:
    """A progress bar with loss, tokens/s, MFU and time left on a terminal; plain lines elsewhere."""

    def __init__(self, first_step: int, steps: int) -> None:
        self.console = Console(stderr=True)
        columns = (
            TextColumn("train"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.steps, self.first_step, self.started = steps, first_step, time.monotonic()
        self.bar.start()
        self.task = self.bar.add_task("train", total=steps, completed=first_step, status="")

    def step(self, step: int) -> None:
        self.bar.update(self.task, completed=step)

    def write(self, row: dict[str, Any]) -> None:
        if "valid_loss" in row:
            self.say(f"step {row['step']}: held-out loss {row['valid_loss']:.4f}")
            return
        loss = math.nan if row["loss"] is None else row["loss"]
        status = f"loss {loss:.4f}  {row['tokens_per_second']:,.0f} tok/s  MFU {row['mfu']:.2f}"
        self.bar.update(self.task, completed=row["step"], status=status)
        if not self.console.is_terminal:
            done = max(1, row["step"] - self.first_step)
            left = (time.monotonic() - self.started) / done * (self.steps - row["step"])
            self.say(f"step {row['step']}/{self.steps}  {status}  eta {left:,.0f} s")

    def say(self, line: str) -> None:
        self.bar.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        self.bar.stop()

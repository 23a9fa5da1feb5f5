"""Goodput: the share of a run's time that went into the updates its weights are made of."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from neox.system.files import read_rows

KINDS = {
    "training": "training",
    "starting": "starting",
    "evaluating": "evaluation and samples",
    "saving": "waiting for checkpoints",
}


class Goodput:
    """Seconds by kind, over all calls of `Trainer.fit` on a run.

    The seconds in a checkpoint are those that contributed to its weights. The rest of the time that the calls took was
    lost: work that a kill or a rewind threw away, and steps whose update was skipped.
    """

    def __init__(self, before: float = 0.0, clock: Callable[[], float] = time.perf_counter) -> None:
        """Begin to count; `before` are the seconds that earlier calls took."""
        self.clock, self.before, self.began = clock, before, clock()
        self.seconds = dict.fromkeys(KINDS, 0.0)

    @classmethod
    def of(cls, run: Path) -> "Goodput":
        """Goodput of a run that is resumed: earlier calls left their time in its rows, up to the last one."""
        rows = read_rows(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []
        return cls(next((float(row["spent"]) for row in reversed(rows) if "spent" in row), 0.0))

    @contextmanager
    def spending(self, kind: str) -> Iterator[None]:
        """Count the time inside as of that kind, unless it raises."""
        started = self.clock()
        yield
        self.seconds[kind] += self.clock() - started

    def move(self, state: Mapping[str, Any]) -> None:
        """Go to the seconds of a checkpoint, `state`."""
        self.seconds = {kind: float(state.get(kind, 0.0)) for kind in KINDS}

    def state(self) -> dict[str, float]:
        """Seconds for a checkpoint's state.json."""
        return {**self.seconds, "elapsed": self.elapsed}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Take over the time that a checkpoint noted, which may be later than the last row."""
        self.before = max(self.before, float(state.get("elapsed", 0.0)))

    @property
    def elapsed(self) -> float:
        """Seconds that all calls took so far."""
        return self.before + self.clock() - self.began

    def line(self) -> str:
        """Format one line for people, the share of training first."""
        whole = max(self.elapsed, 1e-9)
        rest = {text: self.seconds[kind] for kind, text in KINDS.items() if kind != "training"}
        rest["lost to restarts, rewinds and skipped updates"] = whole - sum(self.seconds.values())
        parts = ", ".join(f"{text} {seconds:,.1f} s" for text, seconds in rest.items() if seconds >= 0.05)
        return f"goodput {self.seconds['training'] / whole:.1%}: {self.seconds['training']:,.1f} of {whole:,.1f} s" + (
            f"; {parts}" if parts else ""
        )

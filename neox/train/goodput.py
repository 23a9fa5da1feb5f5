"""Where the time of a run went: into the updates that its weights are made of, around them, or into nothing."""

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

    What a checkpoint's state knows of is that state's own past. The difference to all the time that the calls took was
    lost: work that a kill or a rewind threw away, and steps whose update was left out.
    """

    def __init__(self, before: float = 0.0, clock: Callable[[], float] = time.perf_counter) -> None:
        """`before`: seconds that earlier calls took."""
        self.clock, self.before, self.began = clock, before, clock()
        self.seconds = dict.fromkeys(KINDS, 0.0)

    @classmethod
    def of(cls, run: Path) -> "Goodput":
        """That of a run whose earlier calls left their time in its rows, up to the last one that they wrote."""
        rows = read_rows(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []
        return cls(next((float(row["spent"]) for row in reversed(rows) if "spent" in row), 0.0))

    @contextmanager
    def spending(self, kind: str) -> Iterator[None]:
        """What happens in here is of that kind, unless it raises."""
        started = self.clock()
        yield
        self.seconds[kind] += self.clock() - started

    def move(self, state: Mapping[str, Any]) -> None:
        """The run is now where `state`, the `seconds` of a checkpoint, was noted."""
        self.seconds = {kind: float(state.get(kind, 0.0)) for kind in KINDS}

    def state(self) -> dict[str, float]:
        """What a checkpoint notes."""
        return {**self.seconds, "elapsed": self.elapsed}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Earlier calls took at least as long as the checkpoint `state` says, which may be later than the last row."""
        self.before = max(self.before, float(state.get("elapsed", 0.0)))

    @property
    def elapsed(self) -> float:
        """Seconds of all calls so far."""
        return self.before + self.clock() - self.began

    def line(self) -> str:
        """One line for people, the share of training first."""
        whole = max(self.elapsed, 1e-9)
        rest = {text: self.seconds[kind] for kind, text in KINDS.items() if kind != "training"}
        rest["lost to restarts, rewinds and skipped updates"] = whole - sum(self.seconds.values())
        parts = ", ".join(f"{text} {seconds:,.1f} s" for text, seconds in rest.items() if seconds >= 0.05)
        return f"goodput {self.seconds['training'] / whole:.1%}: {self.seconds['training']:,.1f} of {whole:,.1f} s" + (
            f"; {parts}" if parts else ""
        )

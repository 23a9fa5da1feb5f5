"""Output for people: progress bars, tables, numbers with units, an error as one line."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

LONGEST = 300  # characters of an error that are shown


class _Rate(ProgressColumn):
    """Completed units per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{human_count(speed)}/s")


COLUMNS: dict[str, tuple[type[ProgressColumn], ...]] = {
    "bytes": (DownloadColumn, TransferSpeedColumn),
    "count": (MofNCompleteColumn,),
    "rate": (_Rate,),
}


def progress_bar(*amounts: str, show: bool = True, console: Console | None = None) -> Progress:
    """Make a progress bar on stderr: description, bar, the amounts, time passed and time left.

    `amounts` are of COLUMNS ("bytes": MB and MB/s; "count": done/total; "rate": units/s), or "status": a text that the
    caller gives as the task's field `status`, at its start and with each update.
    """
    columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn(bar_width=24)]
    for amount in amounts:
        columns += [TextColumn("{task.fields[status]}")] if amount == "status" else [c() for c in COLUMNS[amount]]
    columns += [TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn()]
    return Progress(*columns, console=console or Console(stderr=True), disable=not show)


def padded(rows: Sequence[Sequence[str]], sides: str) -> list[list[str]]:
    """Pad each cell to the width of its column. `sides`: `<` or `>` for each column, the side of its text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [[f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)] for row in rows]


def aligned(rows: Sequence[Sequence[str]], sides: str) -> list[str]:
    """Format each row as a line, with columns two spaces apart."""
    return ["  ".join(row).rstrip() for row in padded(rows, sides)]


def human_count(number: float) -> str:
    """Format a count with three digits: 1234567 -> "1.23M"."""
    return _scaled(number, ("", "k", "M", "B", "T"))


def human_bytes(number: float) -> str:
    """Format bytes in powers of 1000 with three digits: 1234567 -> "1.23 MB"."""
    return _scaled(number, (" B", " kB", " MB", " GB", " TB"))


def human_gib(size: float) -> str:
    """Format bytes as GiB, the unit in which memory is sold: 2**33 -> "8.0 GiB"."""
    return f"{size / 2**30:,.1f} GiB"


def human_duration(seconds: float) -> str:
    """Format a duration in its largest unit: 7200 -> "2.0 hours"."""
    for limit, unit in ((365.25 * 86400, "year"), (86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= limit:
            amount = seconds / limit
            return f"{amount:.1f} {unit}s" if amount < 9.95 else f"{amount:,.0f} {unit}s"
    return f"{seconds:.0f} seconds"


def _scaled(number: float, units: Sequence[str]) -> str:
    step = 0
    # 999.6 thousand is 1 M: what counts is the number after rounding to three digits.
    while step < len(units) - 1 and float(f"{number:.3g}") >= 1000:
        number, step = number / 1000, step + 1
    digits = f"{number:.0f}" if (step == 0 and number >= 1) or number >= 100 else f"{number:.3g}"
    return digits + units[step]


def one_line(error: BaseException, named: bool = False) -> str:
    """Format a library's error as one line of at most LONGEST characters; `named` puts the error's type before it."""
    text, name = " ".join(str(error).split())[:LONGEST].rstrip("."), type(error).__name__
    if named and text:
        return f"{name}: {text}"
    return text or name

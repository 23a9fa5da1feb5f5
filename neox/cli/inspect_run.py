"""Compare the curves of runs, finished or still running.

neox inspect run RUN_DIR... [out=report.html] [key=value ...]

Loss (held-out too), gradient norm, learning rate, throughput, and the options in which the
runs differ. report.html is one file that needs no network: point at a curve to read it, drag
to look closer. A name that ends in .png makes a picture.

Examples:
  neox inspect run runs/first
  neox inspect run runs/a runs/b x=tokens
  neox inspect run runs/a runs/b out=report.png smooth=0.05
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from neox.cli.verb import UsageError, read_all
from neox.config import Section


class InspectRunOptions(Section):
    """Options of `neox inspect run`."""

    out: str = "report.html"
    """File to write: .html for a page, .png for a picture."""
    x: Literal["steps", "tokens", "hours"] = "steps"
    """Horizontal axis: steps, tokens, or hours of training."""
    y: Literal["log", "linear"] = "log"
    """Vertical axis of loss and gradient norm: log or linear."""
    smooth: float = Field(default=0.02, ge=0, le=1)
    """Share of the horizontal axis that a smoothed point averages; 0 = as logged."""


OPTIONS = InspectRunOptions


def run(targets: list[str], options: list[str]) -> None:
    """Run the topic."""
    chosen = read_all("inspect run", InspectRunOptions, options)
    if not targets:
        raise UsageError("inspect run needs a RUN_DIR")
    out = Path(chosen.out)
    if out.suffix not in (".html", ".png"):
        raise ValueError(f"out={out}: must end in .html (a page) or .png (a picture)")

    from neox.analysis.runs import read_runs, summary

    runs = read_runs(targets)
    if out.suffix == ".html":
        from neox.analysis.run_page import write_page as write
    else:
        from neox.analysis.run_picture import write_picture as write
    write(out, runs, chosen.x, chosen.y, chosen.smooth)
    for one in runs:
        print(f"{one.name}: {summary(one)}")
    print(f"{out}: {'open it in a browser' if out.suffix == '.html' else 'written'}")

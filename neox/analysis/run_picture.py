"""Runs as one static picture, for a paper or a message: the panels of the page, through matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from neox.analysis.runs import Array, Run, decimate, smooth
from neox.system.pictures import (
    COLOURS,
    INK,
    PAPER,
    SOFT,
    dress,
    engineering_ticks,
    log_ticks,
    new_figure,
    number_ticks,
    write_png,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DASHES = ("-", (0, (6, 2)), (0, (2, 1.5)))
PANELS = (
    ("loss", "Loss", "nats per token", True),
    ("grad_norm", "Gradient norm", "before clipping", True),
    ("lr", "Learning rate", "", False),
    ("tokens_per_second", "Throughput", "tokens per second", False),
)
AXES = {"steps": "training step", "tokens": "tokens", "hours": "hours of training"}
FIELD = {"steps": "step", "tokens": "tokens", "hours": "hours"}
BINS = 1600  # about the columns of pixels that the widest panel has


def write_picture(path: Path, runs: Sequence[Run], x: str, y: str, share: float) -> None:
    """Write a PNG of 2000 x 1360 pixels; arguments as for `page.write_page`."""
    write_png(path, runs_figure(runs, x, y, share))


def runs_figure(runs: Sequence[Run], x: str, y: str, share: float) -> "Figure":
    """Draw the runs as a matplotlib Figure, without pyplot and without a display."""
    figure = new_figure(12.5, 8.5)
    grid = figure.add_gridspec(2, 3, height_ratios=(1.35, 1))
    places = (grid[0, :], grid[1, 0], grid[1, 1], grid[1, 2])
    for place, (key, title, unit, log) in zip(places, PANELS, strict=True):
        axes = figure.add_subplot(place)
        axes.set_xlabel(AXES[x])
        dress(axes, title, unit)
        axes.margins(x=0.01)
        number_ticks(axes.xaxis, 6, whole=x == "steps")
        number_ticks(axes.yaxis)
        if x == "tokens":
            engineering_ticks(axes.xaxis)
        drawn: list[Array] = []
        for number, run in enumerate(runs):
            style: dict[str, Any] = {
                "color": COLOURS[number % len(COLOURS)],
                "linestyle": DASHES[number // len(COLOURS) % len(DASHES)],
            }
            if curve := run.curves.get(key):
                soft = smooth(getattr(curve, FIELD[x]), curve.y, share, log and y == "log") if key != "lr" else curve.y
                _draw(axes, getattr(curve, FIELD[x]), curve.y, soft, style, run.name)
                drawn.append(curve.y)
            if key == "loss" and (held := run.curves.get("valid_loss")):
                style |= {"linewidth": 0.9, "marker": "o", "markersize": 4.5, "markerfacecolor": PAPER}
                axes.plot(getattr(held, FIELD[x]), np.where(np.isfinite(held.y), held.y, np.nan), **style)
                drawn.append(held.y)
        shown = np.concatenate(drawn) if drawn else np.empty(0)
        shown = shown[np.isfinite(shown)]
        if log and y == "log" and (shown > 0).any():
            low, high = float(shown[shown > 0].min()), float(shown.max())
            axes.set_yscale("log")
            axes.set_ylim(low * 0.95, high * 1.05)
            log_ticks(axes.yaxis, low, high)
        if key == "loss":
            held_out = any("valid_loss" in run.curves for run in runs)
            legend = axes.legend(
                loc="upper right",
                frameon=False,
                labelcolor=INK,
                ncols=max(1, len(runs) // 6),
                title="circles: held-out text" if held_out else None,
            )
            legend.get_title().set_color(SOFT)
            for text in legend.get_texts():
                text.set_parse_math(False)
    return figure


def _draw(axes: Any, x: Array, y: Array, soft: Array, style: dict[str, Any], name: str) -> None:
    """Draw one curve: logged values faint, smoothed values strong, non-finite ones as crosses at the top."""
    axes.plot(*decimate(x, np.where(np.isfinite(y), y, np.nan), BINS), **style, alpha=0.25, linewidth=0.8)
    axes.plot(*decimate(x, np.where(np.isfinite(y), soft, np.nan), BINS), **style, linewidth=1.8, label=name)
    lost = x[~np.isfinite(y)]
    if len(lost):
        lost, _ = decimate(lost, lost, BINS)
        edge = axes.get_xaxis_transform()
        axes.plot(lost, np.ones_like(lost), "x", color=style["color"], transform=edge, clip_on=False)

"""Picture of the loss curve: training loss, validation points, compression baselines."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neox.system.pictures import BASE, COLOURS, PAPER, SOFT, dress, log_ticks, new_figure, number_ticks, write_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRAIN, VALID = COLOURS[:2]


def draw_loss_curve(
    path: str | os.PathLike[str],
    rows: Iterable[Mapping[str, Any]],
    title: str,
    baselines: Mapping[str, float] | None = None,
    bytes_per_token: float | None = None,
) -> Path:
    """Draw a run as PNG (see `loss_figure`) and return its path; the file is the old picture or the new one, whole."""
    write_png(Path(path), loss_figure(rows, title, baselines, bytes_per_token))
    return Path(path)


def loss_figure(
    rows: Iterable[Mapping[str, Any]],
    title: str,
    baselines: Mapping[str, float] | None = None,
    bytes_per_token: float | None = None,
) -> "Figure":
    """Draw the loss of a run as a matplotlib Figure, without pyplot and without a display.

    rows: one per record, in any order, with "step" and any of
        loss        training, nats per token
        valid_loss  validation, nats per token
        valid_bpb   validation, bits per byte (used instead of valid_loss where the axis is bits per byte)
    baselines: {name: bits per byte}, drawn as labelled lines.
    bytes_per_token: mean bytes of a token. With it the axis is bits per byte (nats / ln 2 / bytes per token) and nats
        per token stand on the right; without it the axis is nats per token.

    Values that are not finite or not above zero (the axis is logarithmic) are left out. Raises ValueError where none
    is left, or where baselines are given and bytes_per_token is not.
    """
    if baselines and bytes_per_token is None:
        raise ValueError("baselines are in bits per byte: give bytes_per_token, so that the loss can be too")
    scale = 1.0 if bytes_per_token is None else 1 / (math.log(2) * bytes_per_token)
    rows = sorted(rows, key=lambda row: row["step"])
    train = _points(rows, "loss", scale)
    valid = _points(rows, "valid_bpb", 1.0) if bytes_per_token is not None else []
    valid = valid or _points(rows, "valid_loss", scale)
    if not train and not valid:
        raise ValueError("no finite loss to draw: the run has logged none yet")

    figure = new_figure(9, 5)
    axes = figure.add_subplot()
    if train:
        axes.plot(*zip(*train, strict=True), color=TRAIN, alpha=0.22, linewidth=0.9)
        steps = [step for step, _ in train]
        axes.plot(steps, smooth([y for _, y in train]), color=TRAIN, linewidth=2.2, label="training (smoothed)")
    if valid:
        style: dict[str, Any] = {"marker": "o", "markersize": 5.5, "markerfacecolor": PAPER, "markeredgewidth": 1.8}
        axes.plot(*zip(*valid, strict=True), color=VALID, linewidth=1.2, label="held-out", **style)
        last = f"{valid[-1][1]:.2f}"
        axes.annotate(last, valid[-1], (0, 9), textcoords="offset points", ha="center", color=VALID, weight="bold")
    for name, value in (baselines or {}).items():
        axes.axhline(value, color=BASE, linewidth=1.1, linestyle=(0, (5, 4)), zorder=1)
        # On the left, below the steep beginning: nothing else is drawn there.
        label = axes.annotate(
            f"{name} {value:.2f}", (0.005, value), (0, 2), axes.get_yaxis_transform(), "offset points", color=BASE
        )
        label.set(weight="bold", parse_math=False, ha="left", va="bottom")
    axes.set_yscale("log")
    values = [y for _, y in train + valid] + list((baselines or {}).values())
    low, high = min(values) * 0.92, max(values) * 1.05
    axes.set_ylim(low, high)
    log_ticks(axes.yaxis, low, high, 9)
    number_ticks(axes.xaxis, 9, whole=True)
    axes.margins(x=0.02)
    axes.set_xlabel("training step")
    axes.set_ylabel("loss (nats per token)" if bytes_per_token is None else "loss (bits per byte)")
    dress(axes, title, size=14)
    if bytes_per_token is not None:
        right = axes.secondary_yaxis("right", functions=(lambda y: y / scale, lambda y: y * scale))  # type: ignore[operator]
        right.set_ylabel("nats per token", color=SOFT)
        log_ticks(right.yaxis, low / scale, high / scale, 9)
        right.tick_params(colors=SOFT, length=0, which="both")
        right.spines["right"].set_visible(False)
    axes.legend(loc="upper right", frameon=False, labelcolor=SOFT)
    return figure


def smooth(values: Sequence[float]) -> list[float]:
    """Mean over the neighbours of each point: h on either side (fewer at the end), h = min(n // 60, i // 4).

    A narrower window at the start follows the first fall, where a fixed one (or an exponential average) lags behind.
    """
    sums = list(accumulate(values, initial=0.0))
    result = []
    for i in range(len(values)):
        h = min(len(values) // 60, i // 4)
        end = min(len(values), i + h + 1)
        result.append((sums[end] - sums[i - h]) / (end - i + h))
    return result


def _points(rows: Iterable[Mapping[str, Any]], key: str, scale: float) -> list[tuple[int, float]]:
    values = ((row["step"], row.get(key)) for row in rows)
    return [(step, value * scale) for step, value in values if value is not None and 0 < value < math.inf]

"""Read run directories as curves and facts that can be compared, without torch.

Shapes: N points of a curve, in order of step.
"""

import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neox.config import Config
from neox.config.options import spell
from neox.config.structured import read_toml
from neox.system.files import read_rows

Array = NDArray[np.float64]
KEYS = ("loss", "valid_loss", "grad_norm", "lr", "tokens_per_second")


@dataclass(frozen=True)
class Curve:
    """One logged quantity over a run; `y` may hold NaN and infinities."""

    step: Array  # [N]
    tokens: Array  # [N] trained on
    hours: Array  # [N] of training: evaluations, checkpoints and the time between two calls do not count
    y: Array  # [N]


@dataclass(frozen=True)
class Run:
    """A finished or running training run."""

    name: str
    curves: dict[str, Curve]  # of KEYS, those that the run logged
    config: dict[str, Any]  # section.key: value; empty without config.toml
    facts: dict[str, float]  # step, steps, loss, valid_loss, best_valid_loss, tokens, hours, memory, ..: what is known


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Read the runs in these directories; each may still be running, or cut off at any byte.

    Raises ValueError that names the directory that is no run, or has logged no step yet.
    """
    paths = [Path(folder) for folder in folders]
    return [_read(path, name) for path, name in zip(paths, short_names(paths), strict=True)]


def short_names(paths: Sequence[Path]) -> list[str]:
    """Shortest unique suffix of each path, numbered where the same path comes twice."""
    parts = [path.resolve().parts for path in paths]
    names = []
    for number, own in enumerate(parts):
        others = [other for other in parts if other != own]
        length = next((n for n in range(1, len(own)) if all(own[-n:] != other[-n:] for other in others)), len(own))
        before = parts[:number].count(own)
        names.append("/".join(own[-length:]) + (f" ({before + 1})" if before else ""))
    return names


def _read(folder: Path, name: str) -> Run:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such run directory")
    file = folder / "metrics.jsonl"
    if not file.is_file():
        raise ValueError(
            f"{folder}: no run that has begun (no metrics.jsonl): `neox train` writes it with its first step"
        )
    rows = [row for row in read_rows(file) if isinstance(row.get("step"), int)]
    train = _by_step(rows, "loss")
    if not train:
        raise ValueError(f"{file}: holds no step yet: look again after the first one")
    config = _flat(read_toml(folder / "config.toml")[0]) if (folder / "config.toml").is_file() else {}

    step = _column(train, "step")
    seconds = np.nan_to_num(_column(train, "seconds"), posinf=0, neginf=0)
    hours = np.cumsum(np.diff(step, prepend=0) * seconds) / 3600
    tokens = _column(train, "tokens")
    known = np.isfinite(tokens)
    tokens = _along(step, step[known], tokens[known]) if known.any() else np.zeros_like(step)
    curves = {}
    for key in KEYS:
        if own := _by_step(rows, key):
            at = _column(own, "step")
            curves[key] = Curve(at, _along(at, step, tokens), _along(at, step, hours), _column(own, key))
    return Run(name, curves, config, _facts(train, curves, config, float(hours[-1])))


def _by_step(rows: Sequence[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """Rows that hold `key`, in order of step; the last one written of each step."""
    return [row for _, row in sorted({row["step"]: row for row in rows if key in row}.items())]


def _column(rows: Sequence[dict[str, Any]], key: str) -> Array:
    values = (row.get(key) for row in rows)
    return np.array([v if isinstance(v, int | float) else math.nan for v in values], dtype=np.float64)


def _along(at: Array, step: Array, grown: Array) -> Array:
    """Interpolate a total that is 0 at step 0 and grown[i] at step[i]; beyond the last step at the mean rate."""
    inside = np.interp(at, np.concatenate([[0.0], step]), np.concatenate([[0.0], grown]))
    return np.where(at > step[-1], grown[-1] * at / max(step[-1], 1), inside)


def _facts(
    train: Sequence[dict[str, Any]], curves: dict[str, Curve], config: dict[str, Any], hours: float
) -> dict[str, float]:
    last = train[-1]
    facts = {"step": last["step"], "steps": config.get("train.steps"), "hours": hours}
    facts |= {key: last.get(key) for key in ("loss", "tokens", "memory", "time")}
    for key in ("tokens_per_second", "mfu", "mfu_causal"):
        values = _column(train, key)
        facts[key] = float(np.median(values[np.isfinite(values)])) if np.isfinite(values).any() else None
    facts["not_finite"] = sum(int((~np.isfinite(curves[key].y)).sum()) for key in curves if key.endswith("loss"))
    if held := curves.get("valid_loss"):
        facts["valid_loss"] = float(held.y[-1])
        if np.isfinite(held.y).any():
            best = int(np.argmin(np.where(np.isfinite(held.y), held.y, math.inf)))
            facts |= {"best_valid_loss": float(held.y[best]), "best_step": int(held.step[best])}
    return {key: value for key, value in facts.items() if isinstance(value, int | float)}


def summary(run: Run) -> str:
    """Progress of a run in one line."""
    facts = run.facts
    of = f" of {facts['steps']:,}" if "steps" in facts else ""
    held = f", held-out {facts['valid_loss']:.4f}" if "valid_loss" in facts else ""
    best = f" (best {facts['best_valid_loss']:.4f} at step {facts['best_step']:,})" if "best_step" in facts else ""
    speed = f", {facts['tokens_per_second']:,.0f} tok/s" if "tokens_per_second" in facts else ""
    lost = f", {facts['not_finite']:,} losses not finite" if facts["not_finite"] else ""
    return f"step {facts['step']:,}{of}, loss {facts.get('loss', math.nan):.4f}{held}{best}{speed}{lost}"


def _flat(table: dict[str, Any]) -> dict[str, Any]:
    nested = {f"{s}.{key}": v for s, keys in table.items() if isinstance(keys, dict) for key, v in keys.items()}
    return {key: value for key, value in table.items() if not isinstance(value, dict)} | nested


def differences(runs: Sequence[Run]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """List the options in which the runs differ: column names, and (key, value of each column).

    A single run is laid beside the defaults. Runs without a config.toml are left out; `log.out` always differs.
    """
    columns = [(run.name, run.config) for run in runs if run.config]
    if len(columns) == 1:
        columns.append(("default", _flat(tomllib.loads(Config().to_toml()))))
    keys = dict.fromkeys(key for _, config in columns for key in config)
    table = [
        (key, [spell(config[key]) if key in config else "—" for _, config in columns])
        for key in keys
        if key != "log.out"
    ]
    return [name for name, _ in columns], [(key, values) for key, values in table if len(set(values)) > 1]


def smooth(x: Array, y: Array, share: float, log: bool = False) -> Array:
    """Smooth y [N]: mean of the finite values within `share` / 2 of the span of x [N] on either side.

    The result is NaN where y is not finite.

    In units of x, so that runs that log at different intervals are smoothed alike. Near the start the window is
    narrower, a quarter of the way come: a wider one would lag behind the first fall. With `log`, for a logarithmic
    axis, the mean of the logarithms: one spike then does not lift all that is around it. y <= 0 has none, thus NaN.
    """
    if log:
        positive = np.where(y > 0, y, math.nan)
        return np.exp(smooth(x, np.log(positive), share))
    finite = np.isfinite(y)
    if not finite.any():
        return np.full_like(y, math.nan)
    # A sum that once held 1e30 would hold nothing of what comes after.
    limit = 1e9 * float(np.median(np.abs(y[finite])))
    half = np.minimum(share / 2 * (x[-1] - x[0]), (x - x[0]) / 4)
    left, right = np.searchsorted(x, x - half, "left"), np.searchsorted(x, x + half, "right")
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, np.clip(y, -limit, limit), 0.0))])
    count = np.concatenate([[0], np.cumsum(finite)])
    mean = (total[right] - total[left]) / np.maximum(count[right] - count[left], 1)
    return np.where(finite, mean, math.nan)


def decimate(x: Array, y: Array, bins: int) -> tuple[Array, Array]:
    """Thin a curve: keep the first, lowest, highest and last point of each of `bins` equal spans of x [N].

    Drawn on `bins` columns of pixels this looks like all N points, every spike included. Where a span holds values
    that are not finite, the first of them is kept too, so that the line is broken there.
    """
    if len(x) <= 4 * bins:
        return x, y
    span = np.minimum((x - x[0]) / max(x[-1] - x[0], 1e-300) * bins, bins - 1).astype(np.int64)
    starts = np.flatnonzero(np.diff(span, prepend=-1))
    kept: list[int] = []
    for start, end in zip(starts, np.append(starts[1:], len(x)), strict=True):
        part = y[start:end]
        finite = np.flatnonzero(np.isfinite(part))
        own = set(np.flatnonzero(~np.isfinite(part))[:1])
        if len(finite):
            own |= {finite[0], finite[np.argmin(part[finite])], finite[np.argmax(part[finite])], finite[-1]}
        kept += sorted(int(start + i) for i in own)
    index = np.array(kept)
    return x[index], y[index]

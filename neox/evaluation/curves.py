"""Evaluate the checkpoints of a run, and draw each task's curve over the steps.

A folder holds step_NNNNNNNN/ with the results of one checkpoint each, and what is drawn of them: curves.json,
curves.png, curves.html.
"""

import base64
import hashlib
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neox.checkpoint import CheckpointError, complete_steps, step_number
from neox.checkpoint.checksums import NAME
from neox.config import EvalConfig, load_config
from neox.config.structured import read_json
from neox.evaluation.asked import describe, is_answered, write_note
from neox.evaluation.evaluate import ALONE, evaluate
from neox.evaluation.report import scores, table_page
from neox.evaluation.tasks import load_tasks
from neox.system.files import write_atomic
from neox.system.pictures import COLOURS, dress, new_figure, png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Point = tuple[int, float, float | None]  # step, value, standard error
Curves = dict[str, list[Point]]  # "task metric": its points in order of steps

COLUMNS, WIDE = 3, 64  # panels a row; last step / first step from which the axis is logarithmic


def checkpoints(source: str, steps: Sequence[int] | None) -> list[tuple[int, str]]:
    """List (step, model to load) of a run directory, or of a hub id with revisions stepN (Pythia).

    Raises ValueError for steps that a run does not have, and for a hub id without steps.
    """
    folders = {step_number(folder): str(folder) for folder in complete_steps(Path(source))}
    if not folders:
        if steps is None:
            raise ValueError(f"{source}: no run with checkpoints; of a hub id name the steps, as steps=1000,143000")
        return [(step, f"{source}@step{step}") for step in sorted(set(steps))]
    if missing := sorted(set(steps or ()) - folders.keys()):
        raise ValueError(f"{source}: has no step {missing[0]}; it has {', '.join(map(str, folders))}")
    return [(step, folder) for step, folder in sorted(folders.items()) if steps is None or step in steps]


def follow_checkpoints(run: str, every: float = 5.0) -> Iterator[tuple[int, str]]:
    """Yield the checkpoints of a running run, each once, newest first, until its last step is there.

    It looks every `every` seconds. Raises ValueError where there is no run.
    """
    config = Path(run) / "config.toml"
    if not config.is_file():
        raise ValueError(f"{run}: holds no run (no config.toml): it can be watched once `neox train` has begun it")
    seen: set[int] = set()
    while True:
        last = load_config(files=[config]).train.steps
        if new := [folder for folder in complete_steps(Path(run)) if step_number(folder) not in seen]:
            step = step_number(new[-1])
            seen.add(step)
            yield step, str(new[-1])
        elif seen and max(seen) >= last:
            return
        else:
            time.sleep(every)


def evaluate_steps(models: Iterable[tuple[int, str]], out: Path, **options: Any) -> Curves:
    """Evaluate each of these checkpoints into OUT/step_NNNNNNNN, drawing the curves anew after each.

    `options` are those of `evaluate`. Results that OUT holds for the same weights, documents and options are kept. A
    checkpoint that cannot be loaded (damaged, or removed since) is skipped with a line on stderr.
    """
    first, drawn = not options.get("processes", ALONE).rank, False
    told = {key: value for key, value in options.items() if key not in ("processes", "progress", "device")}
    tasks, _ = load_tasks(EvalConfig(tasks=options["tasks"]).tasks, options.get("include_path"))
    for step, model in models:
        folder = out / f"step_{step:08d}"
        asked = describe(model, _identity(Path(model)), tasks, told)
        if is_answered(folder, asked):
            continue
        try:
            evaluate(model, out=folder, **options)
        except CheckpointError as error:
            print(f"neox: step {step} is skipped: {error}", file=sys.stderr)
            continue
        if first:
            write_note(folder, asked)
            write(out)
            drawn = True
    if first and not drawn:
        write(out)
    return read(out)


def _identity(step: Path) -> str:
    """Hash the digests of a step's files and its run's tokenizer; "" for a model of the hub, named by its revision."""
    files = [path for path in (step / NAME, step.parent / "tokenizer.json") if path.is_file()]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest() if files else ""


def read(out: Path) -> Curves:
    """Read the curves from the results in a folder."""
    curves: Curves = {}
    for file in sorted(out.glob("step_*/results.json")):
        for name, value, error in scores(read_json(file)):
            curves.setdefault(name, []).append((step_number(file.parent), value, error))
    return curves


def write(out: Path) -> None:
    """Write curves.json, curves.png and curves.html of the results in a folder; nothing if it holds none."""
    if not (curves := read(out)):
        return
    named = {
        name: dict(zip(("step", "value", "stderr"), map(list, zip(*points, strict=True)), strict=True))
        for name, points in curves.items()
    }
    picture = png(figure(curves))
    write_atomic(out / "curves.png", picture)
    write_atomic(out / "curves.html", _page(curves, picture).encode())
    write_atomic(out / "curves.json", json.dumps(named, indent=2).encode())


def figure(curves: Curves) -> "Figure":
    """Draw a panel for each curve; the band is one standard error on either side."""
    columns, rows = min(COLUMNS, len(curves)), -(-len(curves) // COLUMNS)
    drawn = new_figure(4.6 * columns, 3.2 * rows)
    for number, (name, points) in enumerate(curves.items()):
        axes = drawn.add_subplot(rows, columns, number + 1)
        steps, values = [point[0] for point in points], [point[1] for point in points]
        errors = [point[2] or 0.0 for point in points]
        low = [value - error for value, error in zip(values, errors, strict=True)]
        high = [value + error for value, error in zip(values, errors, strict=True)]
        axes.fill_between(steps, low, high, color=COLOURS[0], alpha=0.15, linewidth=0)
        axes.plot(steps, values, color=COLOURS[0], marker="o", markersize=3.5)
        positive = [step for step in steps if step > 0]
        if positive and steps[-1] >= WIDE * positive[0]:
            axes.set_xscale("symlog", linthresh=positive[0])
        axes.set_xlabel("training step")
        dress(axes, name, size=10)
    return drawn


def _page(curves: Curves, picture: bytes) -> str:
    """Self-contained page: the picture, and every point in a table."""
    steps = sorted({step for points in curves.values() for step, _, _ in points})
    cells = [{step: _cell(value, error) for step, value, error in points} for points in curves.values()]
    lines = [[f"{step:,}", *(column.get(step, "") for column in cells)] for step in steps]
    drawn = base64.b64encode(picture).decode()
    above = f'<p><img alt="a curve for each metric" src="data:image/png;base64,{drawn}"></p>'
    return table_page("Over training", above, ("Step", *curves), lines)


def _cell(value: float, error: float | None) -> str:
    return f"{value:.4f}" + (f" ± {error:.4f}" if error is not None and math.isfinite(error) else "")

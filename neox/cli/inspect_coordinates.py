"""Coordinate check of muP: sizes of activations as the width grows.

neox inspect coordinates [PRESET] [FILE.toml ...] [key=value ...]

Trains the model at several widths for a few steps, in the standard parametrization and in muP,
and lays the mean absolute value of its outputs against the width. If that depends on the width,
so do the best learning rate and initialization. Depth and the width of a head stay; tokens are
random. The base width is model.mup_base_width, or else the smallest of the widths.

Examples:
  neox inspect coordinates
  neox inspect coordinates pythia-70m widths=64,128,256,512 seq_length=128 optim.lr=1e-2
  neox inspect coordinates recipe.toml only=mup steps=10
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from neox.cli.verb import read_options, resolve
from neox.config import Section
from neox.config.sections import Positive, listed, none, separated


def numbers(value: Any) -> Any:
    """Whole numbers as one writes them on a command line: 64,128."""
    names = separated(value) if isinstance(value, str) else listed([value] if isinstance(value, int) else value)
    return tuple(int(name) if isinstance(name, str) and name.isdecimal() else name for name in names)


class InspectCoordinatesOptions(Section):
    """Options of `neox inspect coordinates` besides those of the config."""

    widths: Annotated[tuple[Positive, ...], BeforeValidator(numbers)] = Field(default=(), title="A,B,C")
    """Widths to train at: 64,128,256,512; by default 1, 2, 4 and 8 heads of the model's head_dim."""
    steps: Annotated[int, Field(gt=0, lt=10**6)] = 4
    """Optimizer steps at each width, on one batch at the rate optim.lr."""
    only: Annotated[Literal["mup", "standard"] | None, BeforeValidator(none)] = None
    """Parametrization to train: mup or standard; none = both."""
    out: str = "coordinates.png"
    """Picture to write."""


OPTIONS = InspectCoordinatesOptions


def run(targets: list[str], options: list[str]) -> None:
    """Run the topic."""
    chosen, rest = read_options(InspectCoordinatesOptions, options)
    config, steps = resolve(targets, rest), chosen.steps
    out, head_dim = Path(chosen.out), config.model.head_dim
    if out.suffix != ".png":
        raise ValueError(f"out={out}: must end in .png")
    widths = sorted(set(chosen.widths) or {head_dim * heads for heads in (1, 2, 4, 8)})
    if len(widths) < 2:
        raise ValueError(f"widths={widths[0]}: a slope needs two widths, such as 64,128,256,512")

    import numpy as np

    from neox.analysis.coordinates import at_width, coordinates, table, write_coordinates

    base = config.model.mup_base_width or min(widths)
    starts = {"standard": None, "mup": base}
    starts = {name: width for name, width in starts.items() if chosen.only in (None, name)}
    for width in widths:
        at_width(config.model, width, base)  # raises for a wrong width before the first training
    sizes = {}
    for name, start in starts.items():
        measured = []
        for width in widths:
            size, losses = coordinates(config, width, start, steps)
            measured.append(size)
            print(f"{name}, width {width}: loss {losses[0]:.3f}, after {steps} steps {losses[-1]:.3f}", file=sys.stderr)
        sizes[name] = np.stack(measured)
    print("Slopes of log(mean absolute value) over log(width); 0: the width does not matter")
    print(table(widths, sizes))
    write_coordinates(out, widths, sizes, steps)
    print(f"{out}: written")

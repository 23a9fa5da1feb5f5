"""Runs as one HTML page that holds everything it shows: curves to point at, zoom, smooth and lay over each other.

The template is `run_page.html`, with one placeholder for the data as JSON. The numbers are whole columns, so nothing is
lost between the rows and the page; the page's script draws as many as there are pixels.
"""

import base64
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from neox.analysis.runs import Array, Run, differences
from neox.system.files import write_atomic
from neox.system.pictures import template_page


def write_page(path: Path, runs: Sequence[Run], x: str, y: str, share: float) -> None:
    """Write the page atomically.

    x: steps, tokens or hours; y: log or linear; share: of the x axis that smoothing takes in. The reader may change
    all three.
    """
    page = template_page("neox.analysis", "run_page.html", page_data(runs, x, y, share))
    write_atomic(path, page.encode())


def page_data(runs: Sequence[Run], x: str, y: str, share: float) -> dict[str, Any]:
    """Data that the page's script reads.

    A curve is {"step", "tokens", "hours", "y"}: base64 of little-endian uint32, float64, float32, float32.
    """
    columns, table = differences(runs)
    return {
        "made": time.strftime("%Y-%m-%d %H:%M"),
        "x": x,
        "y": y,
        "smooth": share,
        "runs": [
            {
                "name": run.name,
                "facts": {key: value if math.isfinite(value) else str(value) for key, value in run.facts.items()},
                "curves": {
                    key: {
                        "step": _packed(curve.step, "<u4"),
                        "tokens": _packed(curve.tokens, "<f8"),
                        "hours": _packed(curve.hours, "<f4"),
                        "y": _packed(curve.y, "<f4"),
                    }
                    for key, curve in run.curves.items()
                },
            }
            for run in runs
        ],
        "columns": columns,
        "differences": table,
    }


def _packed(values: Array, kind: str) -> str:
    with np.errstate(over="ignore"):  # to infinity, which is told as such
        return base64.b64encode(values.astype(kind).tobytes()).decode()

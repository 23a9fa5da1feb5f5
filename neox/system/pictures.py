"""The look of every picture and page: palette, matplotlib set-up, HTML skeleton."""

from __future__ import annotations

import html
import io
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from neox.system.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LIGHT = {
    "paper": "#f7f4ee",
    "card": "#fffdf9",
    "ink": "#1d1a16",
    "soft": "#6a6156",
    "line": "#e2dacd",
    "grid": "#ece5d9",
    "accent": "#0b6e66",
    "on-accent": "#ffffff",
    "tint": "#e3efec",
    "base": "#8a5a1c",
    **{f"c{i}": colour for i, colour in enumerate(
        ("#0b6e66", "#c8553d", "#4a5fb0", "#b07d12", "#8a4f8f", "#3f7d2f", "#a8456b", "#57534e")
    )},
}  # fmt: skip
DARK = {
    "paper": "#121316",
    "card": "#191b1f",
    "ink": "#efece5",
    "soft": "#a29b90",
    "line": "#2e3136",
    "grid": "#25282d",
    "accent": "#62cdbd",
    "on-accent": "#0d1514",
    "tint": "#1d2c2b",
    "base": "#dfae6b",
    **{f"c{i}": colour for i, colour in enumerate(
        ("#62cdbd", "#f08a6c", "#93a7f5", "#e0b04c", "#cf95d6", "#8fcf79", "#f08fb4", "#b9b2a7")
    )},
}  # fmt: skip
COLOURS = tuple(LIGHT[f"c{i}"] for i in range(8))
INK, SOFT, GRID, PAPER, BASE = (LIGHT[name] for name in ("ink", "soft", "line", "card", "base"))

STYLE_PLACEHOLDER, DATA_PLACEHOLDER = "/* @@STYLE@@ */", "@@DATA@@"
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def _variables(palette: Mapping[str, str]) -> str:
    return " ".join(f"--{name}: {colour};" for name, colour in palette.items())


STYLE = f"""
:root {{
  color-scheme: light dark;
  {_variables(LIGHT)}
  --shadow: 0 1px 2px rgb(60 45 20 / .06), 0 8px 28px rgb(60 45 20 / .06);
  --serif: "Iowan Old Style", "Palatino Linotype", Palatino, "Book Antiqua", Georgia, serif;
  --sans: ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --mono: ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace;
}}
@media (prefers-color-scheme: dark) {{
  :root {{
    {_variables(DARK)}
    --shadow: 0 1px 2px rgb(0 0 0 / .4), 0 8px 28px rgb(0 0 0 / .25);
  }}
}}
* {{ box-sizing: border-box; }}
html {{ -webkit-text-size-adjust: 100%; }}
body {{ margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 var(--sans); }}
"""
PLAIN_STYLE = """
main { max-width: 70rem; margin: 0 auto; padding: 1.6rem 1.2rem 3rem; }
h1 { margin: .2rem 0 1rem; font: 600 clamp(1.5rem, 4vw, 2.1rem)/1.15 var(--serif); overflow-wrap: anywhere; }
h2 { margin: .5rem 0; font: 600 1.05rem/1.25 var(--serif); }
small { color: var(--soft); }
img { max-width: 100%; height: auto; border-radius: 10px; }
a { color: var(--accent); }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 14px; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { padding: .4rem .8rem; border-bottom: 1px solid var(--line); text-align: left; }
tr:last-child td { border-bottom: 0; }
th { color: var(--soft); font-weight: 500; white-space: nowrap; }
td { white-space: pre; font-variant-numeric: tabular-nums; }
"""


def html_page(title: str, body: str, style: str = "") -> str:
    """Self-contained page without scripts; `body` and `style` are HTML and CSS, the title is text."""
    title = html.escape(title)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<title>{title}</title>\n<style>{STYLE}{PLAIN_STYLE}{style}</style>\n</head>\n"
        f"<body>\n<main>\n<h1>{title}</h1>\n{body}\n</main>\n</body>\n</html>\n"
    )


def template_page(package: str, name: str, data: Any) -> str:
    """Fill a package's HTML template: the common style, and `data` as JSON for its script.

    Raises ValueError on a number that JSON does not have.
    """
    template = files(package).joinpath(name).read_text(encoding="utf-8").replace(STYLE_PLACEHOLDER, STYLE)
    before, after = template.split(DATA_PLACEHOLDER)
    return f"{before}{embed_json(data)}{after}"


def embed_json(data: Any) -> str:
    """JSON that is safe within a <script> element and reads back exactly: ASCII, without <, > and &."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def new_figure(width: float, height: float) -> Figure:
    """Make a figure of this size in inches at 160 dots an inch, without pyplot and without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=160, facecolor=PAPER, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def dress(axes: Any, title: str, unit: str = "", grid: Literal["y", "both"] = "y", size: float = 12) -> None:
    """Give axes the common look: title on the left, unit on the right, a light grid, no frame."""
    axes.set_facecolor(PAPER)
    axes.set_title(title, loc="left", color=INK, weight="bold", fontsize=size, parse_math=False)
    axes.set_title(unit, loc="right", color=SOFT, fontsize=9, parse_math=False)
    axes.grid(axis=grid, color=GRID, linewidth=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(colors=SOFT, length=0, which="both")
    axes.xaxis.label.set_color(SOFT)
    axes.yaxis.label.set_color(SOFT)


def number_ticks(axis: Any, bins: int = 7, whole: bool = False) -> None:
    """Label a linear axis at round numbers, with a comma between thousands."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=bins, integer=whole))
    _plain_numbers(axis)


def log_ticks(axis: Any, low: float, high: float, bins: int = 7) -> None:
    """Label a logarithmic axis from `low` to `high` at round numbers.

    matplotlib by itself would show one or two labels below two decades.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    decades = high / low > 30
    axis.set_major_locator(LogLocator(subs=(1, 3)) if decades else MaxNLocator(nbins=bins, steps=[1, 2, 2.5, 5, 10]))
    axis.set_minor_locator(NullLocator())
    _plain_numbers(axis)


def value_ticks(axis: Any, values: Sequence[float]) -> None:
    """Label an axis at these values only."""
    from matplotlib.ticker import FixedLocator, NullLocator

    axis.set_major_locator(FixedLocator(values))
    axis.set_minor_locator(NullLocator())
    _plain_numbers(axis)


def engineering_ticks(axis: Any) -> None:
    """Label an axis with SI prefixes: 3M, 2G."""
    from matplotlib.ticker import EngFormatter

    axis.set_major_formatter(EngFormatter(sep=""))


def _plain_numbers(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def png(figure: Figure) -> bytes:
    """Render a figure as PNG."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def write_png(path: Path, figure: Figure) -> None:
    """Write a figure as PNG; the file is the old picture or the new one, whole."""
    write_atomic(path, png(figure))

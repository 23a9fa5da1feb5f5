"""One look for every picture and page; nothing else sets up matplotlib or names a colour."""

import html
import io
import re
from pathlib import Path

import pytest
from PIL import Image

from neox.system import pictures

PACKAGE = Path(pictures.__file__).resolve().parents[1]


def test_no_other_module_sets_up_matplotlib_or_names_a_colour():
    wrong = []
    alone = r"(from|import) matplotlib(?!\.figure import Figure$)|\bFigure\(|[\"']#[0-9a-f]{6}\b|<!doctype"
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text()
        if path.name != "pictures.py" and re.search(alone, source, re.M):
            wrong.append(path.relative_to(PACKAGE).as_posix())
    assert wrong == []


def test_a_page_is_whole_and_takes_its_title_for_text():
    title = "</title><script>alert(1)</script> & 'é'"
    page = pictures.html_page(title, "<p>body</p>", "p { margin: 0 }")
    assert page.count(html.escape(title)) == 2
    assert "<script" not in page
    assert not re.search(r"(src|href)=|@import|url\(|https?:", page)
    for part in ("color-scheme: light dark", "prefers-color-scheme: dark", "width=device-width", "p { margin: 0 }"):
        assert part in page


def test_light_and_dark_name_the_same_colours():
    assert pictures.LIGHT.keys() == pictures.DARK.keys()
    assert len(set(pictures.COLOURS)) == 8


def test_embedded_json_takes_no_number_that_json_has_not():
    with pytest.raises(ValueError, match="JSON"):
        pictures.embed_json(float("nan"))


def test_a_dressed_figure_is_a_png_of_its_size():
    figure = pictures.new_figure(3, 2)
    axes = figure.add_subplot()
    axes.plot([1, 2, 3], [0.5, 1, 2])
    axes.set_yscale("log")
    pictures.dress(axes, "a $title_{", "unit")
    pictures.log_ticks(axes.yaxis, 0.5, 2)
    pictures.number_ticks(axes.xaxis, whole=True)
    image = Image.open(io.BytesIO(pictures.png(figure)))
    assert (image.format, image.size) == ("PNG", (480, 320))
    assert [tick.get_text() for tick in axes.xaxis.get_ticklabels()] != []
    assert len([tick for tick in axes.get_yticks() if 0.5 <= tick <= 2]) >= 3

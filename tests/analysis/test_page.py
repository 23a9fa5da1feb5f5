"""The page and the picture: whole, valid, the rows and nothing else; a browser is asked in test_page_browser."""

import base64
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from neox import cli
from neox.analysis.run_page import write_page
from neox.analysis.run_picture import runs_figure
from neox.analysis.runs import read_runs
from neox.cli.inspect import TOPICS
from neox.system.pictures import DATA_PLACEHOLDER
from tests.analysis.helpers import rows, write_run

VOID = {"meta", "input", "br", "link", "hr", "img"}


class Page(HTMLParser):
    """Fails on what is not nested; keeps elements, attributes and the text of each <script>."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.scripts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(set(names)) == len(names)
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data


def page(path, runs, *arguments):
    write_page(path, runs, *(arguments or ("steps", "log", 0.02)))
    return Page(path.read_text(encoding="utf-8"))


def column(text, kind):
    return np.frombuffer(base64.b64decode(text), kind)


def test_run_page_is_valid_html_and_loads_nothing(tmp_path):
    found = page(tmp_path / "page.html", read_runs([write_run(tmp_path / "a", rows(5))]))
    tags = [tag for tag, _ in found.elements]
    assert tags[:2] == ["html", "head"]
    assert all(tags.count(tag) == 1 for tag in ("html", "head", "title", "body", "main"))
    ids = [a["id"] for _, a in found.elements if "id" in a]
    assert len(set(ids)) == len(ids)
    for _, attributes in found.elements:
        assert not {"src", "href", "srcset", "action", "data"} & set(attributes)
        for key in ("aria-labelledby", "for"):
            assert attributes.get(key, ids[0]) in ids
    text = (tmp_path / "page.html").read_text()
    # The one address is a name: that of the SVG elements' namespace.
    assert set(re.findall(r"https?://[^\s\"']*", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|import\(", text)
    policy = next(a["content"] for _, a in found.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';")
    assert "prefers-color-scheme: dark" in text


def test_run_page_data_are_the_logged_rows(tmp_path):
    """Loss and norm to the last bit (they are single precision), steps and tokens exactly, the rest to single."""
    one, two = list(rows(50, every=7, valid_every=20)), list(rows(30))
    one[2]["loss"], two[8]["loss"] = math.nan, math.inf
    folders = [write_run(tmp_path / "a", one, "steps=50"), write_run(tmp_path / "b", two, "optim.name=muon")]
    found = page(tmp_path / "page.html", read_runs(folders), "tokens", "linear", 0.1)
    data = json.loads(found.scripts[0])
    assert (data["x"], data["y"], data["smooth"]) == ("tokens", "linear", 0.1)
    assert [run["name"] for run in data["runs"]] == ["a", "b"]
    for run, content in zip(data["runs"], (one, two), strict=True):
        for key in ("loss", "valid_loss", "grad_norm", "lr", "tokens_per_second"):
            own = [row for row in content if key in row]
            if not own:
                assert key not in run["curves"]
                continue
            curve = run["curves"][key]
            assert column(curve["step"], "<u4").tolist() == [row["step"] for row in own]
            assert column(curve["tokens"], "<f8").tolist() == [row["step"] * 128 for row in own]
            hours = [row["step"] * 0.5 / 3600 for row in own]
            assert column(curve["hours"], "<f4").tolist() == pytest.approx(hours, rel=1e-6)
            np.testing.assert_array_equal(column(curve["y"], "<f4"), np.float32([row[key] for row in own]))
    assert ["optim.name", ["adamw", "muon"]] in data["differences"]
    assert data["runs"][0]["facts"]["not_finite"] == 1
    assert data["runs"][0]["facts"]["steps"] == 50


NASTY = "</script><script>alert(1)</script><!-- & \" ' \u2028 " + DATA_PLACEHOLDER


def test_run_names_cannot_end_the_script(tmp_path):
    folder = write_run(tmp_path / "a", rows(3))
    text = (folder / "config.toml").read_text()
    (folder / "config.toml").write_text(text.replace('text_key = "text"', f"text_key = {json.dumps(NASTY)}"))
    runs = read_runs([folder])
    found = page(tmp_path / "page.html", runs)
    assert len(found.scripts) == 2
    assert dict(json.loads(found.scripts[0])["differences"])["data.text_key"] == [NASTY, "text"]


def test_run_page_shows_facts_that_are_not_finite(tmp_path):
    content = list(rows(3))
    content[-1]["loss"] = math.nan
    found = page(tmp_path / "page.html", read_runs([write_run(tmp_path / "a", content)]))
    assert json.loads(found.scripts[0])["runs"][0]["facts"]["loss"] == "nan"


# --- the picture -----------------------------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path):
    content = list(rows(60, valid_every=20))
    content[10]["loss"] = math.nan
    content[30]["grad_norm"] = 900.0
    return [write_run(tmp_path / "a_$x^", content), write_run(tmp_path / "b", rows(40, every=3), "optim.name=muon")]


@pytest.mark.parametrize("x", ["steps", "tokens", "hours"])
def test_the_picture_shows_every_run_in_every_panel(two, x):
    runs = read_runs(two)
    figure = runs_figure(runs, x, "log", 0.05)
    figure.canvas.draw()
    assert [axes.get_title("left") for axes in figure.axes] == ["Loss", "Gradient norm", "Learning rate", "Throughput"]
    assert [axes.get_yscale() for axes in figure.axes] == ["log", "log", "linear", "linear"]
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["a_$x^", "b"]
    for axes, key in zip(figure.axes, ("loss", "grad_norm", "lr", "tokens_per_second"), strict=True):
        field = {"steps": "step"}.get(x, x)
        lines = [line for line in axes.get_lines() if line.get_alpha() == 0.25]
        for line, run in zip(lines, runs, strict=True):
            np.testing.assert_array_equal(line.get_xdata(), getattr(run.curves[key], field))
            np.testing.assert_array_equal(line.get_ydata(), run.curves[key].y)
    assert [line.get_xdata().tolist() for line in figure.axes[0].get_lines() if line.get_marker() == "x"] == [
        [getattr(runs[0].curves["loss"], {"steps": "step"}.get(x, x))[10]]
    ]
    assert figure.axes[1].get_ylim()[1] > 900


def test_picture_linear_and_not_smoothed(two):
    figure = runs_figure(read_runs(two), "steps", "linear", 0.0)
    assert {axes.get_yscale() for axes in figure.axes} == {"linear"}


@pytest.mark.filterwarnings("error")
def test_runs_of_one_row_or_of_nothing_finite(tmp_path):
    one = write_run(tmp_path / "one", rows(1))
    lost = write_run(tmp_path / "lost", [row | {"loss": math.nan, "grad_norm": math.nan} for row in rows(3)])
    for folders in ([one], [lost], [one, lost]):
        runs_figure(read_runs(folders), "steps", "log", 0.02).canvas.draw()


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def neox_(capsys):
    def call(*arguments):
        status = cli.main(list(map(str, arguments)))
        return (status, *capsys.readouterr())

    return call


def test_the_command_writes_a_page_or_a_picture(two, tmp_path, neox_, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = neox_("inspect", "run", *two)
    assert (status, err) == (0, "")
    assert out.splitlines()[0].startswith("a_$x^: step 60 of 1,000, loss ")
    assert out.splitlines()[-1] == "report.html: open it in a browser"
    assert len(Page((tmp_path / "report.html").read_text()).scripts) == 2
    status, out, err = neox_("inspect", "run", *two, "out=deep/r.png", "x=hours", "y=linear", "smooth=0")
    assert (status, err) == (0, "")
    with Image.open(tmp_path / "deep" / "r.png") as picture:
        assert picture.format == "PNG"
        assert picture.size == (2000, 1360)
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 100


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ((), 2, "inspect needs a topic first: run"),
        (("runs/a",), 2, "inspect needs a topic first: run"),
        (("run",), 2, "inspect run needs a RUN_DIR"),
        (("run", "x", "colour=red"), 2, "inspect run has no option colour; there are out, x, y, smooth"),
        (("run", "x", "out=r.pdf"), 1, "out=r.pdf: must end in .html"),
        (("run", "x", "x=days"), 1, "x: must be 'steps', 'tokens' or 'hours', got 'days' (from x=days)"),
        (("run", "x", "y=ln"), 1, "y: must be 'log' or 'linear', got 'ln'"),
        (("run", "x", "smooth=some"), 1, "smooth: must be a valid number, got 'some'"),
        (("run", "x", "smooth=nan"), 1, "smooth: must be a finite number, got nan"),
        (("run", "absent"), 1, "absent: no such run directory"),
    ],
)
def test_inspect_run_errors_are_one_line(neox_, tmp_path, monkeypatch, arguments, status, message):
    monkeypatch.chdir(tmp_path)
    found, out, err = neox_("inspect", *arguments)
    assert (found, out, err.count("\n")) == (status, "", 1)
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_each_inspect_topic_has_help(neox_):
    for topic in TOPICS:
        status, out, _ = neox_("inspect", topic, "--help")
        assert status == 0
        assert f"\nneox inspect {topic}" in out
        assert "Examples:" in out
        assert max(map(len, out.splitlines())) <= 100
        assert f"\n  {topic} " in neox_("inspect", "--help")[1]

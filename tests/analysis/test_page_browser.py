"""The page in a real browser: it draws, reads out, hides, zooms, changes its axes, and takes a name for a name."""

import json
import math
import subprocess

import pytest

from neox.analysis.run_page import write_page
from neox.analysis.runs import read_runs
from tests.analysis.helpers import rows, write_run
from tests.quickstart.test_flipbook_browser import OFFLINE, Dom

pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.fixture(scope="module")
def browse(tmp_path_factory, browser):
    """browse(page, script) -> (Dom after both scripts ran, what the console said); `script` is added at the end."""

    def run(path, script=""):
        report = "; document.body.append(Object.assign(document.createElement('p'), {id: 'said', textContent: said}))"
        wrapped = f"<script>let said = ''; setTimeout(() => {{ {script} {report} }}, 300)</script></body>"
        path.write_text(path.read_text(encoding="utf-8").replace("</body>", wrapped), encoding="utf-8")
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", *OFFLINE, "--enable-logging=stderr"]
        command += [f"--user-data-dir={tmp_path_factory.mktemp('profile')}", "--virtual-time-budget=3000"]
        command += ["--window-size=1200,1000", "--dump-dom", path.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        # What the browser thinks of the tests' own looking at pixels is not the page's.
        return Dom(done.stdout), [line for line in said if "getImageData" not in line]

    return run


@pytest.fixture
def written(tmp_path):
    def write(*contents, x="steps", y="log", smooth=0.0, names=("a", "b", "c")):
        folders = [write_run(tmp_path / name, content) for name, content in zip(names, contents, strict=False)]
        write_page(tmp_path / "page.html", read_runs(folders), x, y, smooth)
        return tmp_path / "page.html"

    return write


POINT = """
const point = (key, share) => {
  const canvas = document.querySelector(`#panel-${key} canvas.over`), box = canvas.getBoundingClientRect();
  const x = box.left + 58 + share * (box.width - 58 - 22);
  canvas.dispatchEvent(new PointerEvent("pointermove", {clientX: x, clientY: box.top + 40, bubbles: true}));
  return document.getElementById("tip").textContent;
};
const inked = (key, x0, x1, y0, y1, alpha = 100) => {
  const canvas = document.querySelector(`#panel-${key} canvas`), r = window.devicePixelRatio || 1;
  const data = canvas.getContext("2d").getImageData(x0 * r, y0 * r, (x1 - x0) * r, (y1 - y0) * r).data;
  let n = 0;
  for (let i = 3; i < data.length; i += 4) n += data[i] > alpha;
  return n;
};
"""


def test_it_draws_and_tells_the_logged_values(written, browse):
    one, two = list(rows(101, valid_every=25)), list(rows(51))
    dom, console = browse(written(one, two), POINT + "said = [point('loss', .5), point('lr', .75)].join('|')")
    assert console == []
    assert dom.attributes["html"]["data-ready"] == "true"
    loss, lr = dom.text["said"].split("|")
    near = {row["step"]: row for row in one if "loss" in row}
    mine, theirs = f"{near[51]['loss']:.4f}", f"{[r for r in one if r.get('valid_loss')][1]['valid_loss']:.4f}"
    assert loss == f"Loss, step 51loggedheld outa{mine}{theirs}b{mine}–"
    assert lr == f"Learning rate, step 76a{1e-3 / 76:.3e}b–".replace("e-05", "e-5")
    assert dom.text["title"] == "a · b"
    assert "a101 of 1,000" in dom.text["summary"]
    assert dom.text["h-differences"] == "Where their options differ"
    assert "In nothing" in dom.text["differences"]


def test_one_spike_in_a_hundred_thousand_rows_is_seen(written, browse):
    content = list(rows(100_000))
    content[70_000]["grad_norm"] = 1e6
    script = POINT + "const w = document.querySelector('#panel-grad_norm canvas').clientWidth, at = 58 + .7 * (w - 80);"
    script += "said = [inked('grad_norm', at - 4, at + 4, 20, 60), inked('grad_norm', at + 12, at + 40, 20, 60)].join()"
    plain, _ = browse(written(list(rows(100_000))), script)
    spiked, console = browse(written(content), script)
    assert console == []
    at, beside = map(int, spiked.text["said"].split(","))
    # Grid lines are there too, equally many on every column: they are what the neighbourhood has.
    assert at > 30 + beside
    assert plain.attributes["html"]["data-ready"] == "true"


def test_nan_leaves_a_gap_and_a_cross(written, browse):
    content = list(rows(100))
    for row in content[40:60]:
        row["loss"] = math.nan
    script = POINT + "const w = document.querySelector('#panel-loss canvas').clientWidth - 80;"
    script += "said = [inked('loss', 58 + .45 * w, 58 + .55 * w, 0, 10), inked('loss', 58 + .7 * w, 58 + .8 * w, 0, 10)"
    script += ", point('loss', .5)].join('|')"
    dom, console = browse(written(content), script)
    assert console == []
    crosses, none, read = dom.text["said"].split("|")
    assert int(crosses) > 0
    assert int(none) == 0
    assert read.endswith("aNaN")
    assert "not finite" in dom.text["summary"]


@pytest.mark.parametrize(
    ("act", "caption"),
    [
        ("document.querySelector('[data-x=tokens]').click()", "Loss, 6528 tokens"),
        ("document.querySelector('[data-x=hours]').click()", "Loss, 0.4 minutes"),
        ("document.querySelector('#panel-loss .log').click()", "Loss, step 51"),
        ("document.querySelector('.chip').click()", "Loss, step 26"),
    ],
)
def test_axes_scales_and_runs_change(written, browse, act, caption):
    dom, console = browse(written(list(rows(101)), list(rows(51))), POINT + f"{act}; said = point('loss', .5)")
    assert console == []
    assert dom.text["said"].startswith(caption)


def test_smoothing_tells_both_values(written, browse):
    act = "const s = document.getElementById('smooth'); s.value = 10; s.dispatchEvent(new Event('input'));"
    dom, console = browse(written(list(rows(101))), POINT + act + "said = point('loss', .5)")
    assert console == []
    assert dom.text["said"].startswith("Loss, step 51loggedsmoothed")
    assert dom.text["smooth-value"] == "10 %"
    logs = [math.log(row["loss"]) for row in rows(101) if 46 <= row["step"] <= 56]
    assert dom.text["said"].endswith(f"{math.exp(sum(logs) / len(logs)):.4f}")


def test_a_drag_zooms_and_escape_shows_all(written, browse):
    drag = """
      const canvas = document.querySelector("#panel-loss canvas.over"), box = canvas.getBoundingClientRect();
      canvas.setPointerCapture = () => {};
      const send = (kind, share) => canvas.dispatchEvent(new PointerEvent(kind, {
        clientX: box.left + 58 + share * (box.width - 80), clientY: box.top + 50,
        bubbles: true, pointerType: "mouse", button: 0}));
      send("pointerdown", .2); send("pointermove", .4); send("pointerup", .4);
      const zoomed = point("lr", .5), shown = document.getElementById("whole").hidden;
      canvas.dispatchEvent(new KeyboardEvent("keydown", {key: "Escape", bubbles: true}));
      said = [zoomed, shown, point("lr", .5), document.getElementById("whole").hidden].join("|");
    """
    dom, console = browse(written(list(rows(101))), POINT + drag)
    assert console == []
    zoomed, hidden, whole, hidden_again = dom.text["said"].split("|")
    assert zoomed.startswith("Learning rate, step 31")
    assert whole.startswith("Learning rate, step 51")
    assert (hidden, hidden_again) == ("false", "true")


def test_keys_read_on(written, browse):
    keys = (
        "const c = document.querySelector('#panel-loss canvas.over'); for (const key of ['ArrowRight', 'ArrowRight'])"
    )
    keys += " c.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true}));"
    dom, console = browse(written(list(rows(101))), keys + "said = document.getElementById('tip').textContent")
    assert console == []
    assert dom.text["said"].startswith("Loss, step 2")


def test_one_row_nothing_finite_and_many_runs(written, browse):
    lost = [row | {"loss": math.nan, "grad_norm": math.nan} for row in rows(3)]
    dom, console = browse(written(list(rows(1)), lost), POINT + "said = point('loss', .5)")
    assert console == []
    assert dom.attributes["html"]["data-ready"] == "true"
    names = [f"run-{n}" for n in range(12)]
    dom, console = browse(written(*(list(rows(5 + n)) for n in range(12)), names=names), POINT)
    assert console == []
    assert dom.text["title"] == "12 runs"


def test_any_name_is_shown_as_a_name(tmp_path, written, browse):
    nasty = "<b>&amp;</b> \"'"
    path = written(list(rows(3)), names=(nasty.replace("/", "-"),))
    dom, console = browse(path)
    assert console == []
    assert dom.text["title"] == nasty.replace("/", "-")
    assert json.loads(dom.text["data"])["runs"][0]["name"] == dom.text["title"]

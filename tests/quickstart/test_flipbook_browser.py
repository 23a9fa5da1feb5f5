"""The flipbook in a real browser: it draws, turns, plays, and takes text for text."""

import json
import re
import subprocess
from html.parser import HTMLParser

import pytest

from neox.quickstart.flipbook import write_flipbook
from tests.quickstart.test_flipbook import NASTY, book

pytestmark = [pytest.mark.browser, pytest.mark.slow]

OFFLINE = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")


class Dom(HTMLParser):
    """Attributes by id, the text within each id, and the class of each held-out token."""

    VOID = frozenset({"meta", "input", "br", "link", "hr", "img"})

    def __init__(self, html):
        super().__init__()
        self.open, self.attributes, self.text, self.tokens, self.tags = [], {}, {}, [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, pairs):
        attributes = dict(pairs)
        self.tags.append(tag)
        if tag == "html" or "id" in attributes:
            self.attributes[attributes.get("id", tag)] = attributes
        if "data-i" in attributes:
            self.tokens.append(attributes["class"])
        if tag not in self.VOID:
            self.open.append((tag, attributes.get("id")))

    def handle_endtag(self, tag):
        while self.open and self.open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        for _, name in self.open:
            if name:
                self.text[name] = self.text.get(name, "") + data


@pytest.fixture(scope="module")
def dump(tmp_path_factory, browser):
    """dump(path, fragment) -> (Dom after the page's script ran, what the console said)."""

    def run(path, fragment="", milliseconds=3000):
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", *OFFLINE, "--enable-logging=stderr"]
        command += [f"--user-data-dir={tmp_path_factory.mktemp('profile')}", f"--virtual-time-budget={milliseconds}"]
        done = subprocess.run(
            [*command, "--dump-dom", path.as_uri() + fragment], capture_output=True, text=True, timeout=120, check=True
        )
        return Dom(done.stdout), [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    return run


def test_opens_at_a_step_without_errors(tmp_path, dump):
    pages, heldout, meta = book()
    dom, console = dump(write_flipbook(tmp_path / "page.html", pages, heldout, meta), "#step=2")
    assert console == []
    assert dom.attributes["html"]["data-ready"] == "true"
    assert dom.attributes["slider"]["max"] == "3"
    assert dom.attributes["slider"]["aria-valuetext"] == "Step 2, 1.17 bits per byte"
    assert dom.text["title"] == "A model"
    assert (dom.text["step"], dom.text["tokens"], dom.text["bpb"]) == ("2", "2,000", "1.17")
    assert dom.text["heldout"] == heldout["text"]
    assert dom.text["samples"] == "import text 2Thetext 2"
    # 13.004 / 3 + i bits, on the scale .5 1 2 3.5 5 8 12
    assert dom.tokens == ["h4", "h5", "h5", "h5"]
    assert dom.tags.count("circle") == len(pages)
    assert "gzip -9 1.75" in dom.text["chart"]


def test_plays_by_itself_to_the_last_page_and_stops(tmp_path, dump):
    dom, console = dump(write_flipbook(tmp_path / "page.html", *book()), milliseconds=15_000)
    assert console == []
    assert dom.attributes["slider"]["aria-valuetext"].startswith("Step 4,")
    assert dom.attributes["play"]["aria-pressed"] == "false"


@pytest.mark.parametrize(
    ("keys", "step"),
    [
        (["ArrowRight"], 1),
        (["End"], 4),
        (["End", "ArrowLeft"], 2),
        (["End", "Home"], 0),
        (["ArrowLeft"], 0),
        ([" "], 4),
    ],
)
def test_keys_turn_pages(tmp_path, dump, keys, step):
    path = write_flipbook(tmp_path / "page.html", *book())
    event = 'new KeyboardEvent("keydown", {key, bubbles: true})'
    press = f"for (const key of {json.dumps(keys)}) document.body.dispatchEvent({event});"
    path.write_text(path.read_text(encoding="utf-8").replace("</body>", f"<script>{press}</script></body>"))
    dom, console = dump(path, "#step=0", milliseconds=8000)
    assert console == []
    assert dom.text["step"] == str(step)


def test_pointing_at_a_token_tells_its_bits(tmp_path, dump):
    path = write_flipbook(tmp_path / "page.html", *book(tokens=("a b", "\n  ")))
    point = (
        'document.querySelectorAll("#heldout span")[1].dispatchEvent(new PointerEvent("pointerover", {bubbles: true}));'
    )
    path.write_text(path.read_text(encoding="utf-8").replace("</body>", f"<script>{point}</script></body>"))
    dom, console = dump(path, "#step=1")
    assert console == []
    assert dom.text["tip"] == "↵··7.50 bits · 1 in 181"


def test_any_text_is_shown_as_text(tmp_path, dump):
    pages, heldout, meta = book(tokens=("x", NASTY), prompts=(NASTY,), continuation=NASTY)
    heldout["title"] = meta["title"] = NASTY
    meta["facts"], meta["baselines"] = {NASTY: NASTY}, {NASTY: 1.0}
    pages[0]["surprise"][0][1] = None
    dom, console = dump(write_flipbook(tmp_path / "page.html", pages, heldout, meta), "#step=0")
    assert console == []
    assert dom.tags.count("script") == 2
    assert dom.attributes["html"]["data-ready"] == "true"
    pictured = re.sub(r"[\x00-\x08\x0b-\x1f]", lambda c: chr(0x2400 + ord(c[0])), NASTY).replace("\x7f", "\u2421")
    assert dom.text["heldout"].replace("↵", "") == "x" + pictured
    assert dom.text["samples"] == pictured * 2 + " 0"
    assert dom.tokens[0] == "hx"
    assert pictured[:40] not in dom.text["data"]


def test_one_page_and_no_loss(tmp_path, dump):
    pages, heldout, _ = book(steps=(7,), prompts=())
    pages[0]["bpb"] = pages[0]["loss"] = None
    dom, console = dump(write_flipbook(tmp_path / "page.html", pages, heldout, {}))
    assert console == []
    assert dom.attributes["html"]["data-ready"] == "true"
    assert dom.text["chart"] == "No loss was recorded."
    assert dom.text["title"] == "A model learns"

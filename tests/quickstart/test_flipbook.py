"""The flipbook: whole, safe with any text, readable; a browser is asked in test_flipbook_browser."""

import json
import math
import re
from html.parser import HTMLParser
from importlib.resources import files
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neox.quickstart.flipbook import flipbook_data, merge_pieces, write_flipbook
from neox.system.pictures import DATA_PLACEHOLDER, STYLE, embed_json

NASTY = (
    "</script><script>alert(1)</script><!-- <![CDATA[ ]]> -->\u2028\u2029\x00\ufffd\x1b\x7f&amp;\"'\\ \r\n\t"
    + DATA_PLACEHOLDER
)


def book(tokens=("def", " f", "(", ")"), prompts=("import ", "The"), steps=(0, 1, 2, 4), continuation="text"):
    pages = [
        {
            "step": step,
            "tokens_seen": step * 1000,
            "loss": 8.0 / (1 + step),
            "bpb": 3.5 / (1 + step),
            "samples": [{"prompt": prompt, "text": f"{continuation} {step}"} for prompt in prompts],
            "surprise": [[token, 13.004 / (1 + step) + i] for i, token in enumerate(tokens)],
        }
        for step in steps
    ]
    heldout = {"title": "sympy/core/expr.py", "text": "".join(tokens)}
    meta = {"title": "A model", "facts": {"Parameters": "1.8M"}, "baselines": {"gzip -9": 1.75}}
    return pages, heldout, meta


class Page(HTMLParser):
    """Elements with their attributes, and the text of each <script>."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.scripts = [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.elements and self.elements[-1][0] == "script" and self.lasttag == "script":
            self.scripts[-1] += data


def written(path, *arguments):
    return Page(write_flipbook(path, *arguments).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("flipbook")


anything = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.just(NASTY) | st.just("</ScRiPt >")


@given(st.lists(anything, min_size=1, max_size=5), st.lists(anything, max_size=3), anything, anything)
def test_flipbook_data_reads_back_exactly(folder, tokens, prompts, continuation, title):
    pages, heldout, meta = book(tokens, prompts, continuation=continuation)
    heldout["title"] = meta["title"] = title
    meta["facts"] = {title: continuation}
    meta["baselines"] = {title: 2.5}
    page = written(folder / "page.html", pages, heldout, meta)
    assert len(page.scripts) == 2
    data = json.loads(page.scripts[0])
    assert data == flipbook_data(pages, heldout, meta)
    # and, told apart from our own packing, what went in:
    assert data["heldout"] == {"title": title, "tokens": list(tokens)}
    assert data["title"] == title
    assert data["facts"] == [[title, continuation]]
    assert data["prompts"] == list(prompts)
    for given_page, read in zip(pages, data["pages"], strict=True):
        assert read["texts"] == [sample["text"] for sample in given_page["samples"]]
        assert (read["step"], read["loss"], read["bpb"]) == tuple(given_page[key] for key in ("step", "loss", "bpb"))
        assert read["bits"] == pytest.approx([bits for _, bits in given_page["surprise"]], abs=0.00501)


@given(st.recursive(st.none() | st.floats(allow_nan=False, allow_infinity=False) | anything, lambda x: st.lists(x)))
def test_embedded_json_has_nothing_that_html_could_read(value):
    text = embed_json(value)
    assert json.loads(text) == value
    assert text.isascii()
    assert not set("<>&\x00\n") & set(text)


def test_lone_surrogates_do_not_stop_it(tmp_path):
    page = written(tmp_path / "page.html", *book(continuation="\ud800"))
    assert json.loads(page.scripts[0])["pages"][0]["texts"][0] == "\ud800 0"


def test_flipbook_page_is_self_contained(tmp_path):
    path = write_flipbook(tmp_path / "page.html", *book())
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    assert "://" not in html
    assert not re.search(r"url\(|@import|\bfetch\b|XMLHttpRequest|\bimport\(", html)
    assert not {tag for tag, _ in page.elements} & {
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "audio",
        "video",
        "base",
    }
    assert not [attributes for _, attributes in page.elements if {"src", "href"} & attributes.keys()]
    policy = [a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"]
    assert DATA_PLACEHOLDER not in html


def test_controls_have_names_and_ids_are_unique(tmp_path):
    page = written(tmp_path / "page.html", *book())
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    labels = {attributes.get("for") for tag, attributes in page.elements if tag == "label"}
    for tag, attributes in page.elements:
        if tag == "input":
            assert attributes["id"] in labels
        if tag == "button":
            assert attributes["aria-label"]
        if "aria-labelledby" in attributes:
            assert attributes["aria-labelledby"] in ids
    assert ("html", {"lang": "en"}) in page.elements
    assert [tag for tag, _ in page.elements if tag in ("h1", "h2")] == ["h1", "h2", "h2", "h2"]


def palette():
    css = STYLE + files("neox.quickstart").joinpath("flipbook.html").read_text(encoding="utf-8")
    found = [
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block)) for block in re.findall(r":root \{(.*?)\}", css, re.S)
    ]
    light, dark, own_light, own_dark = found
    return {"light": light | own_light, "dark": light | own_light | dark | own_dark}


def contrast(one, other):
    """WCAG 2.2: (L1 + 0.05) / (L2 + 0.05), L the relative luminance."""

    def luminance(colour):
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_every_text_can_be_read_on_its_ground(mode):
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    colours = palette()[mode]
    pairs = [("ink", f"h{i}") for i in range(8)] + [("ink", "paper"), ("ink", "card"), ("paper", "ink")]
    pairs += [("soft", "paper"), ("soft", "card"), ("accent", "paper"), ("accent", "tint"), ("on-accent", "accent")]
    pairs += [("base", "card")]
    low = {pair: contrast(colours[pair[0]], colours[pair[1]]) for pair in pairs}
    assert {pair: value for pair, value in low.items() if value < 4.5} == {}
    # A stronger mark is further from the card, in either mode.
    marks = [contrast(colours[f"h{i}"], colours["card"]) for i in range(8)]
    assert marks == sorted(marks)


def test_what_is_not_a_number_is_no_prediction(tmp_path):
    pages, heldout, meta = book()
    pages[1]["loss"] = pages[1]["bpb"] = math.nan
    pages[2]["surprise"] = [["def", None], [" f", math.inf], ["(", math.nan], [")", 1.0]]
    data = json.loads(written(tmp_path / "page.html", pages, heldout, meta).scripts[0])
    assert (data["pages"][1]["loss"], data["pages"][1]["bpb"]) == (None, None)
    assert data["pages"][2]["bits"] == [None, None, None, 1.0]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p, h: p.clear(), "at least one page"),
        (lambda p, h: p[2].pop("bpb"), "page 2 has no 'bpb'"),
        (lambda p, h: h.update(text="def f()!"), "page 0, end to end, are not the held-out text"),
        (lambda p, h: p[3].update(step=2), r"page 3 \(step 2\) does not come after step 2"),
        (lambda p, h: p[0].update(step=-1), "does not come after"),
        (lambda p, h: p[1]["surprise"].pop(), "page 1 .*tokens are not those of page 0"),
        (lambda p, h: p[1]["samples"].pop(), "page 1 .*prompts are not those of page 0"),
    ],
)
def test_pages_that_do_not_fit_are_one_line_and_nothing_is_written(tmp_path, spoil, message):
    pages, heldout, meta = book()
    spoil(pages, heldout)
    with pytest.raises(ValueError, match=message) as error:
        write_flipbook(tmp_path / "page.html", pages, heldout, meta)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@given(st.text(st.characters(exclude_categories=["Cs"])), st.lists(st.integers(0, 400)))
def test_merged_pieces_are_the_text_cut_between_characters(text, cuts):
    data = text.encode()
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    pieces = [data[a:b] for a, b in pairwise(edges)]
    merged = merge_pieces(pieces, [1.0] * len(pieces))
    assert "".join(entry for entry, _ in merged) == text
    # A cut is kept exactly where it falls between two characters.
    between = {len(text[:i].encode()) for i in range(1, len(text) + 1)}
    ends = [len("".join(entry for entry, _ in merged[: i + 1]).encode()) for i in range(len(merged))]
    assert set(ends) == between & set(edges)
    if text and pieces[-1]:  # bits of empty pieces at the very end have no text to go with
        assert sum(bits for _, bits in merged) == len(pieces)


@given(st.lists(st.binary(max_size=5)))
def test_merged_pieces_of_any_bytes(pieces):
    merged = merge_pieces(pieces, [0.0] * len(pieces))
    assert "".join(entry for entry, _ in merged) == b"".join(pieces).decode(errors="replace")
    assert all(entry for entry, _ in merged)


def test_merged_pieces_by_hand():
    euro = "€".encode()
    assert merge_pieces([b"a", euro[:1], euro[1:] + b"b", b"c"], [1.0, 2.0, 3.5, 4.0]) == [
        ["a", 1.0],
        ["€b", 5.5],
        ["c", 4.0],
    ]
    assert merge_pieces([euro[:2], euro[2:], b"x"], [None, 2.0, 1.0]) == [["€", None], ["x", 1.0]]
    assert merge_pieces([b"x", euro[:2]], [1.0, 2.0]) == [["x", 1.0], ["\ufffd", 2.0]]
    with pytest.raises(ValueError):
        merge_pieces([b"x"], [])

"""What a run read: steps against the loader's batches, searches and documents against every row looked at."""

import json
from html.parser import HTMLParser
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from neox import cli
from neox.analysis.sample_inspector import SampleInspector
from neox.analysis.search import Search, component_tokens
from neox.config import load_config
from neox.data import Loader, TokenDataset, TokenWriter
from neox.tokenizer import train_bpe
from neox.train import Trainer
from tests.corpus.corpora import note
from tests.train.helpers import TINY

WORDS = ["a bright café", "night <b>&amp;", "the cat", "sat on", "the mat\n", "naïve", "x" * 9, "日本", "\x1b[2J"]
BATCH, STEPS = 4, 6


@pytest.fixture
def neox_(capsys):
    def call(*arguments: str) -> tuple[int, str, str]:
        status = cli.main(list(arguments))
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two token files of short documents with known text, in one tokenizer, with their sources beside them."""
    folder = tmp_path_factory.mktemp("data")
    draw = np.random.default_rng(0)
    texts = [["".join(draw.choice(WORDS, size=draw.integers(1, 9))) for _ in range(count)] for count in (120, 75)]
    tokenizer = train_bpe([text for own in texts for text in own], vocab_size=300, progress=False)
    tokenizer.save(folder / "tokenizer.json")
    for name, own in zip("ab", texts, strict=True):
        with TokenWriter(folder / name, np.uint16) as writer:
            for text in own:
                writer.add_document([*tokenizer.encode(text), tokenizer.eod_id])
    note(folder / "a", ("x.jsonl", "ArXiv", 90), ("y.jsonl", "Github", 30))
    return folder


def settings(folder: Path, run: Path, *options: str):
    named = f'data.train=["{folder / "a"}","{folder / "b"}"]'
    size = ("model.vocab_size=384", "seq_length=16", f"global_batch_size={BATCH}", f"steps={STEPS}")
    kept = (f"tokenizer.path={folder / 'tokenizer.json'}", f"out={run}", "checkpoint.every=2")
    return load_config(overrides=(*TINY, *size, *kept, named, *options))


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """A run whose weights were changed after two steps."""
    run = folder / "run"
    Trainer(settings(folder, run, "weights=[1.0,1.0]", "steps=2"), quiet=True).fit()
    Trainer(settings(folder, run, "weights=[1.0,7.0]"), resume=True, quiet=True).fit()
    return run


def every_place(inspector, wanted: bytes, until: int) -> dict[tuple[int, int, int], set[tuple[int, int]]]:
    """(part, document, first token) of each occurrence, found byte by byte, and the (step, row) that hold any of it."""
    table, found = inspector.tokenizer.bytes_of_tokens, {}
    rows = {
        (step, row.row): {
            (s.span.source, s.span.document, s.span.offset + at) for s in row.passages for at in range(s.span.tokens)
        }
        for step in range(1, until + 1)
        for row in inspector.rows(step)
    }
    for part, documents in enumerate(inspector.dataset.sources):
        for document in range(len(documents)):
            tokens = documents.file.document(document).tolist()
            owner = [n for n, token in enumerate(tokens) for _ in table[token]]
            text = b"".join(table[token] for token in tokens)
            for at in range(len(text)):
                if text[at : at + len(wanted)] == wanted:
                    held = {(part, document, n) for n in owner[at : at + len(wanted)]}
                    if places := {place for place, tokens in rows.items() if held & tokens}:
                        found.setdefault((part, document, owner[at]), set()).update(places)
    return found


def test_inspected_rows_of_a_step_are_the_training_batch(folder: Path, run: Path) -> None:
    inspector = SampleInspector.of_run(run)
    assert inspector.last == STEPS
    assert [phase[0] for phase in inspector.dataset.schedule.phases] == [0, 2 * BATCH]
    tokenizer = inspector.tokenizer
    for step in range(1, STEPS + 1):
        batch = inspector.loader.batch(step - 1)
        rows = list(inspector.rows(step))
        assert [row.tokens[:-1].tolist() for row in rows] == batch.tokens.tolist()
        assert [row.tokens[1:].tolist() for row in rows] == batch.labels.tolist()
        for row in rows:
            assert sum(s.span.tokens for s in row.passages) == 17
            at = 0
            for passage in row.passages:
                own = row.tokens[at : at + passage.span.tokens].tolist()
                assert passage.text == tokenizer.decode(own)
                component = None if passage.span.source else "ArXiv" if passage.span.document < 90 else "Github"
                assert passage.origin.component == component
                at += len(own)
    noted = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    for part, name in enumerate("ab"):
        windows = inspector.dataset.per_epoch()[part]
        read = sum(row.passages[0].span.source == part for step in range(1, STEPS + 1) for row in inspector.rows(step))
        assert noted[f"epochs/{name}"] == read / windows


def test_search_finds_what_a_slow_search_finds(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inspector, until = SampleInspector.of_run(run), 3
    whole = sum(len(part.tokens) for part in inspector.dataset.sources)
    for text in ("cat", "café", "night <b>", "日", "xx", "on", "cafe\u0301"):
        expected = every_place(inspector, text.replace("e\u0301", "é").encode(), until)
        assert expected, text
        for chunk, few in product((7, 1 << 20), (0, 1 << 20)):
            monkeypatch.setattr("neox.analysis.search.CHUNK", chunk)
            monkeypatch.setattr("neox.analysis.search.FEW", few)
            search, done = Search(inspector, text, until), []
            hits: dict[tuple[int, int, int], set[tuple[int, int]]] = {}
            for hit in search.hits(done.append):
                hits.setdefault(hit.span[:3], set()).update((step, row) for step, row, _ in hit.reads)
            case = text, chunk, few
            assert hits == expected, case
            assert sum(done) == search.size, case
            partly = few and until * BATCH * (17 + 2 * len(search.pattern)) < whole
            assert search.size < 2 * whole if partly else search.size == 2 * whole, case


def test_component_tokens_are_the_labels_of_the_rows(run: Path) -> None:
    inspector = SampleInspector.of_run(run)
    counted: dict[tuple[str, str | None], int] = {}
    for step in (1, 2, 3):
        for row in inspector.rows(step):
            labels = [(s.file, s.origin.component) for s in row.passages for _ in range(s.span.tokens)][1:]
            for key in labels:
                counted[key] = counted.get(key, 0) + 1
    found = component_tokens(inspector, 3)
    assert {(p.file, p.component): p.tokens for p in found if p.tokens} == counted
    assert sum(p.tokens for p in found) == 3 * BATCH * 16
    sizes = [part.file.sizes for part in inspector.dataset.sources]
    assert [p.whole for p in found] == [sizes[0][:90].sum(), sizes[0][90:].sum(), sizes[1].sum()]


@pytest.mark.parametrize("options", [(), ("order=megatron",), ("order=megatron", "weights=[2.0,1.0]")])
def test_inspect_data_of_a_config_without_a_run(folder: Path, options: tuple[str, ...]) -> None:
    inspector = SampleInspector.of_config(settings(folder, folder / "none", *options), str(folder / "tokenizer.json"))
    rows = {(step, row.row): row for step in range(1, STEPS + 1) for row in inspector.rows(step)}
    for name in ("a:3", "b:20", "a:119"):
        span = inspector.document(name)
        places = inspector.reads(span, STEPS)
        holding = [place for place, row in rows.items() if any(s.span[:2] == span[:2] for s in row.passages)]
        assert sorted({place[:2] for place in places}) == sorted(holding)
    assert not (folder / "none").exists()


def test_inspect_data_of_a_run_without_blend_weights(folder: Path, tmp_path: Path, neox_) -> None:
    """In megatron's order they are a blend, which the checkpoints note, though no weights are wanted."""
    options = ("order=megatron", "steps=2")
    Trainer(settings(folder, tmp_path / "run", *options), quiet=True).fit()
    wanted = SampleInspector.of_config(settings(folder, tmp_path / "none", *options)).loader.batch(1)
    assert SampleInspector.of_run(tmp_path / "run").loader.batch(1).tokens.tolist() == wanted.tokens.tolist()
    assert neox_("inspect", "data", str(tmp_path / "run"))[0] == 0


def test_inspect_data_in_pythias_preshuffled_layout(tmp_path: Path, neox_) -> None:
    """Documents that are rows of seq_length + 1 tokens, without end-of-document tokens."""
    draw = np.random.default_rng(1).integers(0, 64, (8, 17))
    with TokenWriter(tmp_path / "document", np.uint16) as writer:
        for row in draw:
            writer.add_document(row)
    given = [f"data.train={tmp_path / 'document'}", "data.order=preshuffled", "seq_length=16", "global_batch_size=4"]
    status, out, _ = neox_("inspect", "data", "pythia-14m", *given, "step=2", f"out={tmp_path / 'rows.npy'}")
    assert (status, out) == (0, f"{tmp_path / 'rows.npy'}: written\n")
    assert np.load(tmp_path / "rows.npy").tolist() == draw[4:].tolist()
    status, out, _ = neox_("inspect", "data", *given, "step=1", "row=2")
    assert " ".join(map(str, draw[2])) in out  # no tokenizer: the numbers


class Texts(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.inside, self.found, self.tags = False, [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "pre":
            self.found.append("")
        self.inside = tag == "pre"

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.found[-1] += data


def test_step_page_holds_the_text(run: Path, tmp_path: Path, neox_) -> None:
    page = tmp_path / "step.html"
    steps = {
        n: [passage.text for row in SampleInspector.of_run(run).rows(n) for passage in row.passages]
        for n in range(1, STEPS + 1)
    }
    step, texts = next((step, texts) for step, texts in steps.items() if any("<b>" in text for text in texts))
    assert neox_("inspect", "data", str(run), f"step={step}", f"out={page}")[0] == 0
    parser = Texts()
    parser.feed(page.read_text())
    assert parser.found == ["\n" + text for text in texts]  # a break behind <pre> is not shown
    # None from the text.
    frame = {"html", "head", "meta", "title", "style", "body", "main", "h1"}
    assert parser.tags == frame | {"section", "h2", "a", "small", "pre"}


def test_inspect_data_output(run: Path, tmp_path: Path, neox_) -> None:
    inspector = SampleInspector.of_run(run)
    status, out, _ = neox_("inspect", "data", str(run), "step=3")
    lines = out.splitlines()
    assert status == 0
    assert lines[0] == "step 3: 4 rows of 17 tokens, from sample 8 on"
    assert lines[1].split() == ["row", "sample", "tokens", "document", "component", "source", "text"]
    assert len(lines) == 2 + sum(len(row.passages) for row in inspector.rows(3))
    assert "\x1b" not in out
    span = inspector.document("a:0")
    status, out, _ = neox_("inspect", "data", str(run), "document=a:0")
    assert [line for line in out.splitlines() if line.startswith("  step")] == [
        f"  step {step}, row {row}, epoch {epoch}" for step, row, epoch in inspector.reads(span, STEPS)
    ]
    hits = list(Search(inspector, "cat", STEPS).hits())
    out = neox_("inspect", "data", str(run), "find=cat", "limit=0")[1]
    assert out.endswith(f"{len(hits)} places in what steps 1 to 6 read\n")
    out = neox_("inspect", "data", str(run), "find=cat", "limit=2")[1]
    assert out.endswith("2 places in what steps 1 to 6 read, the first 2: limit=0 finds all\n")
    out = neox_("inspect", "data", str(run), "until=3")[1]
    assert [line.split()[0] for line in out.splitlines()[2:]] == ["a", "a", "b"] or "ArXiv" in out
    assert neox_("inspect", "data", str(run), f"export={tmp_path / 'order'}")[0] == 0
    assert len(list(tmp_path.glob("order_train_*.npy"))) == 6


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (("step=1", "find=x"), 2, "one question at a time, not step and find"),
        (("row=1",), 2, "row= and out= belong to step=N"),
        (("step=x",), 1, "step: must be a valid integer, got 'x' (from step=x)"),
        (("step=0",), 1, "step=0: steps count from 1"),
        (("step=1", "row=4"), 1, "row=4: rows of a step are 0 to 3"),
        (("step=1", "out=x.pdf"), 1, "out=x.pdf: must end in .html"),
        (("document=3",), 1, "document=3: must be a number, of several files FILE:NUMBER; the files: a, b"),
        (("document=a:120",), 1, "has documents 0 to 119 here"),
        (("find=",), 1, "find: nothing to look for"),
        (("steps=3",), 2, "steps=3: a run keeps its config"),
    ],
)
def test_inspect_data_errors(run: Path, neox_, options, status, message) -> None:
    found, out, err = neox_("inspect", "data", str(run), *options)
    assert (found, out, err.count("\n")) == (status, "", 1)
    assert message in err


def test_inspect_data_refuses_changed_token_files(folder: Path, tmp_path: Path, neox_) -> None:
    for name in "ab":
        with TokenWriter(tmp_path / name, np.uint16) as writer:
            writer.add_document(np.arange(200))
    given = settings(folder, tmp_path / "run", f'data.train=["{tmp_path / "a"}","{tmp_path / "b"}"]', "steps=1")
    Trainer(given, quiet=True).fit()
    assert (
        SampleInspector.of_run(tmp_path / "run").loader.batch(0).tokens.tolist()
        == Loader(TokenDataset([tmp_path / "a", tmp_path / "b"], 16, 1234), BATCH).batch(0).tokens.tolist()
    )
    with TokenWriter(tmp_path / "b", np.uint16) as writer:
        writer.add_document(np.arange(201))
    found, _, err = neox_("inspect", "data", str(tmp_path / "run"), "step=1")
    assert found == 1
    assert "its token files are not those that it was trained on" in err
    assert "holds no run (no config.toml)" in neox_("inspect", "data", str(tmp_path))[2]
    assert "no token file" in neox_("inspect", "data", f"data.train={tmp_path / 'c'}", "step=1")[2]
    assert "data.train is empty" in neox_("inspect", "data", "pythia-14m", "step=1")[2]

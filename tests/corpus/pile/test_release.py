"""The table of the Pile's components, against totals that were published apart from it; a small release, prepared."""

import json
from pathlib import Path

import numpy as np
import pytest
import zstandard

from neox.cli import main
from neox.config.pile import COMPONENTS, GROUPS, PILE, STAND_INS, stand_in
from neox.corpus import shards
from neox.corpus.pile.release import prepare_pile
from neox.corpus.readers.hub_datasets import HUB_NAME
from neox.data import TokenFile
from neox.tokenizer import train_bpe


def test_pile_table_adds_up_to_the_published_totals():
    assert len(COMPONENTS) == len(PILE) == 22
    assert sum(c.raw_gib for c in PILE) == pytest.approx(825.18, abs=0.005)
    assert sum(c.weight for c in PILE) == pytest.approx(100, abs=0.005)
    after_epochs = {c: c.raw_gib * c.epochs for c in PILE}
    effective = sum(after_epochs.values())
    assert effective == pytest.approx(1254.20, abs=0.01)
    for component in PILE:  # weights are printed to 0.01, sizes to 0.01 GiB
        assert component.weight == pytest.approx(100 * after_epochs[component] / effective, abs=0.006)
    documents = sum(gib * 2**20 / c.document_kib for c, gib in after_epochs.items())
    assert effective * 2**20 / documents == pytest.approx(5.91, abs=0.006)


def test_pile_components_are_in_one_of_five_groups():
    assert {component.group for component in PILE} == set(GROUPS)
    assert [sum(c.group == group for c in PILE) for group in GROUPS] == [7, 4, 3, 5, 3]


ROWS = {
    "00": [("Github", "int main;"), ("ArXiv", "we show"), ("Github", "int main;")],
    "03": [("ArXiv", ["listed", "text"]), ("StackExchange", ""), ("mine", "été")],
    "val": [("Github", "held out")],
}


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """Two training shards, each a shard of work too, and validation; no test.jsonl.zst."""
    folder = tmp_path / "release"
    (folder / "train").mkdir(parents=True)
    for name, rows in ROWS.items():
        lines = [json.dumps({"text": text, "meta": {"pile_set_name": component}}) for component, text in rows]
        path = folder / ("" if name == "val" else "train") / f"{name}.jsonl.zst"
        path.write_bytes(zstandard.ZstdCompressor().compress("\n".join(lines).encode()))
    return folder


@pytest.mark.parametrize("workers", [1, 2])
def test_pile_release_is_prepared_and_counted(release: Path, tmp_path: Path, workers: int, monkeypatch, capsys):
    monkeypatch.setattr(shards, "CHUNK_BYTES", 1)
    tokenizer = train_bpe(["int main; we show été"], vocab_size=300)
    tokenizer.save(tmp_path / "tokenizer.json")
    out = tmp_path / "out"
    command = ["prepare", "pile", str(release), f"out={out}", f"tokenizer={tmp_path}/tokenizer.json"]
    assert main([*command, f"workers={workers}"]) == 0
    train = [(name, "\n\n".join(text) if isinstance(text, list) else text) for name, text in ROWS["00"] + ROWS["03"]]
    train = [(name, text) for name, text in train if text]
    names = json.loads((out / "train.components.json").read_bytes())["names"]
    assert [names[number] for number in np.load(out / "train.components.npy")] == [name for name, _ in train]
    file = TokenFile(out / "train")
    assert [tokenizer.decode(file.document(n).tolist()[:-1]) for n in range(len(file))] == [text for _, text in train]
    content = json.loads((out / "statistics.json").read_bytes())
    assert set(content) == {"train", "val"}
    for component in ("Github", "ArXiv", "mine"):
        texts = [text for name, text in train if name == component]
        row = content["train"]["components"][component]
        assert (row["documents"], row["bytes"]) == (len(texts), sum(len(text.encode()) for text in texts))
        assert row["tokens"] == sum(len(tokenizer.encode(text)) for text in texts)
    sheet = (out / "datasheet.md").read_text()
    assert "01.jsonl.zst, 02.jsonl.zst, 04.jsonl.zst" in sheet
    assert "29.jsonl.zst, test.jsonl.zst" in sheet
    assert "- not components of the Pile: mine" in sheet
    kept = {path.name: path.read_bytes() for path in out.iterdir()}
    assert not any((out / name).is_dir() for name in kept)
    capsys.readouterr()
    assert main([*command, f"workers={workers}"]) == 0
    assert capsys.readouterr().out.count("done before") == 2
    assert {path.name: path.read_bytes() for path in out.iterdir()} == kept


def test_pile_components_are_counted_after_dedup(release: Path, tmp_path: Path):
    tokenizer = train_bpe(["int main; we show été"], vocab_size=300)
    prepare_pile(release, tmp_path / "out", tokenizer, progress=False, workers=1, dedup="exact")
    content = json.loads((tmp_path / "out" / "statistics.json").read_bytes())
    assert content["train"]["components"]["Github"]["documents"] == 1


def test_pile_release_missing_is_refused(tmp_path: Path, capsys):
    assert main(["prepare", "pile", str(tmp_path), "out=x"]) == 1
    assert "holds no training shard of the Pile (00.jsonl.zst to 29.jsonl.zst" in capsys.readouterr().err
    assert main(["prepare", "pile", "out=x"]) == 2
    (tmp_path / "00.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(b'{"text": "a", "meta": {}}'))
    with pytest.raises(ValueError, match=r"00.jsonl.zst: document 0 from there has no meta.pile_set_name"):
        prepare_pile(tmp_path, tmp_path / "out", train_bpe(["a"], vocab_size=300), progress=False, workers=1)


def test_stand_ins_are_names_on_the_hub():
    """The form of the names; the hub is not asked."""
    for name in STAND_INS:
        parts = HUB_NAME.fullmatch(stand_in(name))
        assert parts, name
        assert "/" in parts["repo"], name
        assert ("bt" in name) == bool(parts["config"]), name
    assert stand_in("else") == "else"

"""`neox prepare pile FOLDER`: the release's files to tokens, statistics and a datasheet.

FOLDER/NN.jsonl.zst, val, test -> train, val, test.{bin,idx} + .components.npy -> statistics.{json,md}, datasheet.md
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neox.config import PrepareConfig
from neox.corpus.pile.components import count_components
from neox.corpus.pile.datasheet import datasheet
from neox.corpus.pile.statistics import ComponentCounts, statistics, statistics_page
from neox.corpus.preparation import PrepareReport, prepare
from neox.system.files import write_atomic
from neox.tokenizer import Tokenizer

TRAIN = tuple(f"{number:02d}.jsonl.zst" for number in range(30))
HELD_OUT = {"val": "val.jsonl.zst", "test": "test.jsonl.zst"}


@dataclass(frozen=True)
class Release:
    """Files of the release by split, and the names of the missing ones."""

    splits: dict[str, list[str]]
    absent: list[str]


def find_release(folder: Path) -> Release:
    """Find the Pile's files in `folder`; training shards may lie in `train/` below.

    Raises ValueError where there is no training shard; a part of the release is enough.
    """
    places = [folder / "train", folder] if (folder / "train").is_dir() else [folder]
    names = (*TRAIN, *HELD_OUT.values())
    paths = {name: next((p / name for p in places if (p / name).exists()), None) for name in names}
    train = [str(paths[name]) for name in TRAIN if paths[name]]
    if not train:
        raise ValueError(f"{folder}: holds no training shard of the Pile (00.jsonl.zst to 29.jsonl.zst, or in train/)")
    splits = {"train": train} | {split: [str(paths[name])] for split, name in HELD_OUT.items() if paths[name]}
    return Release(splits, [name for name, path in paths.items() if not path])


def prepare_pile(
    folder: str | Path, out: str | Path, tokenizer: Tokenizer, options: PrepareConfig | None = None, **keywords: Any
) -> dict[str, PrepareReport]:
    """Prepare each split of the release into `<out>/<split>`; return the reports by split.

    Also counts the components and writes the datasheet.

    `options` and `keywords` are those of `prepare`. Beside each pair `<split>.components.npy` has for each document,
    uint16, the place of its component in the list of `<split>.components.json`. Raises what `prepare` raises,
    ValueError on a document without `meta.pile_set_name`.
    """
    release, out = find_release(Path(folder)), Path(out)
    reports: dict[str, PrepareReport] = {}
    counts: dict[str, dict[str, ComponentCounts]] = {}
    for split, files in release.splits.items():
        reports[split] = prepare(files, out / split, tokenizer, options, components=True, **keywords)
        counts[split] = count_components(out / split)
    content = statistics(counts)
    write_atomic(out / "statistics.json", json.dumps(content, indent=1).encode())
    write_atomic(out / "statistics.md", statistics_page(counts).encode())
    write_atomic(out / "datasheet.md", datasheet(content, release.absent).encode())
    return reports

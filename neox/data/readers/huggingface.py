"""Documents of Hugging Face data sets: a folder that `save_to_disk` wrote, or one of the hub, streamed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from neox.data.readers.columns import ROWS, check_column, column_texts
from neox.data.readers.faults import Fault, Faults, one_line, optional

HUB = "hf:"
HUB_NAME = re.compile(
    r"hf:(?P<repo>[\w.-]+(/[\w.-]+)?)(:(?P<config>[^@#]+))?(@(?P<revision>[^#]+))?(#(?P<split>[\w.-]+))?"
)


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote this folder."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


class SavedDataset:
    """A folder that `Dataset.save_to_disk` wrote. Raises ValueError where it holds several splits."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._datasets = optional("datasets", name)
        folder = Path(name)
        if (folder / "dataset_dict.json").is_file():
            splits = sorted(state.parent for state in folder.glob("*/state.json"))
            ways = " or ".join(map(str, splits))
            raise ValueError(f"{name}: holds a data set of several splits; name one of them: {ways}")
        self.size: int | None = sum(file.stat().st_size for file in folder.glob("*.arrow"))
        self.noted: dict[str, Any] = {"path": name, "bytes": self.size}

    def check(self, text_key: str) -> None:
        """Raises Fault where the data set is damaged or has no column of texts."""
        self._load(text_key)

    def records(self, text_key: str, faults: Faults) -> Iterator[tuple[str, float]]:
        """Each text with its share of the bytes of the Arrow files, which are mapped, not loaded."""
        try:
            rows = self._load(text_key)
        except Fault as fault:
            faults.add(fault)
            return
        share = (self.size or 0) / max(len(rows), 1)
        for number, table in enumerate(rows.select_columns([text_key]).with_format("arrow").iter(ROWS)):
            yield from column_texts(table, self.name, number * ROWS, text_key, share, faults)

    def _load(self, text_key: str) -> Any:
        try:
            rows = self._datasets.load_from_disk(self.name)
        except Exception as error:  # pyarrow's, json's or the system's, as the damage goes
            what = f"no data set that `datasets` can load ({one_line(error)})"
            raise Fault("damaged", f"{self.name}: {what}: fetch it or save it again") from None
        check_column(rows.features.arrow_schema, self.name, text_key, len(rows))
        return rows


@cache
def _commit(hub: Any, repo: str, revision: str | None) -> str:
    """The commit that `revision` stands for, looked up once a process: both passes, one to train a tokenizer and one
    to encode, read the same data whatever is pushed meanwhile."""
    return str(hub.HfApi().dataset_info(repo, revision=revision).sha)


class HubDataset:
    """`hf:OWNER/NAME[:CONFIG][@REVISION][#SPLIT]`, streamed; the split is `train` where none is named.

    What fails while it streams always ends the reading: it may be the network.
    Raises ValueError where the name is no such name, and in one line whatever the hub says of it.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._datasets, hub = optional("datasets", name), optional("huggingface_hub", name)
        parts = HUB_NAME.fullmatch(name)
        if not parts:
            raise ValueError(f"{name}: not a name on the hub; write hf:OWNER/NAME[:CONFIG][@REVISION][#SPLIT]")
        repo, config, revision, split = parts["repo"], parts["config"], parts["revision"], parts["split"] or "train"
        try:
            commit = _commit(hub, repo, revision)
            self._stream = self._datasets.load_dataset(repo, config, revision=commit, split=split, streaming=True)
        except Exception as error:  # the hub's, the network's or the library's own
            raise ValueError(f"{name}: cannot be opened: {one_line(error)}") from None
        self.identity = f"{repo}:{self._stream.info.config_name}@{commit}#{split}"
        """The same for every name of the same data."""
        known = (self._stream.info.splits or {}).get(split)
        self._rows: int = known.num_examples if known else 0
        self.size: int | None = (known.num_bytes or None) if known and self._rows else None
        self.noted: dict[str, Any] = {"path": name, "bytes": self.size, "revision": commit}

    def check(self, text_key: str) -> None:
        """Raises Fault where the data set states its columns and has none of texts."""
        if self._stream.features:
            check_column(self._stream.features.arrow_schema, self.name, text_key, 0)

    def records(self, text_key: str, faults: Faults) -> Iterator[tuple[str, float]]:
        """Each text with its share of the bytes that the hub states; with its own bytes where it states none."""
        row = 0
        tables = iter(self._stream.with_format("arrow").iter(ROWS))
        while True:
            try:
                table = next(tables, None)
            except Exception as error:
                raise ValueError(
                    f"{self.name}: row {row}: cannot be read on: {one_line(error)}; run it again"
                ) from None
            if table is None:
                return
            check_column(table.schema, f"{self.name}: row {row}", text_key, len(table))
            share = (self.size or 0) / max(self._rows, 1)
            for text, _ in column_texts(table, self.name, row, text_key, share, faults):
                yield text, share or len(text.encode("utf-8"))
            row += len(table)

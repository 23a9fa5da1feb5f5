"""Documents of Hugging Face data sets, saved by `save_to_disk` or streamed from the hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from neox.corpus.readers.chunks import CHUNK_BYTES, Chunk, Document
from neox.corpus.readers.columns import ROWS, check_column, column_documents
from neox.corpus.readers.errors import ErrorPolicy, ReadError
from neox.system.console import one_line
from neox.system.optional import optional

HUB = "hf:"
HUB_NAME = re.compile(
    r"hf:(//(datasets/)?)?(?P<repo>[\w.-]+(/[\w.-]+)?)(:(?P<config>[^@#]+))?(@(?P<revision>[^#]+))?(#(?P<split>[\w.-]+))?"
)


def is_saved(folder: Path) -> bool:
    """Tell whether `save_to_disk` wrote this folder."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


class SavedDataset:
    """A folder that `Dataset.save_to_disk` wrote. Raises ValueError where it holds several splits."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._datasets = optional("datasets", name, "data")
        folder = Path(name)
        if (folder / "dataset_dict.json").is_file():
            splits = sorted(state.parent for state in folder.glob("*/state.json"))
            ways = " or ".join(map(str, splits))
            raise ValueError(f"{name}: holds a data set of several splits; name one of them: {ways}")
        self.size: int | None = sum(file.stat().st_size for file in folder.glob("*.arrow"))
        self.manifest_entry: dict[str, Any] = {"path": name, "bytes": self.size}

    def check(self, text_key: str) -> None:
        """Check that the data set is sound and has a column of texts. Raises ReadError."""
        self._load(text_key)

    def unrecognized(self) -> Iterator[ReadError]:
        """No errors: a data set knows its own files."""
        return iter(())

    def chunks(self) -> list[Chunk]:
        """Ranges of rows."""
        size, rows = self.size or 0, 0
        with suppress(ReadError):
            rows = len(self._load())
        step = max(1, rows * CHUNK_BYTES // max(size, CHUNK_BYTES))
        starts = range(0, max(rows, 1), step)
        ends = [*starts[1:], None]
        return [Chunk(self.name, "saved", a, b, size // len(starts)) for a, b in zip(starts, ends, strict=True)]

    def documents(self, chunk: Chunk, text_key: str, policy: ErrorPolicy, meta_key: str | None) -> Iterator[Document]:
        """Rows with their share of the bytes of the Arrow files, which are mapped, not loaded."""
        try:
            rows = self._load(text_key)
        except ReadError as read_error:
            policy.add(read_error)
            return
        share = (self.size or 0) / max(len(rows), 1)
        columns = [text_key, *([meta_key] if meta_key in rows.column_names else [])]
        rows = rows.select(range(chunk.start, len(rows) if chunk.end is None else chunk.end))
        for number, table in enumerate(rows.select_columns(columns).with_format("arrow").iter(ROWS)):
            first = chunk.start + number * ROWS
            yield from column_documents(table, self.name, first, text_key, share, policy, meta_key)

    def _load(self, text_key: str | None = None) -> Any:
        try:
            rows = self._datasets.load_from_disk(self.name)
        except Exception as error:  # pyarrow's, json's or the system's, as the damage goes
            what = f"no data set that `datasets` can load ({one_line(error)})"
            raise ReadError("damaged", f"{self.name}: {what}: fetch it or save it again") from None
        if text_key is not None:
            check_column(rows.features.arrow_schema, self.name, text_key, len(rows))
        return rows


@cache
def _commit(hub: Any, repo: str, revision: str | None) -> str:
    """Commit of a `revision`, looked up once a process.

    Training a tokenizer and encoding then read the same data, whatever is pushed meanwhile.
    """
    return str(hub.HfApi().dataset_info(repo, revision=revision).sha)


class HubDataset:
    """`hf:OWNER/NAME[:CONFIG][@REVISION][#SPLIT]`, streamed; the split is `train` where none is named.

    What fails while it streams always ends the reading: it may be the network.
    Raises ValueError where the name is no such name, and in one line whatever the hub says of it.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._datasets, hub = optional("datasets", name, "data"), optional("huggingface_hub", name, "data")
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
        self._pinned = f"{HUB}{repo}{f':{config}' if config else ''}@{commit}#{split}"
        """The same for every name of the same data."""
        known = (self._stream.info.splits or {}).get(split)
        self._rows: int = known.num_examples if known else 0
        self.size: int | None = (known.num_bytes or None) if known and self._rows else None
        self.manifest_entry: dict[str, Any] = {"path": name, "bytes": self.size, "revision": commit}

    def check(self, text_key: str) -> None:
        """Check that the data set has a column of texts, if it states its columns.

        Raises ReadError.
        """
        if self._stream.features:
            check_column(self._stream.features.arrow_schema, self.name, text_key, 0)

    def unrecognized(self) -> Iterator[ReadError]:
        """No errors: a data set knows its own files."""
        return iter(())

    def chunks(self) -> list[Chunk]:
        """Files of the data set, as `datasets` counts them."""
        shards = int(self._stream.num_shards)
        size = (self.size or 0) // shards
        return [Chunk(self._pinned, "hub", n, n + 1 if n + 1 < shards else None, size) for n in range(shards)]

    def documents(self, chunk: Chunk, text_key: str, policy: ErrorPolicy, meta_key: str | None) -> Iterator[Document]:
        """Rows with their share of the bytes that the hub states, else their own bytes."""
        row, name, stream, shards = 0, self.name, self._stream, int(self._stream.num_shards)
        if shards > 1:
            name = f"{self.name} (file {chunk.start} of {shards})"
            stream = stream.shard(num_shards=shards, index=chunk.start)
        tables = iter(stream.with_format("arrow").iter(ROWS))
        share = (self.size or 0) / max(self._rows, 1)
        while True:
            try:
                table = next(tables, None)
            except Exception as error:
                raise ValueError(f"{name}: row {row}: cannot be read on: {one_line(error)}; run it again") from None
            if table is None:
                return
            check_column(table.schema, f"{name}: row {row}", text_key, len(table))
            for document in column_documents(table, name, row, text_key, share, policy, meta_key):
                yield document if share else document._replace(taken=len(document.text.encode("utf-8")))
            row += len(table)


@cache
def _opened(pinned: str) -> HubDataset:
    """Open a data set of the hub once a process.

    Opened again for each chunk, the hub would list all of its files each time.
    """
    return HubDataset(pinned)


def read_dataset(chunk: Chunk, text_key: str, policy: ErrorPolicy, meta_key: str | None = None) -> Iterator[Document]:
    """Read the rows of a chunk of a data set, saved or on the hub."""
    opened = SavedDataset(chunk.name) if chunk.kind == "saved" else _opened(chunk.name)
    return opened.documents(chunk, text_key, policy, meta_key)

"""Component of each document of the Pile, in two bytes a document.

documents -> Components.documents, which notes -> prepare -> .bin/.idx -> count_components: names, numbers, counts
"""

from __future__ import annotations

import json
import shutil
from array import array
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from neox.config.structured import read_json
from neox.corpus.pile.statistics import ComponentCounts
from neox.corpus.readers import Document, ErrorPolicy
from neox.corpus.shards import Shard, documents
from neox.data.arrays import write_npy
from neox.data.manifest import Manifest
from neox.data.token_file import TokenFile
from neox.system.files import write_atomic, write_whole

META, NAME = "meta", "pile_set_name"
ReadShard = Callable[[Shard, str, ErrorPolicy | None, str | None], Iterator[Document]]


def documents_with_component(
    shard: Shard, text_key: str = "text", policy: ErrorPolicy | None = None, read: ReadShard = documents
) -> Iterator[tuple[Document, str]]:
    """Read the documents of a shard with their components.

    Raises ValueError on a document without `meta.pile_set_name`.
    """
    for place, document in enumerate(read(shard, text_key, policy, META)):
        name = document.meta.get(NAME) if isinstance(document.meta, dict) else None
        if not isinstance(name, str):
            where = f"{shard.chunks[0].name}: document {place} from there"
            raise ValueError(f"{where} has no {META}.{NAME}, which says its component; is this the Pile?")
        yield document, name


@dataclass(frozen=True)
class Components:
    """Reader of shards that notes the component and size of each document in `folder`."""

    folder: Path
    read: ReadShard = documents
    """Reader of a shard: of all of it, or `Cleaning.documents`."""

    def documents(
        self, shard: Shard, text_key: str = "text", policy: ErrorPolicy | None = None, meta_key: str | None = META
    ) -> Iterator[Document]:
        """Read the documents of a shard; write its note when the shard is read.

        Raises ValueError on a document without `meta.pile_set_name`.
        """
        names: dict[str, int] = {}
        numbers, sizes = array("H"), array("Q")
        for document, name in documents_with_component(shard, text_key, policy, self.read):
            if document.text:
                numbers.append(names.setdefault(name, len(names)))
                sizes.append(len(document.text.encode()))
            yield document
        path = self.folder / f"{shard.number:05d}.npz"
        write_whole(path, lambda file: np.savez(file, names=json.dumps(list(names)), numbers=numbers, sizes=sizes))


def count_components(prefix: Path) -> dict[str, ComponentCounts]:
    """Count documents, bytes and tokens of each component of a prepared pair.

    The notes become `<prefix>.components.npy`, uint16 for each document, the place of its component in the names that
    `<prefix>.components.json` lists, with the counts. Called again, it reads that.
    """
    notes, listed = prefix.with_name(prefix.name + ".components"), prefix.with_name(prefix.name + ".components.json")
    manifest = Manifest.read(prefix)
    assert manifest, "a pair that was prepared has a manifest"
    known = read_json(listed) if listed.exists() else {}
    if known.get("sha256") != manifest.sha256:
        known = {"sha256": manifest.sha256, **_merged(notes, prefix, bool(manifest.append_eod))}
        write_atomic(listed, json.dumps(known).encode())
    shutil.rmtree(notes, ignore_errors=True)
    return {name: ComponentCounts(*counts) for name, counts in zip(known["names"], known["counts"], strict=True)}


def _merged(notes: Path, prefix: Path, append_eod: bool) -> dict[str, Any]:
    """Write `<prefix>.components.npy`; return the names and their counts."""
    sizes = TokenFile(prefix).sizes
    counts: dict[str, ComponentCounts] = {}

    def blocks() -> Iterator[npt.NDArray[np.uint16]]:
        start = shard = 0
        while start < len(sizes):
            with np.load(notes / f"{shard:05d}.npz") as note:
                own, numbers, lengths = json.loads(str(note["names"])), note["numbers"], note["sizes"]
            end = start + len(numbers)
            tokens = sizes[start:end].astype(np.int64) - append_eod
            for number, name in enumerate(own):
                mine = numbers == number
                more = ComponentCounts(int(mine.sum()), int(lengths[mine].sum()), int(tokens[mine].sum()))
                counts[name] = counts.get(name, ComponentCounts()) + more
            names = list(counts)
            yield np.array([names.index(name) for name in own], np.uint16)[numbers]
            start, shard = end, shard + 1
        assert start == len(sizes), "as many documents were noted as written"

    write_npy(prefix.with_name(prefix.name + ".components.npy"), np.uint16, (len(sizes),), blocks())
    return {"names": list(counts), "counts": [astuple(found) for found in counts.values()]}

"""Which component each document of a corpus is from: noted while it is prepared, one byte or two a document.

documents -> Components.documents, which notes -> prepare -> .bin/.idx -> collect: names, numbers, counts
"""

from __future__ import annotations

import io
import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from neox.data.readers import Document, Faults
from neox.data.shards import Shard, documents
from neox.data.statistics import Counts
from neox.files import write_atomic

META, NAME = "meta", "pile_set_name"
Read = Callable[[Shard, str, Faults | None, str | None], Iterator[Document]]


def documents_with_component(
    shard: Shard, text_key: str = "text", faults: Faults | None = None, read: Read = documents
) -> Iterator[tuple[Document, str]]:
    """The documents of a shard, each with its component. Raises ValueError on one without `meta.pile_set_name`."""
    for place, document in enumerate(read(shard, text_key, faults, META)):
        name = document.meta.get(NAME) if isinstance(document.meta, dict) else None
        if not isinstance(name, str):
            where = f"{shard.pieces[0].name}: document {place} from there"
            raise ValueError(f"{where} has no {META}.{NAME}, which says its component; is this the Pile?")
        yield document, name


@dataclass(frozen=True)
class Components:
    """Reads shards, and notes of each document that holds text its component and size in `folder`."""

    folder: Path
    read: Read = documents
    """What reads a shard: all of it, or what `Cleaning.documents` leaves."""

    def documents(
        self, shard: Shard, text_key: str = "text", faults: Faults | None = None, meta_key: str | None = META
    ) -> Iterator[Document]:
        """The documents of a shard; when it has come to its end, the note on it is on the disk.

        Raises ValueError on a document without `meta.pile_set_name`.
        """
        names: dict[str, int] = {}
        numbers, sizes = array("H"), array("Q")
        for document, name in documents_with_component(shard, text_key, faults, self.read):
            if document.text:
                numbers.append(names.setdefault(name, len(names)))
                sizes.append(len(document.text.encode()))
            yield document
        note = io.BytesIO()
        np.savez(note, names=json.dumps(list(names)), numbers=numbers, sizes=sizes)
        write_atomic(self.folder / f"{shard.number:05d}.npz", note.getvalue())


def collect(
    folder: Path, shards: Sequence[Shard], tokens: npt.NDArray[np.int64]
) -> tuple[list[str], npt.NDArray[np.uint16], dict[str, Counts]]:
    """Names of all components; the number of each document's; and what there is of each.

    `tokens` holds the tokens of each document, in the same order, without the one that ends it.
    """
    names: list[str] = []
    found: list[npt.NDArray[np.uint16]] = []
    counts: dict[str, Counts] = {}
    start = 0
    for shard in shards:
        with np.load(folder / f"{shard.number:05d}.npz") as note:
            own, numbers, sizes = json.loads(str(note["names"])), note["numbers"], note["sizes"]
        names += [name for name in own if name not in names]
        found.append(np.array([names.index(name) for name in own], np.uint16)[numbers])
        of_shard = tokens[start : start + len(numbers)]
        start += len(numbers)
        for number, name in enumerate(own):
            mine = numbers == number
            more = Counts(int(mine.sum()), int(sizes[mine].sum()), int(of_shard[mine].sum()))
            counts[name] = counts.get(name, Counts()) + more
    assert start == len(tokens), "as many documents were noted as written"
    return names, np.concatenate(found) if found else np.empty(0, np.uint16), counts

"""Where the documents of a token file came from: two small files beside `.bin` and `.idx`.

`PREFIX.sources.json`: `{"documents": N, "sources": [{"source": path, "count": n}, ...], "components": [name, ...]}`,
the sources in the order of the documents, n of them each.
`PREFIX.components`: a byte a document, the number of its component in that list, NONE for none; absent where there is
one component or none, which is then that of all documents. The Pile's documents change component one by one.
A pair that another program wrote has neither: nothing is known of its documents.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from neox.data.mmap import TokenFile
from neox.files import write_atomic

NONE = 255


class Origin(NamedTuple):
    """What is known of a document."""

    source: str | None = None
    component: str | None = None


def side_files(bin_file: Path) -> tuple[Path, Path]:
    """The two side files of a `.bin`, which may not exist."""
    return bin_file.with_suffix(".sources.json"), bin_file.with_suffix(".components")


class Sources:
    """Source and component of each document of a token file."""

    def __init__(self, firsts: Sequence[int], names: Sequence[str | None], components: Sequence[str]) -> None:
        """From document `firsts[i]` on, up to the next, documents come from `names[i]`."""
        self.firsts, self.names, self._components = firsts, names, components
        self._numbers: npt.NDArray[np.uint8] | None = None

    @classmethod
    def of(cls, file: TokenFile) -> Sources:
        """What is noted beside a token file. Raises ValueError, naming the file, where that does not fit it."""
        path, numbers = side_files(file.bin)
        if not path.exists():
            return cls([0], [None], [])
        try:
            noted: dict[str, Any] = json.loads(path.read_bytes())
            counts = [int(row["count"]) for row in noted["sources"]]
            found = cls(
                list(accumulate(counts, initial=0))[:-1],
                [str(row["source"]) for row in noted["sources"]],
                [str(name) for name in noted["components"]],
            )
            if len(found._components) > 1 and len(file):
                found._numbers = np.memmap(numbers, np.uint8, "r")
            sizes = {noted["documents"], sum(counts), *([] if found._numbers is None else [len(found._numbers)])}
            if sizes != {len(file)}:
                raise ValueError(f"it tells of {sorted(sizes)} documents, there are {len(file)}")
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: does not fit {file.bin} ({error}): remove it, or prepare again") from None
        return found

    def __getitem__(self, document: int) -> Origin:
        return Origin(self.names[bisect_right(self.firsts, document) - 1], self._component(document))

    def _component(self, document: int) -> str | None:
        if self._numbers is None:
            return self._components[0] if self._components else None
        number = int(self._numbers[document])
        return None if number == NONE else self._components[number]

    def tokens(self, sizes: npt.NDArray[np.int32], first: int) -> dict[str | None, int]:
        """Tokens of each component among the documents from `first` on that have these sizes."""
        if self._numbers is None:
            return {self._component(first): int(sizes.sum(dtype=np.int64))} if len(sizes) else {}
        found: dict[str | None, int] = {}
        for start in range(0, len(sizes), 1 << 20):
            block = sizes[start : start + (1 << 20)]
            own = self._numbers[first + start : first + start + len(block)]
            # Exact: float64 holds whole numbers up to 2**53.
            totals = np.bincount(own, weights=block, minlength=NONE + 1)
            for number in np.unique(own).tolist():
                name = None if number == NONE else self._components[number]
                found[name] = found.get(name, 0) + int(totals[number])
        return found


class SourceNotes:
    """Collects source and component of documents, in their order, and writes them beside a token file."""

    def __init__(self) -> None:
        self._sources: list[tuple[str, int]] = []
        self._components: dict[str, int] = {}
        self._numbers = bytearray()

    def add(self, source: str, component: str | None = None, count: int = 1) -> None:
        """The next `count` documents. Raises ValueError at the 256th component."""
        if self._sources and self._sources[-1][0] == source:
            self._sources[-1] = source, self._sources[-1][1] + count
        else:
            self._sources.append((source, count))
        number = NONE if component is None else self._components.setdefault(component, len(self._components))
        if component is not None and number >= NONE:
            raise ValueError(f"{source}: names a component beyond the {NONE} that can be told apart: {component[:60]}")
        self._numbers += bytes([number]) * count

    def write(self, bin_file: Path) -> None:
        """Write the side files of `bin_file`, each whole or not at all. Raises OSError naming the file."""
        path, numbers = side_files(bin_file)
        components = list(self._components)
        if len(components) == 1 and NONE in self._numbers:
            components.append("")  # so that the bytes are read: some documents have none
        if len(components) > 1:
            write_atomic(numbers, bytes(self._numbers))
        noted = {
            "documents": len(self._numbers),
            "sources": [{"source": source, "count": count} for source, count in self._sources],
            "components": components,
        }
        write_atomic(path, (json.dumps(noted, indent=1, ensure_ascii=False) + "\n").encode())
        if len(components) <= 1:
            numbers.unlink(missing_ok=True)

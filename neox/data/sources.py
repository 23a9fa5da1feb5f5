"""Where the documents of a token file came from: `PREFIX.sources.json`, beside `.bin` and `.idx`.

A list of rows, each for documents that follow each other, together all of them in order:
`{"source": path, "component": name or null, "first_document": i, "count": n}`.
A file that another program wrote has none: then its documents have no known source.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple


class Origin(NamedTuple):
    """What is known of a document."""

    source: str | None = None
    component: str | None = None


def sources_file(bin_file: Path) -> Path:
    """The side file of a `.bin`."""
    return bin_file.with_suffix(".sources.json")


class Sources:
    """Source and component of each document of a token file."""

    def __init__(self, firsts: Sequence[int], origins: Sequence[Origin]) -> None:
        """From document `firsts[i]` on, up to the next, documents come from `origins[i]`."""
        self.firsts, self.origins = firsts, origins

    @classmethod
    def of(cls, bin_file: Path) -> Sources:
        """What is noted beside a `.bin`; raises ValueError, naming the file, where that cannot be read."""
        path = sources_file(bin_file)
        if not path.exists():
            return cls([0], [Origin()])
        firsts, origins, following = [], [], 0
        try:
            for row in json.loads(path.read_bytes()):
                if row["first_document"] != following:
                    raise ValueError(f"a row begins at document {row['first_document']}, not at {following}")
                firsts.append(following)
                origins.append(Origin(row["source"], row["component"]))
                following += row["count"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: damaged ({error}): remove it, or prepare the data again") from None
        return cls(firsts or [0], origins or [Origin()])

    def __getitem__(self, document: int) -> Origin:
        return self.origins[bisect_right(self.firsts, document) - 1]

    def runs(self, first: int, last: int) -> Iterator[tuple[int, int, Origin]]:
        """Documents first .. last - 1 as (first, behind the last, where from) of those that follow each other."""
        ends = [*self.firsts[1:], last]
        for start, end, origin in zip(self.firsts, ends, self.origins, strict=True):
            if max(start, first) < min(end, last):
                yield max(start, first), min(end, last), origin

    def components(self, first: int, last: int) -> list[str | None]:
        """The components of documents first .. last - 1, each once, in order of appearance."""
        return list(dict.fromkeys(origin.component for _, _, origin in self.runs(first, last)))

"""Token files for the tests of the data order: any sizes, every token another number, so that each can be followed."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from neox.data import TokenFile, TokenWriter
from neox.data.split import Documents


def write_pair(prefix: Path, sizes: list[int], start: int = 0) -> Path:
    """A pair whose documents have these sizes; its tokens count up from `start`."""
    with TokenWriter(prefix, "int32") as writer:
        for size in sizes:
            writer.add_document(np.arange(start, start + size))
            start += size
    return prefix


def note(prefix: Path, *rows: tuple[str, str | None, int]) -> None:
    """What `prepare` would leave beside a pair: (source, component, documents) in order, components for all or none."""
    origins = [[source, count] for source, _, count in rows]
    prefix.with_suffix(".json").write_text(json.dumps({"origins": origins}))
    names = list(dict.fromkeys(component for _, component, _ in rows))
    for suffix in (".components.json", ".components.npy"):
        prefix.with_suffix(suffix).unlink(missing_ok=True)
    if names != [None]:
        prefix.with_suffix(".components.json").write_text(json.dumps({"names": names}))
        numbers = [names.index(component) for _, component, count in rows for _ in range(count)]
        np.save(prefix.with_suffix(".components.npy"), np.array(numbers, np.uint16))


def documents(prefix: Path, sizes: list[int], first: int = 0, last: int | None = None) -> Documents:
    return Documents(TokenFile(write_pair(prefix, sizes)), first, last)


def texts(sizes: list[int], start: int = 0) -> list[list[int]]:
    """The documents of such a pair as lists."""
    ends = np.cumsum([0, *sizes]) + start
    return [list(range(a, b)) for a, b in pairwise(ends.tolist())]


sizes_of_documents = st.lists(st.one_of(st.integers(0, 2), st.integers(0, 20)), min_size=1, max_size=15)

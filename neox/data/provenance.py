"""Source and component of the documents of a token file.

The manifest `PREFIX.json` has `"origins": [[path, n], ...]`: n documents from each, in the order of the documents.
`PREFIX.components.npy`: for each document, uint16, the place of its component in the "names" of
`PREFIX.components.json`. A pair that another program wrote has neither: nothing is known of its documents.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from neox.config.structured import read_json
from neox.data.manifest import Manifest, manifest_file
from neox.data.token_file import TokenFile, beside

BLOCK = 1 << 20  # documents looked at at once


class Origin(NamedTuple):
    """Source and component of a document, as far as they are known."""

    source: str | None = None
    component: str | None = None

    @property
    def known(self) -> list[str]:
        """Component and source, as far as they are known."""
        return [text for text in (self.component, self.source) if text]


class Provenance:
    """Source and component of each document of a token file."""

    def __init__(
        self,
        firsts: Sequence[int],
        paths: Sequence[str | None],
        names: Sequence[str],
        numbers: npt.NDArray[np.uint16] | None,
    ) -> None:
        """From document `firsts[i]` on, documents come from `paths[i]`.

        `numbers` are the indices of their components in `names`, None where these are not known.
        """
        self.firsts, self.paths, self.names, self.numbers = firsts, paths, names, numbers

    @classmethod
    def of(cls, file: TokenFile) -> Provenance:
        """Read the files beside a token file.

        Raises ValueError, naming the file, where one does not fit it.
        """
        names, numbers = (beside(file.bin, f".components.{end}") for end in ("json", "npy"))
        counts = [len(file)]
        paths: list[str | None] = [None]
        listed: list[str] = []
        places: npt.NDArray[np.uint16] | None = None
        path = manifest_file(file.bin)
        try:
            manifest = Manifest.read(file.bin)
            if manifest and manifest.origins:
                counts = [int(count) for _, count in manifest.origins]
                paths = [str(source) for source, _ in manifest.origins]
            if sum(counts) != len(file):
                raise ValueError(f"it tells of {sum(counts)} documents, there are {len(file)}")
            path = names
            if names.exists():
                listed = [str(name) for name in read_json(names)["names"]]
                path = numbers
                places = np.load(numbers, mmap_mode="r", allow_pickle=False) if len(file) else None
                if places is not None and places.shape != (len(file),):
                    raise ValueError(f"it tells of {places.shape} documents, there are {len(file)}")
        except (OSError, EOFError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path}: does not fit {file.bin} ({error}): remove it, or prepare again") from None
        return cls(list(accumulate(counts, initial=0))[:-1], paths, listed, places)

    def __getitem__(self, document: int) -> Origin:
        component = None if self.numbers is None else self.names[int(self.numbers[document])]
        return Origin(self.paths[bisect_right(self.firsts, document) - 1], component)

    def components(self, first: int, count: int) -> list[str | None]:
        """Components of the `count` documents from `first` on; None stands for unknown."""
        if self.numbers is None:
            return [None]
        here = np.zeros(len(self.names), bool)
        for own in _blocks(self.numbers[first : first + count]):
            here |= np.bincount(own, minlength=len(here)) > 0
        return [name for name, there in zip(self.names, here, strict=True) if there]

    def tokens(self, sizes: npt.NDArray[np.int32], first: int) -> dict[str | None, int]:
        """Tokens of each component among the documents from `first` on that have these sizes."""
        if self.numbers is None:
            return {None: int(sizes.sum(dtype=np.int64))}
        totals = np.zeros(len(self.names))
        for block, own in zip(_blocks(sizes), _blocks(self.numbers[first : first + len(sizes)]), strict=True):
            # Exact: float64 holds whole numbers up to 2**53.
            totals += np.bincount(own, weights=block, minlength=len(totals))
        here = self.components(first, len(sizes))
        return {name: int(total) for name, total in zip(self.names, totals, strict=True) if name in here}


def _blocks(numbers: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    return (numbers[start : start + BLOCK] for start in range(0, len(numbers), BLOCK))

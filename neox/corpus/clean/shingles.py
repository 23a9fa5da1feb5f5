"""Words of a text without case and punctuation, and hashes of its n-word shingles.

By these numbers near-duplicates and overlaps with evaluation sets are found.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

REMEMBERED = 1 << 20  # words whose hash is kept: most of a language's, in some 100 MB

Numbers = npt.NDArray[np.uint64]


def words(text: str) -> list[str]:
    """Split a text into words as the GPT-3 paper's appendix C does.

    Lower case, cut at white space, punctuation deleted.

    Punctuation is ASCII's (its symbols too) and every character that Unicode calls punctuation; what consists of it
    alone is no word.
    """
    return _plain(text).split()


def placed(text: str) -> Iterator[tuple[str, int, int]]:
    """Yield the same words with their start and end in `text`."""
    for match in re.finditer(r"\S+", text):
        if word := _plain(match[0]):
            yield word, match.start(), match.end()


def shingles(words: list[str], n: int) -> Numbers:
    """Hash each run of `n` words, in order: uint64 [len(words) - n + 1].

    Empty where there are fewer words.

    Equal in every process and on every machine.
    """
    if len(words) < n:
        return np.empty(0, np.uint64)
    hashes = np.fromiter(map(_KNOWN.__getitem__, words), np.uint64, len(words))
    runs = len(words) - n + 1
    return folded([hashes[place : place + runs] for place in range(n)])


def folded(columns: Sequence[Numbers]) -> Numbers:
    """Combine the numbers in each row of `columns` into one 64-bit hash; order counts."""
    total = np.zeros(len(columns[0]), np.uint64)
    for column, factor in zip(columns, _factors(len(columns)), strict=True):
        total += column * factor
    # The low bits of a product know nothing of the high bits of its factors: one round of mixing (MurmurHash3's).
    total ^= total >> np.uint64(33)
    total *= np.uint64(0xFF51AFD7ED558CCD)
    total ^= total >> np.uint64(33)
    return total


class _Known(dict[str, int]):
    """Cache of word hashes, cleared when it is full, so that memory stays bounded."""

    def __missing__(self, word: str) -> int:
        if len(self) >= REMEMBERED:
            self.clear()
        self[word] = number = int.from_bytes(blake2b(word.encode(), digest_size=8).digest(), "little")
        return number


_KNOWN = _Known()


@cache
def _factors(n: int) -> list[np.uint64]:
    """One odd number for each of `n` positions, so that their order counts."""
    digests = (blake2b(f"place {place}".encode(), digest_size=8).digest() for place in range(n))
    return [np.uint64(int.from_bytes(digest, "little") | 1) for digest in digests]


def _plain(text: str) -> str:
    """Lower-case `text` without punctuation; words stay where they were."""
    if not text.isascii():
        text = _FOREIGN.sub(_unpunctuated, text)
    # Bytes are many times faster to delete from than characters.
    return text.encode().translate(None, _ASCII).decode().lower()


_ASCII = string.punctuation.encode()
_FOREIGN = re.compile(r"[^\x00-\x7f]+")


def _unpunctuated(run: re.Match[str]) -> str:
    return "".join(character for character in run[0] if unicodedata.category(character)[0] != "P")

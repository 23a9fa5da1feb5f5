"""Compare tokenizers on given text: compression, coverage, losses."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from neox.corpus.readers import ErrorPolicy, Source, find_sources, read_source
from neox.system.console import aligned, progress_bar
from neox.tokenizer import Tokenizer

BATCH_CHARACTERS = 1 << 20
LONGEST = 8  # tokens shown
SHOWN_CHARACTERS = 40  # of each of them
LEGEND = (
    "x A: tokens, in units of A's. split: share of tokens that are one byte of a longer character. round trip: what "
    "decoding gives back, the documents as they were (exact), composed (NFC), or how many of them changed."
)


@dataclass
class Usage:
    """Statistics of one tokenizer on some text."""

    tokenizer: Tokenizer
    documents: int = 0
    bytes: int = 0  # of UTF-8
    characters: int = 0
    words: int = 0  # separated by white space
    normalised: int = 0  # documents that come back as their NFC and not as they were
    changed: int = 0  # documents that come back neither way
    counts: npt.NDArray[np.int64] = field(init=False)  # [V] occurrences of each id

    def __post_init__(self) -> None:
        self.counts = np.zeros(self.tokenizer.vocab_size, np.int64)

    def add(self, documents: Sequence[str]) -> None:
        """Encode, decode and count `documents`; a long one in pieces, which changes no id."""
        pieces = [(number, piece) for number, text in enumerate(documents) for piece in self.tokenizer.pieces(text)]
        texts = [piece for _, piece in pieces]
        lost: set[int] = set()
        composed: set[int] = set()
        for (number, piece), ids in zip(pieces, self.tokenizer.encode_batch(texts), strict=True):
            self.counts += np.bincount(np.array(ids, np.int64), minlength=len(self.counts))
            back = self.tokenizer.decode(ids)
            if back != piece:
                same = unicodedata.normalize("NFC", back) == unicodedata.normalize("NFC", piece)
                (composed if same else lost).add(number)
        self.documents += len(documents)
        self.bytes += sum(len(text.encode("utf-8")) for text in documents)
        self.characters += sum(map(len, documents))
        self.words += sum(len(text.split()) for text in documents)
        self.changed += len(lost)
        self.normalised += len(composed - lost)

    def __add__(self, other: Usage) -> Usage:
        total = Usage(self.tokenizer)
        for name in ("documents", "bytes", "characters", "words", "normalised", "changed", "counts"):
            setattr(total, name, getattr(self, name) + getattr(other, name))
        return total

    @property
    def tokens(self) -> int:
        """Tokens in all."""
        return int(self.counts.sum())

    @property
    def used(self) -> list[int]:
        """Ids that occur."""
        return [int(id) for id in np.flatnonzero(self.counts)]

    @property
    def split_bytes(self) -> int | None:
        """Tokens that are one byte of a longer character; None where the tokenizer is not byte-level."""
        try:
            raw = {id: self.tokenizer.token_bytes(id) for id in self.used}
        except ValueError:
            return None
        return int(sum(self.counts[id] for id, token in raw.items() if len(token) == 1 and token[0] >= 0x80))

    @property
    def longest(self) -> list[tuple[str, int]]:
        """Longest tokens that occur and their counts, without special tokens and white space."""
        specials = set(self.tokenizer.special_tokens.values())
        texts = {id: self.tokenizer.decode([id]) for id in self.used if id not in specials}
        order = sorted((id for id in texts if texts[id].strip()), key=lambda id: (-len(texts[id].encode("utf-8")), id))
        return [(texts[id], int(self.counts[id])) for id in order[:LONGEST]]

    @property
    def round_trip(self) -> str:
        """Result of encoding and decoding, in a word or two."""
        if self.changed:
            return f"{self.changed:,} changed"
        return "NFC" if self.normalised else "exact"


def tokenizer_report(
    tokenizers: Sequence[str | Path], sources: Sequence[str | Path], text_key: str = "text", progress: bool = True
) -> str:
    """Tables that compare tokenizers on each source and on all sources.

    A tokenizer is a tokenizer.json, or a folder with one.

    The first tokenizer is the one that the others are compared with. Raises FileNotFoundError and ValueError on what
    cannot be read, and ValueError where there is no tokenizer, no source or no text.
    """
    if not tokenizers:
        raise ValueError("no tokenizer given: name a tokenizer.json")
    if not sources:
        raise ValueError("no text given: a tokenizer is judged by text, name a file of it")
    loaded = [Tokenizer.from_file(path) for path in tokenizers]
    texts = find_sources(sources, text_key)
    found: list[list[Usage]] = []
    with progress_bar("bytes", show=progress) as bar:
        task = bar.add_task("tokenizer", total=sum(source.size or 0 for source in texts) or None)
        for source in texts:
            found.append([Usage(tokenizer) for tokenizer in loaded])
            for batch, taken in _batches(source, text_key):
                for usage in found[-1]:
                    usage.add(batch)
                bar.advance(task, taken)
    names = [str(source) for source in sources]
    total = [sum(column[1:], start=column[0]) for column in zip(*found, strict=True)]
    if not total[0].documents:
        raise ValueError(f"no text in {', '.join(names)}: every document is empty")
    if len(sources) > 1:
        names, found = [*names, "all"], [*found, total]
    return _render([str(tokenizer) for tokenizer in tokenizers], names, found, total)


def _batches(source: Source, text_key: str) -> Iterator[tuple[list[str], float]]:
    batch: list[str] = []
    size, taken = 0, 0.0
    for document in read_source(source, text_key, ErrorPolicy("fail")):
        text = document.text
        taken += document.taken
        if text:
            batch.append(text)
            size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch, taken
            batch, size, taken = [], 0, 0.0
    if batch:
        yield batch, taken


def _render(tokenizers: list[str], sources: list[str], found: list[list[Usage]], total: list[Usage]) -> str:
    letters = [chr(ord("A") + number) for number in range(len(tokenizers))]
    kinds = [["", "tokenizer", "tokens", "padded to 128", "special", "sha256"]]
    for letter, name, usage in zip(letters, tokenizers, total, strict=True):
        it = usage.tokenizer
        sizes = [f"{it.vocab_size:,}", f"{it.padded_vocab_size():,}", f"{len(it.special_tokens)}"]
        kinds.append([letter, name, *sizes, it.sha256[:16]])
    rows = [["source", "", "documents", "bytes", "tokens", "x A", "bytes/token", "characters/token", "tokens/word"]]
    rows[0] += ["split", "vocabulary used", "round trip"]
    for source, usages in zip(sources, found, strict=True):
        for letter, usage in zip(letters, usages, strict=True):
            n, split = usage.tokens, usage.split_bytes
            sizes = [f"{usage.documents:,}", f"{usage.bytes:,}", f"{n:,}", _ratio(n, usages[0].tokens)]
            rates = [_ratio(usage.bytes, n), _ratio(usage.characters, n), _ratio(n, usage.words)]
            shares = ["-" if split is None or not n else f"{split / n:.1%}"]
            shares += [f"{len(usage.used) / usage.tokenizer.vocab_size:.1%}"]
            rows.append([source if letter == "A" else "", letter, *sizes, *rates, *shares, usage.round_trip])
    lines = [*aligned(kinds, "<<>>>>"), "", *aligned(rows, "<<>>>>>>>>>>"), "", *textwrap.wrap(LEGEND, 100), ""]
    for letter, usage in zip(letters, total, strict=True):
        longest = ", ".join(f"{_shown(text)} {count:,}x" for text, count in usage.longest)
        lines.append(f"{letter}, longest tokens in the text: {longest}")
        for spelling, id in usage.tokenizer.special_tokens.items():
            if count := int(usage.counts[id]):
                lines.append(
                    f"{letter}, special tokens in the text: {spelling} {count:,}x, encoded as token {id}; "
                    "specials=False would encode the characters"
                )
    return "\n".join(lines)


def _ratio(part: float, whole: float) -> str:
    return f"{part / whole:.3f}" if whole else "-"


def _shown(text: str) -> str:
    shown = repr(text)
    return shown if len(shown) <= SHOWN_CHARACTERS else f"{shown[: SHOWN_CHARACTERS - 4]}...{shown[-1]}"

"""Fast encoding with the reference's ids: GigaToken where it is installed and agrees.

The reference is the `tokenizers` library. GigaToken is compared with it on hard texts before the work begins, and on
samples of the work itself; the first difference ends the work. Where it is known to differ it is not asked: its
Unicode is newer than the reference's, so that it composes and orders some rare marks otherwise.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from neox.system.console import one_line
from neox.system.optional import optional
from neox.tokenizer import PIECE_CHARACTERS, Tokenizer

Backend = Literal["auto", "gigatoken", "tokenizers"]
Ids = npt.NDArray[Any]

SAMPLED = 512  # one document of so many is encoded by the reference too: 0.2 % of them, and the first
SAMPLE_CHARACTERS = 1 << 14  # of a longer one, this much
HARD = (
    "The cat's 3 mats, it'll don't WE'RE 1234567 ½ ² Ⅷ",
    "  two   three\n\n\n  lines \t\ttabs\r\n\x0b\x0c\x00\x7f\x85\xa0\u2003\u3000 \u200b",
    "e\u0301 A\u030a\u0323 \u212b \u1e9b\u0323 \u2126\u212a \u0958 \ufb2c \u0344 \u2adc \u1100\u1161\u11a8",
    "\uac00\u11a8 \u0041\u030a\u0301",
    "Ελληνικά кириллица עברית العربية हिन्दी ไทย 中文字 日本語カ゛ 한국어",
    "\U0001f642\U0001f469\u200d\U0001f469\u200d\U0001f467\U0001f3fd \U0001f1e9\U0001f1ea \ufeff\ufffd\U0010fffd",
    "x" * 300 + " " * 70 + "\n" * 40 + "=" * 80 + "0" * 50,
)


class EncodedChunk(NamedTuple):
    """Ids of a text, or of one chunk of a long text."""

    ids: Ids
    characters: int
    """Number of characters of the text that they stand for."""
    last: bool
    """True for the last chunk of a text."""


class Encoder:
    """Encoder of texts by the fastest library that gives the reference's ids.

    `backend` names the library, `why` the reason for it.
    """

    def __init__(self, tokenizer: Tokenizer, backend: Backend = "auto", specials: bool = True) -> None:
        """With `backend="auto"` GigaToken where it is installed, reads this tokenizer and agrees on hard texts.

        `specials=False` encodes the spelling of a special token as text.
        Raises ValueError where "gigatoken" is asked for and one of those fails.
        """
        self.tokenizer, self.specials = tokenizer, specials
        self.backend: Literal["gigatoken", "tokenizers"] = "tokenizers"
        self._seen = 0
        self._fast: Callable[[bytes], Ids] | None = None
        self._odd: re.Pattern[str] | None = None
        if backend == "tokenizers":
            self.why = "data.backend"
            return
        try:
            fast, decode = _gigatoken(tokenizer)
            self._spellings = () if specials else tuple(tokenizer.special_tokens)
            form = tokenizer.normalizer
            if form not in ODD:  # the same for all tokenizers of this form
                composed = decode(fast(_rare_text().encode("utf-8"))).decode("utf-8")
                ODD[form] = _odd_characters(tokenizer.normalized(_rare_text()), composed)
            self._odd = ODD[form]
            for text in filter(self._asks, self._hard()):
                if not self._agree(text, fast):
                    raise ValueError(f"it gives other ids than `tokenizers` for {text[:60]!r}")
            self._fast, self.backend, self.why = fast, "gigatoken", "agrees with `tokenizers`"
        except ValueError as error:
            self.why = str(error)
            if backend == "gigatoken":
                raise ValueError(f"data.backend=gigatoken: {error}; take data.backend=tokenizers") from None

    def encode(self, texts: Sequence[str]) -> Iterator[EncodedChunk]:
        """Encode each text in turn, a long one in several chunks, so that memory stays small.

        Raises Difference where the reference, asked about a sample, gives other ids; ValueError on an id outside of
        the vocabulary.
        """
        if self._fast is None and sum(map(len, texts)) <= PIECE_CHARACTERS:
            for text, ids in zip(texts, self.tokenizer.encode_batch(texts, self.specials), strict=True):
                yield self._chunk(ids, text, True)
            return
        for number, text in enumerate(texts):
            if self._fast is None or not self._asks(text):
                left = len(text)
                pieces = self.tokenizer.pieces(text)
                for piece, ids in zip(pieces, self.tokenizer.encode_pieces(text, self.specials), strict=True):
                    left -= len(piece)
                    yield self._chunk(ids, piece, not left)
                continue
            if self._seen % SAMPLED == 0 and not self._agree(text[:SAMPLE_CHARACTERS], self._fast):
                raise Difference(number, text[:SAMPLE_CHARACTERS])
            self._seen += 1
            left = len(text)
            for piece in self.tokenizer.pieces(text):
                left -= len(piece)
                yield self._chunk(self._fast(piece.encode("utf-8")), piece, not left)

    def _asks(self, text: str) -> bool:
        """Tell whether the fast library may encode this text."""
        if any(spelling in text for spelling in self._spellings):  # which it would take for the token
            return False
        return text.isascii() or not self._odd or not self._odd.search(text)

    def _hard(self) -> Iterator[str]:
        yield from HARD
        for spelling in self.tokenizer.special_tokens:
            yield f"a{spelling}{spelling[:-1]} {spelling}\u0338b\n{spelling.upper()}{spelling[1:]}"
        letters = [chr(code) for code in (*range(0x250), *range(0x300, 0x370))]
        yield "".join(letters)
        yield " ".join(letters)

    def _agree(self, text: str, fast: Callable[[bytes], Ids]) -> bool:
        return self.tokenizer.encode(text, self.specials) == fast(text.encode("utf-8")).tolist()

    def _chunk(self, found: Ids | list[int], piece: str, last: bool) -> EncodedChunk:
        ids, size = np.asarray(found, dtype=np.int64), self.tokenizer.vocab_size
        if ids.size and not (ids.min() >= 0 and ids.max() < size):
            wrong = ids[(ids < 0) | (ids >= size)][0]
            raise ValueError(f"token id {wrong} is outside of the tokenizer's vocabulary (0 to {size - 1})")
        return EncodedChunk(ids, len(piece), last)


class Difference(Exception):
    """Disagreement of the two libraries about text number `document` of a batch.

    `text` is the part of it that was compared.
    """

    def __init__(self, document: int, text: str) -> None:
        super().__init__(f"gigatoken and tokenizers give different ids for a text that begins {text[:60]!r}")
        self.document, self.text = document, text


def _gigatoken(tokenizer: Tokenizer) -> tuple[Callable[[bytes], Ids], Callable[[Ids], bytes]]:
    """GigaToken's `encode` and `decode` for a tokenizer."""
    gigatoken = optional("gigatoken", "fast encoding", "data")
    try:
        fast = gigatoken.Tokenizer.from_json(tokenizer.to_json())
    except Exception as error:  # the library's own, as the file goes
        raise ValueError(f"it cannot read this tokenizer ({one_line(error)})") from None
    return fast.encode, fast.decode


ODD: dict[str, re.Pattern[str] | None] = {}


@cache
def _rare_text() -> str:
    """Lines that show how a library normalizes rare marks, and decomposed characters.

    Each mark, and each character that this Python's Unicode does not know, stands between marks of the highest and the
    lowest class: there it shows whether it moves, blocks a composition, or is a letter.
    """
    tried = [chr(code) for code in (*range(0x300, 0xD800), *range(0xE000, 0x1F000))]
    marks = [char for char in tried if unicodedata.category(char)[0] == "M" or unicodedata.category(char) == "Cn"]
    pairs = [unicodedata.normalize("NFD", char) for char in tried if unicodedata.decomposition(char)]
    return "\n".join([f"e\u0301{mark}\u0334" for mark in marks] + pairs)


def _odd_characters(ours: str, theirs: str) -> re.Pattern[str] | None:
    """Pattern of the characters that the two libraries normalize differently; None without any.

    From what each made of `_rare_text`. Beyond the first plane whole blocks of 4096 are taken, rare scripts all of
    them, since pairs that compose there may be unknown here.
    """
    lines = [text.split("\n") for text in (_rare_text(), ours, theirs)]
    if len(lines[1]) != len(lines[2]):
        raise ValueError("it gives other ids than `tokenizers` for rare marks")
    odd = [text for text, one, other in zip(*lines, strict=True) if one != other]
    found = {char for text in odd for char in (text[2:-1] if text.startswith("e\u0301") else text)}
    if not found:
        return None
    blocks = sorted({ord(char) >> 12 for char in found if ord(char) > 0xFFFF})
    ranges = [f"{chr(block << 12)}-{chr((block << 12) + 0xFFF)}" for block in blocks]
    return re.compile("[" + "".join(sorted(char for char in found if ord(char) <= 0xFFFF)) + "".join(ranges) + "]")

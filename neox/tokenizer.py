"""Text to token ids and back: reads a tokenizer.json, trains a 20B-style byte-level BPE, decodes a stream.

Literal `<|endoftext|>` (or any other special token's spelling) in a text becomes that token's id, as in the
GPT-NeoX-20B tokenizer; `specials=False` encodes it as the ordinary text that it is, so that no text can end a document.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from neox.config.structured import read_small
from neox.system.console import progress_bar
from neox.system.files import write_atomic

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"
LONGEST_SPACE_RUN = 24
# One Encoding costs about 130 bytes of memory per character, so a text is encoded in pieces of about this many.
PIECE_CHARACTERS = 1 << 20
# Between a single line break and the next line's first character byte-level BPE always splits, and NFC never joins:
# cutting there leaves every id as it was. Two line breaks in a row would not do: they may form one token.
CUT = re.compile(r"(?<=[!-~]\n)(?=[!-~])")
# GPT-2's regex never keeps a letter or digit and such borders in one piece, so no merge can spell a special token; and
# ASCII is the same in every normal form, so a decoded one is what was given.
SPECIAL = re.compile(r"[!-/:-@\[-`{-~][!-~]*[A-Za-z0-9][!-~]*[!-/:-@\[-`{-~]")


class Tokenizer:
    """A tokenizer.json: `encode` text to ids, `decode` ids to text.

    Raises ValueError where the text is no tokenizer.json that the `tokenizers` library can read.
    """

    def __init__(self, text: str, source: str = "tokenizer") -> None:
        try:
            self._inner = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{source}: not a tokenizer.json that can be read ({error})") from error
        self._text = text
        # A file saved while truncating would otherwise cut training documents short without a word.
        self._inner.no_truncation()
        self._inner.no_padding()
        vocabulary = self._inner.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise ValueError(f"{source}: the vocabulary is empty")
        self.vocab_size: int = max(vocabulary.values()) + 1
        """Ids in use: the highest id + 1, added tokens included."""
        self.eod_id: int | None = vocabulary.get(END_OF_TEXT)
        """Id of `<|endoftext|>`, which ends a document; None where the file has no such token."""

    @classmethod
    def from_str(cls, text: str) -> Tokenizer:
        """Build a tokenizer from the content of a tokenizer.json."""
        return cls(text)

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Read a tokenizer.json, or the one in a folder.

        Raises FileNotFoundError where there is none, ValueError where it cannot be read as one.
        """
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such tokenizer; give a tokenizer.json or a folder that holds one")
        try:
            text = read_small(file).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: not a tokenizer.json (no UTF-8 at byte {error.start})") from error
        return cls(text, str(file))

    def save(self, path: str | Path) -> None:
        """Write to `path`, byte for byte as read, atomically; in a folder the name is `tokenizer.json`."""
        path = Path(path)
        write_atomic(path / "tokenizer.json" if path.is_dir() else path, self._text.encode("utf-8"))

    def to_json(self) -> str:
        """A tokenizer.json that encodes as this one does, for other libraries: without truncation and padding."""
        return str(self._inner.to_str())

    @property
    def normalizer(self) -> str:
        """Normalizer of the text before encoding, as the library prints it: `NFC()`, `None`, ..."""
        return str(self._inner.normalizer)

    def normalized(self, text: str) -> str:
        """Normalize `text`: the form that is encoded and that decoding returns (special tokens aside)."""
        return str(self._inner.normalizer.normalize_str(text)) if self._inner.normalizer else text

    @cached_property
    def sha256(self) -> str:
        """Hex digest of the tokenizer.json, as `sha256sum tokenizer.json` prints it."""
        return hashlib.sha256(self._text.encode("utf-8")).hexdigest()

    def padded_vocab_size(self, multiple: int = 128) -> int:
        """`vocab_size` rounded up to `multiple` (gpt-neox pads to 128 x tensor-parallel ranks)."""
        if multiple < 1:
            raise ValueError(f"padded_vocab_size: multiple must be at least 1, not {multiple}")
        return -(-self.vocab_size // multiple) * multiple

    def encode(self, text: str, specials: bool = True) -> list[int]:
        """Encode one text to ids; `specials=False` encodes special tokens' spelling as ordinary text, not as its id.

        Raises ValueError on a lone surrogate, which is no character and has no UTF-8 form, and with `specials=False`
        where the tokenizer has no other ids for a special token's spelling.
        """
        return self.encode_batch([text], specials)[0]

    def encode_batch(self, texts: Sequence[str], specials: bool = True) -> list[list[int]]:
        """Encode many texts on all cores, to the same ids as each text alone. Raises ValueError as `encode` does."""
        short = [number for number, text in enumerate(texts) if not self._long(text)]
        result: list[list[int]] = [[] for _ in texts]
        for number, ids in zip(short, self._encode([texts[number] for number in short], specials), strict=True):
            result[number] = ids
        for number in set(range(len(texts))) - set(short):
            result[number] = list(chain.from_iterable(self.encode_pieces(texts[number], specials)))
        return result

    def encode_pieces(self, text: str, specials: bool = True) -> Iterator[list[int]]:
        """Encode a text of any length in pieces on all cores, with little memory; yields ids of each piece."""
        pieces = self.pieces(text)
        while group := list(islice(pieces, 4)):
            yield from self._encode(group, specials)

    def _encode(self, texts: list[str], specials: bool) -> list[list[int]]:
        inner = self._inner if specials else self._blind
        try:
            return [encoding.ids for encoding in inner.encode_batch_fast(texts, add_special_tokens=False)]
        except TypeError as error:
            for text in texts:
                if not isinstance(text, str):
                    raise TypeError(f"encode takes str, not {type(text).__name__}") from error
                check_characters(text)
            raise

    @cached_property
    def _blind(self) -> tokenizers.Tokenizer:
        # Not a switch on the one object: another thread may be encoding with it.
        blind = tokenizers.Tokenizer.from_str(self._inner.to_str())
        blind.encode_special_tokens = True
        for spelling, id in self.special_tokens.items():
            if id in blind.encode(spelling, add_special_tokens=False).ids:
                raise ValueError(
                    f"this tokenizer has no ids for {spelling!r} but the special token's: it cannot be encoded as text"
                )
        return blind

    def _long(self, text: str, start: int = 0) -> bool:
        return isinstance(text, str) and len(text) - start > PIECE_CHARACTERS and self._cuttable

    def pieces(self, text: str) -> Iterator[str]:
        """Cut a long text where no token and no normalisation crosses, so that each piece encodes alone."""
        start = 0
        while self._long(text, start) and (found := CUT.search(text, start + PIECE_CHARACTERS)):
            yield text[start : found.start()]
            start = found.start()
        yield text[start:]

    @cached_property
    def _cuttable(self) -> bool:
        file = json.loads(self._inner.to_str())
        pre = file["pre_tokenizer"] or {}
        steps = pre.get("pretokenizers", [pre])
        # To set digits apart first only adds boundaries: a line break and what follows it stay two pieces.
        if len(steps) == 2 and steps[0]["type"] == "Digits":
            pre = steps[1]
        return (
            pre.get("type") == "ByteLevel"
            and not pre.get("add_prefix_space")
            and pre.get("use_regex", True)
            and (file["normalizer"] or {"type": "NFC"})["type"] == "NFC"
            and not any("\n" in t["content"] or t["lstrip"] or t["rstrip"] for t in file["added_tokens"])
        )

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Text of `ids`; bytes that form no UTF-8 become U+FFFD. `skip_special` leaves special tokens out.

        Raises ValueError naming the first id that stands for no token, such as a padding row of a model.
        """
        ids = [int(id) for id in ids]
        for id in ids:
            self._check(id)
        text: str = self._inner.decode(ids, skip_special_tokens=skip_special)
        return text

    def _check(self, id: int) -> None:
        if not 0 <= id < self.vocab_size or self._tokens[id] is None:
            raise ValueError(f"token id {id} stands for no token: this tokenizer's ids are 0 to {self.vocab_size - 1}")

    @cached_property
    def _tokens(self) -> list[str | None]:
        # Not from the vocabulary: the library spells an added token there as it was given, here as it is decoded.
        return [self._inner.id_to_token(id) for id in range(self.vocab_size)]

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Spelling and id of each special token, in the order of the ids."""
        return {t.content: id for id, t in sorted(self._inner.get_added_tokens_decoder().items()) if t.special}

    @cached_property
    def _special(self) -> frozenset[int]:
        return frozenset(self.special_tokens.values())

    def token_bytes(self, id: int, skip_special: bool = False) -> bytes:
        """Bytes that token `id` adds to a text, possibly a part of a character.

        Raises ValueError on an id that stands for no token, and where the tokenizer is not byte-level.
        """
        self._check(id)
        if skip_special and id in self._special:
            return b""
        return self.bytes_of_tokens[id]

    @cached_property
    def bytes_of_tokens(self) -> list[bytes]:
        """Bytes that each id adds to a text, empty for unused ids. Raises ValueError as `token_bytes`."""
        if not isinstance(self._inner.decoder, decoders.ByteLevel):
            raise ValueError("the tokenizer is not byte-level (its decoder is not ByteLevel): it cannot be streamed")
        # A token with a character outside the byte alphabet, such as an added run of spaces, stands for itself.
        return [
            bytes(BYTE_OF[c] for c in token) if all(c in BYTE_OF for c in token) else token.encode("utf-8")
            for token in (token or "" for token in self._tokens)
        ]


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's map of bytes to visible characters, reversed: visible Latin-1 is itself, the rest follows from 256."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in set(visible)]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


BYTE_OF = _byte_alphabet()


def check_characters(text: str) -> None:
    """Raise ValueError where `text` holds a lone surrogate, naming the place."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {error.start} of the text is a lone surrogate (U+{ord(text[error.start]):04X}): "
            "it has no UTF-8 form; remove it"
        ) from None


class StreamDecoder:
    """Decode ids one by one into whole characters; the joined results equal `tokenizer.decode(ids)`.

    A character whose last bytes are still to come is held back, never shown as U+FFFD. Constant time per token.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """The text that token `id` completes, often one word, sometimes nothing. Raises ValueError on an unknown id."""
        return self._decoder.decode(self._tokenizer.token_bytes(id, self._skip_special))

    def finish(self) -> str:
        """Flush: return U+FFFD for an incomplete character, else an empty text, and start a new text."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    progress: bool = True,
    *,
    special_tokens: Sequence[str] = (),
    space_runs: int = LONGEST_SPACE_RUN,
    digits: Literal["joined", "single"] = "joined",
    normalizer: Literal["nfc", "none"] = "nfc",
) -> Tokenizer:
    """Train a byte-level BPE, by default by the recipe of GPT-NeoX-20B's; the same texts give the same file.

    No prefix space, `<|endoftext|>` = 0, `<|padding|>` = 1, then `special_tokens`, all 256 bytes, merges, and at the
    end runs of `space_runs`, .. 3, 2 spaces: `vocab_size` ids in all, fewer where the texts are too small for as many
    merges. `digits="single"` lets no token hold two digits (characters of Unicode's category N);
    `normalizer="none"` gives every text back as it was, where NFC gives it back composed.
    Raises ValueError on a `vocab_size` that cannot hold the bytes, on a special token that ordinary text could be
    mistaken for, on a lone surrogate, and where there is no text.
    """
    specials = _special_tokens(special_tokens)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    runs = [" " * length for length in range(space_runs, 1, -1)]
    smallest = len(specials) + len(alphabet) + len(runs)
    if vocab_size < smallest:
        raise ValueError(
            f"tokenizer.vocab_size = {vocab_size} is too small: 256 bytes, {len(specials)} special tokens and "
            f"{len(runs)} runs of spaces need at least {smallest}"
        )
    byte_level: Any = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True)
    if digits == "single":
        byte_level = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    inner = tokenizers.Tokenizer(models.BPE())
    if normalizer == "nfc":
        inner.normalizer = normalizers.NFC()
    inner.pre_tokenizer = byte_level
    inner.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=True)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(runs),
        initial_alphabet=alphabet,
        special_tokens=specials,
        show_progress=False,
    )
    seen = 0
    failure: ValueError | None = None

    with progress_bar("bytes", show=progress) as bar:
        task = bar.add_task("tokenizer: counting words", total=None)

        def counted() -> Iterator[str]:
            nonlocal seen, failure
            try:
                for text in texts:
                    check_characters(text)
                    size = len(text.encode("utf-8"))
                    seen += size
                    bar.advance(task, size)
                    yield text
            except ValueError as error:
                failure = error
                raise
            bar.update(task, description="tokenizer: learning merges")

        try:
            inner.train_from_iterator(counted(), trainer)
        except Exception:
            if failure is not None:  # the library wraps what the iterator raises
                raise failure from None
            raise
        bar.update(task, total=seen, description="tokenizer: trained")
    if not seen:
        raise ValueError("no text to train a tokenizer on: every document is empty")
    inner.add_tokens([tokenizers.AddedToken(run, normalized=True, special=False) for run in runs])
    return Tokenizer.from_str(inner.to_str(pretty=True))


def _special_tokens(extra: Sequence[str]) -> list[str]:
    """Special tokens: GPT-NeoX's two, then `extra`. Raises ValueError on duplicates and on plausible ordinary text."""
    specials = [END_OF_TEXT, PADDING, *extra]
    for number, token in enumerate(specials):
        if token in specials[:number]:
            raise ValueError(f"tokenizer.special_tokens: {token!r} is there already; name each one once")
        if not SPECIAL.fullmatch(token):
            raise ValueError(
                f"tokenizer.special_tokens: {token!r} could be mistaken for text; write it as <|name|>: ASCII without "
                "spaces, punctuation at both ends, a letter or digit between"
            )
    return specials

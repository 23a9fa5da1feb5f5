"""Corpus files to one `.bin`/`.idx` pair: read, encode, write, with a manifest that says what went in."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from neox.data.mmap import TokenWriter, pair, token_dtype
from neox.data.readers import Faults, OnError, Skipped, Source, find_sources, read_source
from neox.files import byte_progress
from neox.tokenizer import END_OF_TEXT, PIECE_CHARACTERS, Tokenizer

BATCH_CHARACTERS = 1 << 20
BATCH_DOCUMENTS = 4096


@dataclass(frozen=True)
class PrepareReport:
    """What `prepare` did."""

    prefix: str
    """Output prefix: `<prefix>.bin`, `.idx` and `.json` were written."""
    documents: int
    bytes: int
    """UTF-8 bytes of the documents' text."""
    tokens: int
    """Tokens written, end-of-document tokens included."""
    empty: int
    """Documents left out because they hold no text."""
    skipped: dict[str, Skipped]
    """What could not be read and was left out, by reason; nothing unless `on_error` is "skip"."""
    seconds: float

    def left_out(self) -> list[str]:
        """Lines for a user: the documents that were left out, by reason, with the first places; none where none was."""
        lines = [f"left out: {self.empty:,} empty"] if self.empty else []
        for reason, skipped in self.skipped.items():
            lines += [f"left out: {skipped.documents:,} {reason}", *(f"  {place}" for place in skipped.first)]
        return lines


def prepare(
    sources: str | Path | Sequence[str | Path],
    out_prefix: str | Path,
    tokenizer: Tokenizer,
    text_key: str = "text",
    append_eod: bool = True,
    progress: bool = True,
    on_error: OnError = "fail",
    special_in_text: Literal["token", "text"] = "token",
) -> PrepareReport:
    """Encode the documents of `sources`, in order, into `<out_prefix>.bin`/`.idx`, plus `<out_prefix>.json`.

    A source is a file, a folder, a saved data set or one of the hub: see `find_sources`. What cannot be read raises,
    or with `on_error="skip"` is left out, counted by reason in the report and the manifest, with the first places.

    With `append_eod` each document ends in `<|endoftext|>`. Where its text spells out a special token, that becomes the
    token, or with `special_in_text="text"` text like any other. All files appear at once, at the end, or none does;
    files of an earlier run stay whole until then.
    Raises FileNotFoundError or ValueError (file, line, what to do) on input that cannot be read, most of it before
    anything is read, and on a corpus without text; OSError naming the file when it cannot be read or written.
    """
    eod = tokenizer.eod_id if append_eod else None
    if append_eod and eod is None:
        raise ValueError(f"the tokenizer has no {END_OF_TEXT} token to end documents with; set data.append_eod=false")
    _check_manifest(pair(out_prefix)[0].with_suffix(".json"))
    # All of them before the first is read: the tenth file's typing error should not cost an hour.
    found, faults = find_sources(sources, text_key, on_error), Faults(on_error)
    started = time.monotonic()
    sizes = [source.size for source in found if source.size is not None]
    total = sum(sizes) if len(sizes) == len(found) else None
    text_bytes = empty = 0
    specials = special_in_text == "token"
    end = np.array([] if eod is None else [eod], dtype=np.int32)
    with (
        TokenWriter(out_prefix, token_dtype(tokenizer.vocab_size)) as writer,
        byte_progress(progress) as bar,
    ):
        task = bar.add_task("prepare", total=total)
        for batch, count in _batches(found, text_key, faults):
            texts = [text for text in batch if text]
            text_bytes += sum(len(text.encode("utf-8")) for text in texts)
            empty += len(batch) - len(texts)
            for ids in _encode(tokenizer, texts, specials, count, lambda done: bar.advance(task, done)):
                writer.add_document(np.concatenate([ids, end]))
        if total is not None:
            bar.update(task, completed=total)
        if not writer.documents:
            raise ValueError(_no_text(found, faults))
        writer.manifest = {
            "format": 1,
            "sources": [source.noted for source in found],
            "tokenizer_sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "text_key": text_key,
            "append_eod": append_eod,
            "special_in_text": special_in_text,
            "dtype": writer.dtype.name,
            "documents": writer.documents,
            "bytes": text_bytes,
            "tokens": writer.tokens,
            "empty": empty,
            "skipped": {reason: asdict(skipped) for reason, skipped in faults.skipped.items()},
        }
    prefix = str(pair(out_prefix)[0].with_suffix(""))
    seconds = time.monotonic() - started
    return PrepareReport(prefix, writer.documents, text_bytes, writer.tokens, empty, faults.skipped, seconds)


def _no_text(sources: Sequence[Source], faults: Faults) -> str:
    names = ", ".join(source.name for source in sources[:8]) + (", ..." if len(sources) > 8 else "")
    if not faults.skipped:
        return f"no text in {names}: every document is empty"
    reasons = "; ".join(f"{found.documents:,} {why}, first {found.first[0]}" for why, found in faults.skipped.items())
    return f"no text in {names}: every document is empty or was left out ({reasons})"


def _batches(sources: Sequence[Source], text_key: str, faults: Faults) -> Iterator[tuple[list[str], float]]:
    """Documents in groups large enough for all cores and small enough for memory, with the file bytes they took.

    A document longer than a group comes alone.
    """
    batch: list[str] = []
    characters, taken = 0, 0.0
    for source in sources:
        for text, count, _ in read_source(source, text_key, faults):
            if batch and (characters + len(text) > BATCH_CHARACTERS or len(batch) == BATCH_DOCUMENTS):
                yield batch, taken
                batch, characters, taken = [], 0, 0.0
            batch.append(text)
            characters += len(text)
            taken += count
    if batch:
        yield batch, taken


def _encode(
    tokenizer: Tokenizer, texts: list[str], specials: bool, count: float, advance: Callable[[float], object]
) -> Iterator[npt.NDArray[np.int32]]:
    """Ids of each text; `advance` gets `count` in all, in shares as the work is done."""
    if len(texts) != 1:
        encoded = tokenizer.encode_batch(texts, specials)
        advance(count)
        for ids in encoded:
            yield _array(ids, tokenizer.vocab_size)
        return
    pieces = []
    for ids in tokenizer.encode_pieces(texts[0], specials):
        pieces.append(_array(ids, tokenizer.vocab_size))
        advance(count * min(1.0, PIECE_CHARACTERS / len(texts[0])))
    yield np.concatenate(pieces)


def _array(ids: list[int], vocab_size: int) -> npt.NDArray[np.int32]:
    array = np.array(ids, dtype=np.int32)
    if array.size and not (array.min() >= 0 and array.max() < vocab_size):
        wrong = array[(array < 0) | (array >= vocab_size)][0]
        raise ValueError(f"token id {wrong} is outside of the tokenizer's vocabulary (0 to {vocab_size - 1})")
    return array


def _check_manifest(path: Path) -> None:
    """Refuse an output name whose `.json` is something else, a corpus perhaps: it would be overwritten."""
    if not path.exists():
        return
    try:
        known = "tokenizer_sha256" in json.loads(path.read_bytes())
    except (ValueError, TypeError):
        known = False
    if not known:
        raise ValueError(f"{path}: exists and is no manifest of prepare; choose another output name or move it away")

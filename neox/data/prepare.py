"""Corpus files to one `.bin`/`.idx` pair: read, encode, write, with a manifest that says what went in."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from neox.data.mmap import TokenWriter, pair, token_dtype
from neox.data.readers import read_records
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
    seconds: float


def prepare(
    sources: Sequence[str | Path],
    out_prefix: str | Path,
    tokenizer: Tokenizer,
    text_key: str = "text",
    append_eod: bool = True,
    progress: bool = True,
) -> PrepareReport:
    """Encode the documents of `sources`, in order, into `<out_prefix>.bin`/`.idx`, plus `<out_prefix>.json`.

    With `append_eod` each document ends in `<|endoftext|>`. All files appear at once, at the end, or none does; files
    of an earlier run stay whole until then.
    Raises FileNotFoundError or ValueError (file, line, what to do) on input that cannot be read and on a corpus
    without text; OSError naming the file when it cannot be written.
    """
    paths = [Path(source) for source in ([sources] if isinstance(sources, str | Path) else sources)]
    if not paths:
        raise ValueError("prepare: no input files given")
    eod = tokenizer.eod_id if append_eod else None
    if append_eod and eod is None:
        raise ValueError(f"the tokenizer has no {END_OF_TEXT} token to end documents with; set data.append_eod=false")
    _check_manifest(pair(out_prefix)[0].with_suffix(".json"))
    # Read nothing before every source is known to exist: the tenth file's typing error should not cost an hour.
    streams = [read_records(path, text_key) for path in paths]
    del streams
    started = time.monotonic()
    file_bytes = {str(path): path.stat().st_size for path in paths}
    text_bytes = empty = 0
    end = np.array([] if eod is None else [eod], dtype=np.int32)
    with (
        TokenWriter(out_prefix, token_dtype(tokenizer.vocab_size)) as writer,
        byte_progress(progress) as bar,
    ):
        task = bar.add_task("prepare", total=sum(file_bytes.values()))
        for batch, count in _batches(paths, text_key):
            texts = [text for text in batch if text]
            text_bytes += sum(len(text.encode("utf-8")) for text in texts)
            empty += len(batch) - len(texts)
            for ids in _encode(tokenizer, texts, count, lambda done: bar.advance(task, done)):
                writer.add_document(np.concatenate([ids, end]))
        bar.update(task, completed=sum(file_bytes.values()))
        if not writer.documents:
            raise ValueError(f"no text in {', '.join(map(str, paths))}: every document is empty")
        writer.manifest = {
            "format": 1,
            "sources": [{"path": path, "bytes": size} for path, size in file_bytes.items()],
            "tokenizer_sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "text_key": text_key,
            "append_eod": append_eod,
            "dtype": writer.dtype.name,
            "documents": writer.documents,
            "bytes": text_bytes,
            "tokens": writer.tokens,
        }
    prefix = str(pair(out_prefix)[0].with_suffix(""))
    return PrepareReport(prefix, writer.documents, text_bytes, writer.tokens, empty, time.monotonic() - started)


def _batches(paths: Sequence[Path], text_key: str) -> Iterator[tuple[list[str], int]]:
    """Documents in groups large enough for all cores and small enough for memory, with the file bytes they took.

    A document longer than a group comes alone.
    """
    batch: list[str] = []
    characters = taken = 0
    for path in paths:
        for text, count in read_records(path, text_key):
            if batch and (characters + len(text) > BATCH_CHARACTERS or len(batch) == BATCH_DOCUMENTS):
                yield batch, taken
                batch, characters, taken = [], 0, 0
            batch.append(text)
            characters += len(text)
            taken += count
    if batch:
        yield batch, taken


def _encode(
    tokenizer: Tokenizer, texts: list[str], count: int, advance: Callable[[float], object]
) -> Iterator[npt.NDArray[np.int32]]:
    """Ids of each text; `advance` gets `count` in all, in shares as the work is done."""
    if len(texts) != 1:
        encoded = tokenizer.encode_batch(texts)
        advance(count)
        for ids in encoded:
            yield _array(ids, tokenizer.vocab_size)
        return
    pieces = []
    for ids in tokenizer.encode_pieces(texts[0]):
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

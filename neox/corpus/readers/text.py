"""Documents of text files: a .txt is one document, a .jsonl has one a line.

A .json is read like a .jsonl.

A UTF-8 byte order mark at the start of a file is dropped. Every reader yields each document, empty ones too, with the
file bytes it took, compressed ones where the file is compressed: what a progress bar is fed with.
"""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from typing import Any

from neox.corpus.readers.chunks import CHUNK_BYTES, Chunk, Document
from neox.corpus.readers.errors import ErrorPolicy, ReadError, kind, missing_key, text_of
from neox.corpus.readers.streams import BLOCK, COMPRESSED, FileStream, frame_starts, is_compressed
from neox.corpus.readers.urls import open_raw, size_of

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def split_jsonl(name: str) -> list[int]:
    """Find where chunks of a file of lines begin.

    They are bytes of a plain file and frames of a .zst; a .gz has one chunk.
    """
    if not is_compressed(name):
        return list(range(0, max(size_of(name) or 0, 1), CHUNK_BYTES))
    return frame_starts(name) if name.lower().endswith(".zst") else [0]


def read_txt(chunk: Chunk, text_key: str, policy: ErrorPolicy, meta_key: str | None = None) -> Iterator[Document]:
    """Read the whole file as one document; of a damaged one, the sound beginning."""
    path = chunk.name
    stream = FileStream(path)
    with io.BufferedReader(stream, BLOCK) as content:
        raw = content.read()
        position = stream.position
    if stream.damage:
        policy.add(_damaged(path, raw.count(b"\n") + 1, stream))
        if not raw:
            return
    mark = len(raw) - len(raw.removeprefix(BYTE_ORDER_MARK))
    try:
        # A character that the damage cut in two is part of the damage, not an error of its own.
        text = codecs.getincrementaldecoder("utf-8")().decode(raw[mark:], final=not stream.damage)
    except UnicodeDecodeError as error:
        policy.add(_not_utf8(path, raw.count(b"\n", 0, mark + error.start) + 1, mark, error))
        return
    yield Document(text, position)


def read_jsonl(chunk: Chunk, text_key: str, policy: ErrorPolicy, meta_key: str | None = None) -> Iterator[Document]:
    """One document a line; blank lines are passed over.

    A chunk has the lines that begin behind its first byte, up to the one that begins at its end: whether a line begins
    at its first byte it cannot tell, and need not.
    """
    stream = FileStream(chunk.name, chunk.start, chunk.end)
    fast = _fast_reader()
    with io.BufferedReader(stream, BLOCK) as lines:
        taken = number = 0
        offset = len(lines.readline()) if chunk.start else 0
        first = 1 if chunk.start else 0  # lines of the content before the first of this chunk
        while stream.boundary is None or offset <= stream.boundary:
            line = lines.readline()
            if not line or (stream.damage and not line.endswith(b"\n")):  # the damage begins within this line
                break
            number += 1
            content = line.removeprefix(BYTE_ORDER_MARK) if number == 1 and not chunk.start else line
            offset += len(line)
            try:
                value = fast(content)
                text = value[text_key]
                if type(text) is not str:
                    raise TypeError
            except Exception:  # whatever is odd about the line is told by the reader that tells it well
                if not content.strip():
                    continue
                begin = offset - len(content)
                try:
                    value, text = _document(chunk, first + number, begin, content, text_key)
                except ReadError as read_error:
                    policy.add(read_error)
                    continue
            yield Document(text, stream.position - taken, value.get(meta_key) if meta_key else None)
            taken = stream.position
        if stream.damage:
            policy.add(_damaged(chunk.name, _lines_before(chunk) + first + number + 1, stream))


@cache
def _fast_reader() -> Callable[[bytes], Any]:
    """JSON reader of the common line: orjson's where it is installed.

    `_document` judges what it refuses, so that the same lines pass with and without orjson: the standard library's own
    reader of bytes takes a byte order mark, UTF-16 and half of a surrogate pair.
    """
    with suppress(ImportError):
        import orjson

        return orjson.loads

    def strict(content: bytes) -> Any:
        if b"\\u" in content:
            raise ValueError("an escape may be half of a surrogate pair")
        return json.loads(content.decode("utf-8"))

    return strict


@cache
def _lines_before(chunk: Chunk) -> int:
    """Count line breaks of the file before the chunk, for the line number in an error.

    0 in a compressed file, whose lines are counted from the chunk's first frame.
    """
    if not chunk.start or is_compressed(chunk.name):
        return 0
    count, left = 0, chunk.start
    with open_raw(chunk.name) as file:
        while left and (block := file.read(min(left, BLOCK))):
            count, left = count + block.count(b"\n"), left - len(block)
    return count


def _damaged(path: str, line: int, stream: FileStream) -> ReadError:
    message = f"{path}:{line}: {stream.damage}; the rest of the file is lost: fetch it or make it again"
    return ReadError("damaged", message)


def _not_utf8(path: str, line: int, offset: int, error: UnicodeDecodeError) -> ReadError:
    """Make the error of bytes that are not UTF-8.

    `offset` is the start of the decoded bytes in the file, or in its decompressed content.
    """
    whole = "decompressed text" if is_compressed(path) else "file"
    place = f"byte {offset + error.start} of the {whole} (0x{error.object[error.start]:02x})"
    return ReadError("not UTF-8", f"{path}:{line}: not UTF-8 at {place}; convert the file to UTF-8")


def _document(chunk: Chunk, number: int, offset: int, content: bytes, text_key: str) -> tuple[dict[str, Any], str]:
    """Object and text of line `number` of a chunk, at its byte `offset`.

    Raises ReadError.
    """
    path = chunk.name
    number = _lines_before(chunk) + number
    where = f"{path}:{number}"
    # An array or an object over many lines shows at its first line.
    hint = " and not one JSON value over the whole file: turn it into .jsonl" if _is_json(path) and number == 1 else ""
    try:
        json_text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, number, chunk.start + offset, error) from None
    try:
        value = json.loads(json_text.rstrip("\r\n"))
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg}: column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise ReadError("not JSON", f"{where}: not JSON ({reason}); every line must be one JSON object{hint}") from None
    if isinstance(value, str):  # a document by itself, as gpt-neox's lm_dataformat has it
        value = {text_key: value}
    if not isinstance(value, dict):
        wanted = f'a JSON object such as {{"{text_key}": "..."}}; every line must be one{hint}'
        raise ReadError("no text", f"{where}: the line holds {kind(value)}, not {wanted}")
    if text_key not in value:
        raise missing_key(where, text_key, list(value))
    text = text_of(value[text_key], where, text_key)
    # JSON can spell half of a surrogate pair, which no UTF-8 text can hold; only an escape can bring one in.
    if b"\\u" in content:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            code = ord(text[error.start])
            message = f"{where}: key {text_key!r} holds a lone surrogate (\\u{code:04x}); mend the line"
            raise ReadError("lone surrogate", message) from None
    return value, text


def _is_json(path: str) -> bool:
    name = path.lower()
    return any(name.endswith(".json" + suffix) for suffix in ("", *COMPRESSED))

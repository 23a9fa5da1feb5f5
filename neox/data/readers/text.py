"""Documents of text files: a .txt is one document, a .jsonl (or .json that holds lines) one a line.

A UTF-8 byte order mark at the start of a file is dropped. Every reader yields each document, empty ones too, with the
file bytes it took, compressed ones where the file is compressed: what a progress bar is fed with.
"""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterator
from pathlib import Path

from neox.data.readers.faults import Fault, Faults, kind, missing_key, text_of
from neox.data.readers.streams import CHUNK, COMPRESSED, FileStream

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_txt(path: Path, text_key: str, faults: Faults) -> Iterator[tuple[str, float]]:
    """The whole file as one document; of a damaged one, what could be read of it."""
    stream = FileStream(path)
    with io.BufferedReader(stream, CHUNK) as content:
        raw = content.read()
        position = stream.position
    if stream.damage:
        faults.add(_damaged(path, raw.count(b"\n") + 1, stream))
        if not raw:
            return
    mark = len(raw) - len(raw.removeprefix(BYTE_ORDER_MARK))
    try:
        # A character that the damage cut in two is part of the damage, no fault of its own.
        text = codecs.getincrementaldecoder("utf-8")().decode(raw[mark:], final=not stream.damage)
    except UnicodeDecodeError as error:
        faults.add(_not_utf8(path, raw.count(b"\n", 0, mark + error.start) + 1, mark, error))
        return
    yield text, position


def read_jsonl(path: Path, text_key: str, faults: Faults) -> Iterator[tuple[str, float]]:
    """One document a line; blank lines are passed over."""
    stream = FileStream(path)
    with io.BufferedReader(stream, CHUNK) as lines:
        offset = taken = number = 0
        for number, line in enumerate(lines, start=1):
            if stream.damage and not line.endswith(b"\n"):
                number -= 1  # the damage begins within this line
                break
            content = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
            offset += len(line)
            if not content.strip():
                continue
            try:
                text = _document(path, number, offset - len(content), content, text_key)
            except Fault as fault:
                faults.add(fault)
                continue
            yield text, stream.position - taken
            taken = stream.position
        if stream.damage:
            faults.add(_damaged(path, number + 1, stream))


def _damaged(path: Path, line: int, stream: FileStream) -> Fault:
    message = f"{path}:{line}: {stream.damage}; the rest of the file is lost: fetch it or make it again"
    return Fault("damaged", message)


def _not_utf8(path: Path, line: int, offset: int, error: UnicodeDecodeError) -> Fault:
    """`offset`: where the decoded bytes start in the file, or in what it decompresses to."""
    whole = "decompressed text" if path.suffix.lower() in COMPRESSED else "file"
    place = f"byte {offset + error.start} of the {whole} (0x{error.object[error.start]:02x})"
    return Fault("not UTF-8", f"{path}:{line}: not UTF-8 at {place}; convert the file to UTF-8")


def _document(path: Path, number: int, offset: int, content: bytes, text_key: str) -> str:
    """The text of line `number`, which starts at byte `offset` of the file. Raises Fault."""
    where = f"{path}:{number}"
    # An array or an object over many lines shows at its first line.
    hint = " and not one JSON value over the whole file: turn it into .jsonl" if _is_json(path) and number == 1 else ""
    try:
        json_text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, number, offset, error) from None
    try:
        value = json.loads(json_text.rstrip("\r\n"))
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg}: column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise Fault("not JSON", f"{where}: not JSON ({reason}); every line must be one JSON object{hint}") from None
    if not isinstance(value, dict):
        wanted = f'a JSON object such as {{"{text_key}": "..."}}; every line must be one{hint}'
        raise Fault("no text", f"{where}: the line holds {kind(value)}, not {wanted}")
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
            raise Fault("lone surrogate", message) from None
    return text


def _is_json(path: Path) -> bool:
    name = path.name.lower()
    return any(name.endswith(".json" + suffix) for suffix in ("", *COMPRESSED))

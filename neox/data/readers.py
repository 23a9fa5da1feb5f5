"""Documents out of corpus files: one function a format, chosen by the file's suffix.

A UTF-8 byte order mark at the start of a file is dropped, and so is an empty document.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

Reader = Callable[[Path, str], Iterator[tuple[str, int]]]
"""Yields each document, empty ones too, with the number of file bytes it took: what a progress bar is fed with."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_documents(path: str | Path, text_key: str = "text") -> Iterator[str]:
    """The documents of one file, in order, none of them empty: a .txt is one document, a .jsonl one a line.

    `text_key` names the member of each JSON object that holds the text; blank lines of a .jsonl are passed over.
    Raises FileNotFoundError, and ValueError with file and line on an unknown suffix, bytes that are no UTF-8,
    a line that is no JSON object, a `text_key` that is missing or no string, and a lone surrogate.
    """
    return (text for text, _ in read_records(path, text_key) if text)


def read_records(path: str | Path, text_key: str = "text") -> Iterator[tuple[str, int]]:
    """As `read_documents`, but each with the file bytes it took, and with the empty ones. Raises at the call what
    can be known without reading: a missing file, an unknown suffix."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; name the files in it, such as {path / '*.jsonl'}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return _reader(path)(path, text_key)


def _reader(path: Path) -> Reader:
    for suffix, reader in READERS.items():
        if path.name.lower().endswith(suffix):
            return reader
    raise ValueError(f"{path}: unknown kind of file; the suffix must be one of {', '.join(READERS)}")


def _read_txt(path: Path, text_key: str) -> Iterator[tuple[str, int]]:
    raw = path.read_bytes()
    try:
        text = raw.removeprefix(BYTE_ORDER_MARK).decode("utf-8")
    except UnicodeDecodeError as error:
        line, offset = _place(raw, error)
        raise ValueError(
            f"{path}:{line}: not UTF-8 at byte {offset} of the file (0x{raw[offset]:02x}); convert the file to UTF-8"
        ) from None
    yield text, len(raw)


def _place(raw: bytes, error: UnicodeDecodeError) -> tuple[int, int]:
    """Line number (from 1) and offset (from 0) in the file of the byte that cannot be decoded."""
    offset = error.start + len(raw) - len(raw.removeprefix(BYTE_ORDER_MARK))
    return raw.count(b"\n", 0, offset) + 1, offset


def _read_jsonl(path: Path, text_key: str) -> Iterator[tuple[str, int]]:
    with path.open("rb") as file:
        offset = blank = 0
        for number, line in enumerate(file, start=1):
            content = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
            offset += len(line)
            if content.strip():
                yield _document(path, number, offset - len(content), content, text_key), blank + len(line)
                blank = 0
            else:
                blank += len(line)


def _document(path: Path, number: int, offset: int, content: bytes, text_key: str) -> str:
    """The text of line `number`, which starts at byte `offset` of the file."""
    where = f"{path}:{number}"
    try:
        json_text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: not UTF-8 at byte {offset + error.start} of the file (0x{content[error.start]:02x}); "
            "convert the file to UTF-8"
        ) from None
    try:
        value = json.loads(json_text.rstrip("\r\n"))
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg}: column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise ValueError(f"{where}: not JSON ({reason}); every line must be one JSON object") from None
    if not isinstance(value, dict):
        raise ValueError(f'{where}: the line holds {_kind(value)}, not a JSON object such as {{"{text_key}": "..."}}')
    if text_key not in value:
        keys = ", ".join(repr(key) for key in list(value)[:8]) or "none"
        raise ValueError(f"{where}: no key {text_key!r} (keys here: {keys}); set data.text_key to the key of the text")
    text = value[text_key]
    if not isinstance(text, str):
        raise ValueError(
            f"{where}: key {text_key!r} holds {_kind(text)}, not a string; set data.text_key or mend the line"
        )
    # JSON can spell half of a surrogate pair, which no UTF-8 text can hold; only an escape can bring one in.
    if b"\\u" in content:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            code = ord(text[error.start])
            raise ValueError(
                f"{where}: key {text_key!r} holds a lone surrogate (\\u{code:04x}); mend the line"
            ) from None
    return text


def _kind(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "a string"
    return "a list" if isinstance(value, list) else "an object"


READERS: dict[str, Reader] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
}

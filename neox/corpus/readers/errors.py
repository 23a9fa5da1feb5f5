"""Errors of reading: one line with the place, raised at once or counted by reason."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Literal

from neox.data.token_file import beside
from neox.system.files import open_own, sync_folder, temporary_name

OnError = Literal["fail", "skip"]
Reason = Literal["not JSON", "not UTF-8", "no key", "no text", "lone surrogate", "damaged", "unknown kind", "changed"]
SHOWN = 3  # places kept for each reason: enough to look at, few enough for a manifest


class ReadError(ValueError):
    """A document, or the rest of a file, that cannot be read.

    The message is one line with the place in it.
    """

    def __init__(self, reason: Reason, message: str, documents: int = 1) -> None:
        super().__init__(message)
        self.reason = reason
        self.documents = documents
        """Number of documents lost; 1 where a damaged file does not say."""


@dataclass
class Skipped:
    """Documents left out for one reason."""

    documents: int = 0
    """Number of documents; the rest of a damaged file counts as one if its length is unknown."""
    first: list[str] = field(default_factory=list)
    """The first few errors, each one line with file and line."""


class ErrorPolicy:
    """Handling of read errors: raise them (`fail`), or count them and go on (`skip`)."""

    def __init__(self, on_error: OnError, report: Callable[[ReadError], object] | None = None) -> None:
        """`report` is called with each error that is skipped."""
        if on_error not in ("fail", "skip"):
            raise ValueError(f'data.on_error: must be "fail" or "skip", not {on_error!r}')
        self.skips = on_error == "skip"
        self._report = report
        self.skipped: dict[str, Skipped] = {}
        """By reason, in the order in which the reasons were met."""

    def add(self, read_error: ReadError) -> None:
        """Count the error where errors are skipped; else raise it with that hint."""
        if not self.skips:
            message = f"{read_error}; or leave out what cannot be read: data.on_error=skip"
            raise ReadError(read_error.reason, message, read_error.documents) from None
        if self._report:
            self._report(read_error)
        entry = self.skipped.setdefault(read_error.reason, Skipped())
        entry.documents += read_error.documents
        if len(entry.first) < SHOWN:
            entry.first.append(str(read_error))


class SkipReport:
    """The report `<prefix>.skipped.jsonl`, a row for each read error.

    Rows go to a temporary name until `place`. Without rows there is no file, and one of an earlier run is removed.

    A row: `reason`, `documents` (how many it cost), `what` (one line with file and place).
    """

    def __init__(self, out_prefix: str | Path) -> None:
        self.path = skip_file(out_prefix)
        self._file: IO[bytes] | None = None

    def __enter__(self) -> SkipReport:
        return self

    def __call__(self, read_error: ReadError) -> None:
        """Append the row of an error."""
        row = {"reason": read_error.reason, "documents": read_error.documents, "what": str(read_error)}
        self._open().write(json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n")

    def append(self, part_prefix: Path) -> None:
        """Append the rows of a finished shard, if it has any."""
        if skip_file(part_prefix).exists():
            with skip_file(part_prefix).open("rb") as rows:
                shutil.copyfileobj(rows, self._open())

    def place(self) -> None:
        """Put the report in its place. Raises OSError."""
        if self._file is None:
            self.path.unlink(missing_ok=True)
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        os.replace(temporary_name(self.path), self.path)
        sync_folder(self.path.parent)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            temporary_name(self.path).unlink(missing_ok=True)

    def _open(self) -> IO[bytes]:
        if self._file is None:
            self._file = open_own(temporary_name(self.path), "wb")
        return self._file


def skip_file(out_prefix: str | Path) -> Path:
    """Path of the report of an output."""
    return beside(out_prefix, ".skipped.jsonl")


def text_of(value: object, where: str, text_key: str) -> str:
    """Text of one document: a string, or a list of strings joined by blank lines.

    lm_dataformat joins lists so.

    Raises ReadError on anything else, on bytes that are no UTF-8 (columns hold bytes) and on a lone surrogate.
    """
    try:
        if isinstance(value, str):
            return value
        if isinstance(value, bytes):
            return value.decode("utf-8")
        if isinstance(value, list) and all(isinstance(part, str | bytes) for part in value):
            return "\n\n".join(part if isinstance(part, str) else part.decode("utf-8") for part in value)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ReadError(
            "not UTF-8", f"{where}: {text_key!r} is not UTF-8 at its byte {error.start} (0x{byte:02x})"
        ) from None
    raise ReadError(
        "no text", f"{where}: key {text_key!r} holds {kind(value)}, not a string; set data.text_key or mend the data"
    )


def kind(value: object) -> str:
    """A JSON value's kind, in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "a string"
    if isinstance(value, list):
        odd = next((part for part in value if not isinstance(part, str | bytes)), None)
        return "a list" if all(isinstance(part, str | bytes) for part in value) else f"a list with {kind(odd)} in it"
    return "an object"


def missing_key(where: str, text_key: str, keys: Sequence[object], documents: int = 1) -> ReadError:
    """Make the error of a document, or a table, without the key of the text."""
    named = ", ".join(repr(key) for key in keys[:8]) or "none"
    more = ", ..." if len(keys) > 8 else ""
    return ReadError(
        "no key",
        f"{where}: no key {text_key!r} (keys here: {named}{more}); set data.text_key to the key of the text",
        documents,
    )

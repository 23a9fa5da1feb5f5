"""The report of everything that was left out: `<prefix>.skipped.jsonl`, a row for each fault."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import IO

from neox.corpus.readers import Fault
from neox.data.token_file import pair
from neox.system.files import open_own, sync_folder, temporary_name


class SkipReport:
    """Rows under a temporary name until `place`; where there is none, no file, and none of an earlier run either.

    A row: `reason`, `documents` (how many it cost), `what` (one line with file and place).
    """

    def __init__(self, out_prefix: str | Path) -> None:
        self.path = skip_file(out_prefix)
        self._file: IO[bytes] | None = None

    def __enter__(self) -> SkipReport:
        return self

    def __call__(self, fault: Fault) -> None:
        """Append the row of a fault."""
        row = {"reason": fault.reason, "documents": fault.documents, "what": str(fault)}
        self._open().write(json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n")

    def append(self, part_prefix: Path) -> None:
        """Append the rows of a part, if it has any."""
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
    """Where the report of an output is."""
    return pair(out_prefix)[0].with_suffix(".skipped.jsonl")

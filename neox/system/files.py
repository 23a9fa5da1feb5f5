"""Files that are whole or absent, locks on files, and rows of JSON lines."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from neox.config.structured import check_regular, parse_json


def cache_folder() -> Path:
    """Folder for files that can be made again: ~/.cache/neox, or below XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "neox"


def sync_folder(folder: Path) -> None:
    """Make the renames done in `folder` survive a power cut.

    Raises OSError naming `folder`: fsync() itself reports only the cause.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(folder)) from error
    finally:
        os.close(handle)


def temporary_name(path: Path) -> Path:
    """Temporary path of the bytes of `path` until they are whole: the same folder, so that the rename is atomic."""
    return path.with_name(path.name + ".tmp")


def open_own(path: Path, mode: str) -> IO[bytes]:
    """Open a file that we write ourselves, and no other one that a link of its name leads to. Raises OSError."""
    return open(path, mode, opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NOFOLLOW", 0), 0o666))


def try_lock(file: IO[bytes] | int, shared: bool = False) -> bool:
    """Lock an open file against other processes without waiting; False if one of them holds it.

    `shared` locks exclude exclusive ones only. Closing the file releases the lock, and so does the end of the process,
    also when it is killed. Advisory: it binds processes that ask for it.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_at(file: IO[bytes], path: Path) -> bool:
    """True if `path` still names the open file: between opening and locking it may have been moved or removed."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def write_synced(path: Path, write: Callable[[IO[bytes]], object], named: Path | None = None) -> None:
    """Call `write(file)` on a fresh binary file at `path` and fsync it; on failure no file stays behind.

    Raises OSError naming `named` (or `path`) when the disk is full or the folder is not writable.
    """
    try:
        with open_own(path, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        with suppress(OSError):
            path.unlink()
        if isinstance(error, OSError):
            raise write_error(error, named or path) from error
        raise


def write_whole(path: Path, write: Callable[[IO[bytes]], object], temporary: Path | None = None) -> None:
    """Replace `path` by what `write(file)` writes: a reader, or a crash at any moment, sees all of the old file or all
    of the new one.

    The folder is made where it is absent. Where several processes may write the same file at once, each names a
    `temporary` file of its own beside it. Raises OSError naming `path` when the disk is full or not writable.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary or temporary_name(path)
    write_synced(temporary, write, named=path)
    os.replace(temporary, path)
    sync_folder(path.parent)


def write_atomic(path: Path, content: bytes) -> None:
    """Replace `path` by `content`, as `write_whole` does."""
    write_whole(path, lambda file: file.write(content))


def write_error(error: OSError, path: Path) -> OSError:
    """The same error, but saying which file could not be written: write() itself reports only the cause."""
    return OSError(error.errno, f"{error.strerror or error}: nothing was kept of it", str(path))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a file of JSON lines; a last line that is being written, or that a crash cut, is left out."""
    check_regular(path, limit=None)
    rows = []
    for line in path.read_bytes().split(b"\n"):
        try:
            row = parse_json(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows

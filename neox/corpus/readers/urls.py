"""Files by path or by URL (`s3://`, `gs://`, `http://`, ..., through fsspec)."""

from __future__ import annotations

import glob
import hashlib
from pathlib import Path
from typing import IO, Any, cast

from neox.system.console import one_line
from neox.system.optional import optional

SAMPLE = 1 << 16  # bytes at a file's head and tail that tell it from another version of itself
# Whatever of these a file system states changes when the file does; the rest of what it says may change at any time.
VERSIONS = ("mtime", "LastModified", "Last-Modified", "updated", "created", "ETag", "etag", "md5Hash", "generation")


def is_url(name: str) -> bool:
    """Tell whether `name` is a URL, for fsspec."""
    return "://" in name


def open_raw(name: str) -> IO[bytes]:
    """Open the raw bytes of a file, seekable where its store allows it.

    Raises OSError that names the file.
    """
    if not is_url(name):
        return Path(name).open("rb", buffering=0)
    system, path = _system(name)
    try:
        return cast(IO[bytes], system.open(path, "rb"))
    except Exception as error:
        raise _unreachable(name, error) from None


def size_of(name: str) -> int | None:
    """Size of a file in bytes; None where a server does not say.

    Raises OSError that names the file.
    """
    return Path(name).stat().st_size if not is_url(name) else _info(name).get("size")


def version_of(name: str) -> list[Any]:
    """Version of a file without reading it: size and time, or a store's own."""
    if not is_url(name):
        folder = Path(name)
        files = sorted(folder.iterdir()) if folder.is_dir() else [folder]  # a saved data set is a folder
        states = [file.stat() for file in files]
        return [sum(state.st_size for state in states), max((state.st_mtime_ns for state in states), default=0)]
    info = _info(name)
    return [info.get("size"), *(f"{key}={info[key]}" for key in VERSIONS if info.get(key))]


def ends_digest(name: str) -> str:
    """Hash of a file's first and last 64 KiB (sha256); of a folder, of nothing.

    It notices a change that kept size and time.
    """
    digest = hashlib.sha256()
    if not is_url(name) and Path(name).is_dir():
        return digest.hexdigest()
    with open_raw(name) as file:
        digest.update(file.read(SAMPLE))
        size = size_of(name)
        if size is not None and size > SAMPLE and file.seekable():
            file.seek(max(SAMPLE, size - SAMPLE))
            digest.update(file.read(SAMPLE))
    return digest.hexdigest()


def is_pattern(name: str) -> bool:
    """Tell whether `name` is a glob, and not a file of that name."""
    return glob.has_magic(name) and (is_url(name) or not Path(name).exists())


def matching(pattern: str) -> list[str]:
    """Files that match a glob, in no order."""
    if not is_url(pattern):
        return [found for found in glob.glob(pattern, recursive=True) if Path(found).is_file()]
    system, path = _system(pattern)
    try:
        found = system.glob(path, detail=True)
        return [str(system.unstrip_protocol(place)) for place, info in found.items() if info["type"] == "file"]
    except Exception as error:
        raise _unreachable(pattern, error) from None


def below_url(url: str) -> list[str]:
    """Files below a folder of a store, in no order; the URL itself of a file."""
    system, path = _system(url)
    try:
        if not system.isdir(path):
            return [str(system.unstrip_protocol(path))]
        return [str(system.unstrip_protocol(found)) for found in system.find(path)]
    except Exception as error:
        raise _unreachable(url, error) from None


def _system(url: str) -> tuple[Any, str]:
    fsspec = optional("fsspec", url, "data")
    try:
        system, path = fsspec.core.url_to_fs(url)
    except Exception as error:  # an unknown protocol, or a package of one that is missing
        raise ValueError(f"{url}: cannot be opened: {one_line(error)}") from None
    return system, path


def _info(url: str) -> dict[str, Any]:
    system, path = _system(url)
    try:
        return cast(dict[str, Any], system.info(path))
    except Exception as error:
        raise _unreachable(url, error) from None


def _unreachable(url: str, error: Exception) -> OSError:
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"{url}: no such file or folder")
    return OSError(f"{url}: cannot be reached: {one_line(error)}")

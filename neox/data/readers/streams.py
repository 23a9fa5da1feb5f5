"""A file's bytes, decompressed as they are read; where the file is damaged they end there, and `damage` says why."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

from neox.data.readers.faults import optional

CHUNK = 1 << 17
# One step of zstd may give 32,000 times what it is fed; so small a piece keeps even that within memory.
ZSTD_CHUNK = 1 << 14
# What `zstd --long=31` writes; the library's own limit is 128 MiB.
ZSTD_WINDOW = 1 << 31

COMPRESSED = (".gz", ".zst")


class Damage(Exception):
    """The compressed data end too early or do not fit together."""


class FileStream(io.RawIOBase):
    """The content of `path`, decompressed by its suffix; give it to io.BufferedReader for lines.

    Raises OSError naming the file where it cannot be opened or read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("rb", buffering=0)
        self._chunks = _chunks(path, self._file)
        self._rest = memoryview(b"")
        self.damage = ""
        """Why the content ended before its time; empty while all is well."""

    @property
    def position(self) -> int:
        """Bytes of the file (compressed ones) that were read so far."""
        return self._file.tell()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            while not self._rest:
                chunk = next(self._chunks, None)
                if chunk is None:
                    return 0
                self._rest = memoryview(chunk)
        except Damage as error:
            self.damage = str(error)
            return 0
        except OSError as error:  # read() itself does not say of which file
            raise OSError(error.errno, error.strerror or str(error), str(self._path)) from error
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _chunks(path: Path, file: IO[bytes]) -> Iterator[bytes]:
    suffix = path.suffix.lower()
    if suffix not in COMPRESSED:
        return iter(partial(file.read, CHUNK), b"")
    return (_gzip if suffix == ".gz" else _zstd)(path, file)


def _gzip(path: Path, file: IO[bytes]) -> Iterator[bytes]:
    members = gzip.GzipFile(fileobj=file, mode="rb")
    if not path.stat().st_size:
        raise Damage("it is empty, without even a gzip header")
    while True:
        try:
            # Not read(): that would lose what it has when it meets the damage.
            chunk = members.read1(CHUNK)
        except EOFError:
            raise Damage("cut short: the gzip data end without their end mark") from None
        except (gzip.BadGzipFile, zlib.error) as error:
            if str(error).endswith("(b'\\x1f')"):  # half of the two bytes that a member begins with
                raise Damage("cut short: the gzip data end in the first bytes of a member") from None
            raise Damage(f"damaged gzip data: {error}") from None
        if not chunk:
            return
        yield chunk


def _zstd(path: Path, file: IO[bytes]) -> Iterator[bytes]:
    # Frame by frame: the library's file reader takes a file that ends within a frame for a whole one.
    zstandard = optional("zstandard", str(path))
    decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW)
    frame = None
    compressed = file.read(ZSTD_CHUNK)
    if not compressed:
        raise Damage("it is empty, without even a zstd header")
    while compressed:
        frame = frame or decompressor.decompressobj()
        try:
            chunk = frame.decompress(compressed)
        except zstandard.ZstdError as error:
            raise Damage(f"damaged zstd data: {error}") from None
        if chunk:
            yield chunk
        compressed = b""
        if frame.eof:
            compressed, frame = frame.unused_data, None
        compressed = compressed or file.read(ZSTD_CHUNK)
    if frame is not None:
        raise Damage("cut short: the zstd data end within a frame")

"""Content of a file, decompressed as it is read, up to the first damage.

`damage` says why the content of a damaged file ended.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import PurePosixPath
from typing import IO, Any

from neox.corpus.readers.chunks import CHUNK_BYTES
from neox.corpus.readers.urls import open_raw
from neox.system.optional import optional

BLOCK = 1 << 17
# One step of zstd may give 32,000 times what it is fed; so small a chunk keeps even that within memory.
ZSTD_BLOCK = 1 << 14
# What `zstd --long=31` writes; the library's own limit is 128 MiB.
ZSTD_WINDOW = 1 << 31

COMPRESSED = (".gz", ".zst")


class Damage(Exception):
    """Compressed data that end too early or do not fit together."""


class FileStream(io.RawIOBase):
    """Content of a file from byte `start` on, decompressed; for io.BufferedReader.

    `start` and `end` are bytes of the file where a chunk begins and where the next one does; in a compressed file each
    is the first byte of a frame. What lies behind `end` can be read all the same: the last line may go on there.
    Raises OSError naming the file where it cannot be opened or read.
    """

    def __init__(self, name: str, start: int = 0, end: int | None = None) -> None:
        self._name = name
        self._file = open_raw(name)
        if start:
            self._file.seek(start)
        self._blocks = _blocks(self, self._file)
        self._rest = memoryview(b"")
        self.start, self.end = start, end
        self.damage = ""
        """Why the content ended before its time; empty while all is well."""
        self.boundary = None if end is None or is_compressed(name) else end - start
        """Bytes of content before `end`, once that is known; None until then, and without an end."""

    @property
    def name(self) -> str:
        """Path or URL."""
        return self._name

    @property
    def position(self) -> int:
        """Bytes of the file (compressed ones) that were read so far."""
        return self._file.tell() - self.start

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            while not self._rest:
                block = next(self._blocks, None)
                if block is None:
                    return 0
                self._rest = memoryview(block)
        except Damage as error:
            self.damage = str(error)
            return 0
        except OSError as error:  # read() itself does not say of which file
            raise OSError(error.errno, error.strerror or str(error), self._name) from error
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def is_compressed(name: str) -> bool:
    """Tell from the suffix whether a file is compressed."""
    return PurePosixPath(name).suffix.lower() in COMPRESSED


def _blocks(stream: FileStream, file: IO[bytes]) -> Iterator[bytes]:
    if not is_compressed(stream.name):
        return iter(partial(file.read, BLOCK), b"")
    return _gzip(file) if stream.name.lower().endswith(".gz") else _zstd(stream, file)


def _gzip(file: IO[bytes]) -> Iterator[bytes]:
    members = gzip.GzipFile(fileobj=file, mode="rb")
    begun = False
    while True:
        try:
            # Not read(): that would lose what it has when it meets the damage.
            block = members.read1(BLOCK)
        except EOFError:
            raise Damage("cut short: the gzip data end without their end mark") from None
        except (gzip.BadGzipFile, zlib.error) as error:
            if str(error).endswith("(b'\\x1f')"):  # half of the two bytes that a member begins with
                raise Damage("cut short: the gzip data end in the first bytes of a member") from None
            raise Damage(f"damaged gzip data: {error}") from None
        if not block:
            if not begun and not file.tell():
                raise Damage("it is empty, without even a gzip header")
            return
        begun = True
        yield block


def _zstd(stream: FileStream, file: IO[bytes]) -> Iterator[bytes]:
    # Frame by frame: the library's file reader takes a file that ends within a frame for a whole one.
    zstandard = optional("zstandard", stream.name, "data")
    decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW)
    frame = None
    given = 0
    compressed = file.read(ZSTD_BLOCK)
    if not compressed and not stream.start:
        raise Damage("it is empty, without even a zstd header")
    while compressed:
        frame = frame or decompressor.decompressobj()
        try:
            block = frame.decompress(compressed)
        except zstandard.ZstdError as error:
            raise Damage(f"damaged zstd data: {error}") from None
        given += len(block)
        rest = frame.unused_data if frame.eof else b""
        if frame.eof:
            frame = None
            if stream.boundary is None and stream.end is not None and file.tell() - len(rest) >= stream.end:
                stream.boundary = given
        if block:
            yield block
        compressed = rest or file.read(ZSTD_BLOCK)
    if frame is not None:
        raise Damage("cut short: the zstd data end within a frame")


def frame_starts(name: str) -> list[int]:
    """Find frames of a .zst that lie at least `CHUNK_BYTES` apart, by their headers.

    The first is at 0.

    Just 0 where the first frame is longer than that: a file in one frame would have to be walked through to its end.
    What is damaged begins no frame. Source: RFC 8878, 3.1.1 (frames, blocks) and 3.1.2 (skippable frames).
    """
    zstandard = optional("zstandard", name, "data")
    starts = [0]
    with open_raw(name) as file:
        place = 0
        while True:
            begun = place
            try:
                file.seek(place)
                head = file.read(18)
                if len(head) < 8:
                    return starts
                if begun - starts[-1] >= CHUNK_BYTES:
                    starts.append(begun)
                if head[1:4] == b"\x2a\x4d\x18" and head[0] >> 4 == 5:
                    place += 8 + int.from_bytes(head[4:8], "little")
                    continue
                place += zstandard.frame_header_size(head)
                checked = zstandard.get_frame_parameters(head).has_checksum
            except zstandard.ZstdError:
                return starts if starts[-1] != begun or begun == 0 else starts[:-1]
            last = False
            while not last:
                file.seek(place)
                header = file.read(3)
                block = int.from_bytes(header, "little")
                last, kind, length = bool(block & 1), block >> 1 & 3, block >> 3
                place += 3 + (1 if kind == 1 else length)  # 1: one byte, repeated
                if len(header) < 3 or kind == 3 or (not begun and place > CHUNK_BYTES):
                    return starts
            place += 4 if checked else 0

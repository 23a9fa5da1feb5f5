"""Digests of a checkpoint: a file whose bytes have changed is named, and never used.

checksums.json is written before .metadata, which it covers, and so before the folder counts as complete:

    {"files": {".metadata": DIGEST, "config.toml": DIGEST, "state.json": DIGEST},
     "pieces": {"__0_0.distcp": [[LENGTH, DIGEST], ...]},  a tensor or a part of one each, in the order of the file
     "digest": of the above}

A piece is checked when it is read, from the bytes that are then used: no file is read twice, and each process checks
what it loads. The digest is BLAKE2b of 16 bytes.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from neox.checkpoint.weight_source import CheckpointError
from neox.config.structured import parse_json, read_small
from neox.system.console import progress_bar

NAME = "checksums.json"
REMEDY = "remove the folder, and the run resumes at the step before it"
_BLOCK = 1 << 24
_SHOWN = 10**9
"""From this many bytes verifying has a progress bar."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint whose bytes have changed; an older one may take its place."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}; it is damaged: {REMEDY}")
        self.path, self.reason = path, reason
        self.brief = f"{path}: {reason}"

    def __reduce__(self) -> Any:  # it goes from process to process
        return DamagedCheckpoint, (self.path, self.reason)


def digest(*content: bytes | memoryview) -> str:
    """BLAKE2b digest of 16 bytes, in hexadecimal."""
    state = hashlib.blake2b(digest_size=16)
    for piece in content:
        state.update(piece)
    return state.hexdigest()


def render(files: dict[str, str], pieces: dict[str, list[tuple[int, str]]]) -> bytes:
    """Make the content of checksums.json."""
    table = {"files": files, "pieces": {name: [list(p) for p in pieces[name]] for name in sorted(pieces)}}
    return (json.dumps(table | {"digest": digest(json.dumps(table).encode())}, indent=1) + "\n").encode()


class Checksums:
    """Digests of one checkpoint. Every method raises DamagedCheckpoint naming the file that differs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / NAME
        try:
            content = read_small(path)
            table: dict[str, Any] = parse_json(content)
            self.files: dict[str, str] = table["files"]
            pieces: dict[str, list[tuple[int, str]]] = table["pieces"]
            if render(self.files, pieces) != content:
                raise ValueError("its own digest does not fit")
        except FileNotFoundError:
            raise DamagedCheckpoint(path, "is missing") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error
            raise DamagedCheckpoint(path, f"cannot be read ({reason})") from None
        self.pieces: dict[tuple[str, int], tuple[int, str]] = {}  # by file and offset
        self.sizes: dict[str, int] = {}
        for file, listed in pieces.items():
            offset = 0
            for length, expected in listed:
                self.pieces[file, offset] = length, expected
                offset += length
            self.sizes[file] = offset

    def check(self) -> None:
        """Check the small files whole, and the sizes of those with tensors."""
        for name, expected in self.files.items():
            try:
                content = read_small(self.folder / name)
            except (OSError, ValueError) as error:
                reason = error.strerror if isinstance(error, OSError) else "no regular file, or far too large"
                raise DamagedCheckpoint(self.folder / name, f"cannot be read ({reason})") from None
            if digest(content) != expected:
                raise _changed(self.folder / name)
        for name, size in self.sizes.items():
            path = self.folder / name
            if not path.is_file():
                raise DamagedCheckpoint(path, "is missing")
            if path.stat().st_size != size:
                raise DamagedCheckpoint(path, f"has {path.stat().st_size:,} bytes, {size:,} were written")

    def check_piece(self, file: str, offset: int, content: bytes | memoryview, tensor: str = "") -> None:
        """Check a piece of `file` at `offset`; the name `tensor` is for the message."""
        if self.pieces.get((file, offset)) != (len(content), digest(content)):
            raise _changed(self.folder / file, tensor)

    def check_all(self) -> None:
        """Check every byte of the checkpoint."""
        self.check()
        with progress_bar("bytes", show=sum(self.sizes.values()) > _SHOWN) as bar:
            task = bar.add_task(f"verifying {self.folder.name}", total=sum(self.sizes.values()))
            for (name, offset), (length, expected) in self.pieces.items():
                state = hashlib.blake2b(digest_size=16)
                with open(self.folder / name, "rb") as file:
                    file.seek(offset)
                    while length and (block := file.read(min(length, _BLOCK))):
                        state.update(block)
                        length -= len(block)
                        bar.advance(task, len(block))
                if state.hexdigest() != expected:
                    raise _changed(self.folder / name)


def _changed(path: Path, tensor: str = "") -> DamagedCheckpoint:
    where = f" (in tensor {tensor})" if tensor else ""
    return DamagedCheckpoint(path, f"its bytes are not those that were written{where}")

"""Check of token files against the hashes in their manifests, large ones in the background."""

from __future__ import annotations

import hashlib
import os
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from neox.data.manifest import Manifest, manifest_file
from neox.data.token_file import pair

AT_ONCE = 2**28
"""Bytes of all files together that are checked before the first step; more would delay it by seconds."""
BLOCK = 2**23


def check_bytes(prefixes: Iterable[str | Path], quiet: bool = True) -> Callable[[], None]:
    """Compare each `.bin` with the sha256 in its manifest; a pair without one passes.

    Raises ValueError for a file that has changed. Where the files are large a thread reads them, with a line on stderr
    unless `quiet`; the returned function then raises the error, once it is found, and otherwise does nothing.
    """
    hashes = {}
    for prefix in prefixes:
        if (manifest := Manifest.read_sound(prefix)) and manifest.sha256:
            hashes[pair(prefix)[0]] = manifest.sha256
    size = sum(file.stat().st_size for file in hashes)
    if size <= AT_ONCE:
        for file, expected in hashes.items():
            _check(file, expected)
        return lambda: None
    errors: list[ValueError] = []

    def work() -> None:
        with suppress(OSError, AttributeError):  # Linux alone sets it for one thread
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        try:
            for file, expected in hashes.items():
                _check(file, expected)
        except ValueError as error:
            errors.append(error)
        except OSError:
            pass  # training reads the same file, and says more

    def found() -> None:
        if errors:
            raise errors[0]

    if not quiet:
        print(
            f"neox: {size / 1e9:.1f} GB of token files are compared with their manifests in the background",
            file=sys.stderr,
        )
    threading.Thread(target=work, name="token file check", daemon=True).start()
    return found


def _check(file: Path, expected: str) -> None:
    digest, buffer = hashlib.sha256(), bytearray(BLOCK)
    with file.open("rb", buffering=0) as opened:
        while count := opened.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    if digest.hexdigest() != expected:
        raise ValueError(
            f"{file}: its bytes are not those that `neox prepare` wrote (sha256 in {manifest_file(file)}): restore it "
            "from a copy, or prepare it again"
        )

"""The one reader of small structured files, JSON and TOML: whatever lies at a path, the error is one line.

A regular file only (a FIFO hangs, a device has no end), of bounded size, whose nesting Python can follow.
"""

from __future__ import annotations

import json
import re
import stat
import tomllib
from pathlib import Path
from typing import Any

from neox.config.options import ConfigError

LIMIT = 1 << 28
"""Largest size in bytes; the index of a 20B model has 100 kB, a large tokenizer.json 20 MB."""


def check_regular(path: Path, limit: int | None = LIMIT) -> None:
    """Raise ValueError where a path is no regular file, or is larger than `limit` bytes; OSError where it is absent."""
    status = path.stat()
    kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for test, name in kinds if test(status.st_mode)), "a device")
        raise ValueError(f"{path}: cannot be read: it is {kind}, no regular file")
    if limit is not None and status.st_size > limit:
        raise ValueError(f"{path}: has {status.st_size:,} bytes, more than such a file ever has ({limit:,})")


def read_small(path: Path) -> bytes:
    """Read a small file. Raises ValueError as `check_regular` does, OSError where it cannot be read."""
    check_regular(path)
    return path.read_bytes()


def parse_json(content: bytes | str) -> Any:
    """Parse JSON. Raises ValueError with the fault in one line, also for nesting that is too deep."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path, kind: type[dict[Any, Any]] | type[list[Any]] = dict) -> Any:
    """Read a JSON file that holds a `kind`, an object by default. Raises ValueError naming the file, OSError."""
    try:
        content = parse_json(read_small(path))
    except ValueError as error:
        text = str(error)
        raise ValueError(
            text if text.startswith(f"{path}: ") else f"{path}: not valid JSON ({text}); it may be truncated"
        ) from None
    if not isinstance(content, kind):
        what = "an object" if kind is dict else "a list"
        raise ValueError(f"{path}: must hold {what} of JSON, not {type(content).__name__}")
    return content


def read_toml(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Read a TOML file: content, and file:line of each key. Raises ConfigError."""
    try:
        text = read_small(path).decode("utf-8")
        table = tomllib.loads(text)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path}: not valid TOML: nested too deeply") from None
    except tomllib.TOMLDecodeError as error:
        line = re.search(r" \(at line (\d+), column \d+\)$", str(error))
        where = f"{path}:{line[1]}" if line else str(path)
        raise ConfigError(f"{where}: not valid TOML: {str(error)[: line.start()] if line else error}") from None
    except ValueError as error:  # no regular file, or an integer of more digits than Python reads
        text = str(error)
        raise ConfigError(text if text.startswith(f"{path}: ") else f"{path}: not valid TOML: {text}") from None
    lines, section = {}, ""
    for number, line_text in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[\s*([\w-]+)\s*\]", line_text):
            section = header[1]
            lines[section] = f"{path}:{number}"
        elif key := re.match(r"\s*([\w.-]+)\s*=", line_text):
            full = f"{section}.{key[1]}" if section else key[1]
            lines.setdefault(full, f"{path}:{number}")
            lines.setdefault(full.partition(".")[0], f"{path}:{number}")
    for name in table:
        lines.setdefault(name, str(path))
    return table, lines

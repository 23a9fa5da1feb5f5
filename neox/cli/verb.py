"""What every verb shares: its form, the error of a wrong command, the options that are its own, and the config."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from neox.config import Config

Verb = Callable[[list[str], list[str]], int | None]
"""(targets, options) -> exit status; None is 0."""


class UsageError(Exception):
    """The command itself is wrong, not what it was given: exit status 2."""


def resolve(targets: Sequence[str], options: Sequence[str]) -> Config:
    """The config that a preset's name, TOML files and key=value options add up to."""
    from neox.config import load_config, presets

    files = [t for t in targets if t not in presets.names() and (t.endswith(".toml") or os.path.isfile(t))]
    named = [t for t in targets if t not in files]
    if len(named) > 1:
        raise UsageError(f"one preset at a time, not {' and '.join(named)}")
    return load_config(named[0] if named else None, files, options)


def taken(options: Sequence[str], keys: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """The options with these keys, which are a verb's own, and the others."""
    own = dict(option.split("=", 1) for option in options if option.partition("=")[0] in keys)
    return own, [option for option in options if option.partition("=")[0] not in keys]

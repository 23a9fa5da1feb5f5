"""Parts of all verbs: the error of a wrong command, options, config."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, get_origin

if TYPE_CHECKING:
    from neox.config import Config, Section

S = TypeVar("S", bound="Section")


class UsageError(Exception):
    """Wrong command, as opposed to a wrong value in it: exit status 2."""


def resolve(targets: Sequence[str], options: Sequence[str]) -> Config:
    """Resolve a preset's name, TOML files and key=value options to a config."""
    from neox.config import load_config, presets

    files = [t for t in targets if t not in presets.names() and (t.endswith(".toml") or os.path.isfile(t))]
    if text := next((t for t in files if not t.endswith(".toml")), None):
        raise UsageError(f"{text}: a run file ends in .toml; text to train on is data.train={text}")
    named = [t for t in targets if t not in files]
    if len(named) > 1:
        raise UsageError(f"one preset at a time, not {' and '.join(named)}")
    return load_config(named[0] if named else None, files, options)


def read_options(cls: type[S], texts: Iterable[str]) -> tuple[S, list[str]]:
    """Read a section from ``key=value`` texts; return it and the other texts.

    Text for a key of the class's own is taken as it stands; a list may be given in parts, by a key that comes again.
    Raises ConfigError for a wrong value.
    """
    from neox.config import ConfigError
    from neox.config.options import is_text, literal, section_of

    values: dict[str, Any] = {}
    rest, origin = [], {}
    for text in texts:
        name, _, raw = text.partition("=")
        section, _, key = name.rpartition(".")
        if key not in cls.model_fields or section not in ("", section_of(cls, key)):
            rest.append(text)
            continue
        annotation = cls.model_fields[key].annotation
        verbatim = not section_of(cls, key) and get_origin(annotation) is not tuple and is_text(annotation)
        value = raw if verbatim else literal(raw, annotation, text)
        if get_origin(annotation) is tuple and key in values:
            value = [one for part in (values[key], value) for one in (part if isinstance(part, list) else [part])]
        values[key], origin[key] = value, f"from {text}"
    try:
        return cls(**values), rest
    except ConfigError as error:
        source = origin.get(error.key.partition("[")[0].rpartition(".")[2])
        raise ConfigError(f"{error} ({source})" if source else str(error), error.key) from None


def read_all(verb: str, cls: type[S], options: Sequence[str]) -> S:
    """Read the options of a verb that takes no others.

    Raises UsageError for an unknown option, ConfigError for a wrong value.
    """
    from neox.config.options import did_you_mean

    own, rest = read_options(cls, options)
    if rest:
        key = rest[0].partition("=")[0]
        raise UsageError(f"{verb} has no option {key}; {did_you_mean(key, cls.model_fields)}")
    return own


def one_model(verb: str, targets: Sequence[str]) -> str:
    """The only target, a MODEL. Raises UsageError."""
    if len(targets) != 1:
        raise UsageError(f"{verb} needs one MODEL, not {len(targets)}" if targets else f"{verb} needs one MODEL")
    return targets[0]

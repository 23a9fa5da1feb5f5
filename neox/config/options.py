"""Reading of options: base of the sections, TOML, ``key=value``, one-line errors, spelling of values.

The options themselves are in `neox.config`, which enters its sections in `SECTIONS`.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterable
from datetime import date, time
from typing import Any, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError


class ConfigError(ValueError):
    """Unusable configuration. ``key`` is the option at fault, as ``section.key``."""

    def __init__(self, message: str, key: str = "") -> None:
        # A value or a file name may hold a line break; the message stays one line.
        super().__init__(" ".join(message.split("\n")))
        self.key = key


class Section(BaseModel):
    """Frozen group of options. A wrong key or value raises a one-line ConfigError."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _one_line(type(self), error) from None

    def replace(self, **changes: Any) -> Self:
        """A copy with some options changed, all of them checked. Raises ConfigError."""
        return type(self)(**{**dict(self), **changes})


SECTIONS: dict[str, type[Section]] = {}
"""Every section by name; filled by neox.config."""


def parse_override(text: str) -> tuple[str, str, Any]:
    """Parse ``key=value`` to section (none for preset), key, value. Raises ConfigError."""
    name, equals, raw = text.partition("=")
    name = name.strip()
    if not equals or not name:
        raise ConfigError(f"{text!r}: expected key=value, such as train.steps=10")
    if name == "preset":
        return "", name, raw.strip()
    section, dot, key = name.rpartition(".")
    if not dot:
        owners = [s for s, cls in SECTIONS.items() if key in cls.model_fields]
        if len(owners) > 1:
            raise ConfigError(f"{key}: is in several sections, write {' or '.join(f'{s}.{key}=' for s in owners)}", key)
        section = owners[0] if owners else ""
        if name == "schedule":
            raise ConfigError(
                "schedule: write schedule.name= for the learning rate, or parallel.schedule= for the pipeline"
            )
    if section not in SECTIONS or key not in SECTIONS[section].model_fields:
        raise ConfigError(f"{name}: no such key{suggest_key(section, key)} (from {text})", name)
    return section, key, literal(raw, SECTIONS[section].model_fields[key].annotation, text)


def literal(raw: str, annotation: Any, text: str) -> Any:
    """A typed value: a TOML literal or else a bare string, whose white space counts where the option is text."""
    wants_list = get_origin(annotation) is tuple
    if not is_text(annotation):
        raw = raw.strip()
    if annotation is bool and raw in ("True", "False"):  # as Python spells them
        raw = raw.lower()
    try:
        table = tomllib.loads(f"value = {raw}")
        value = table["value"] if len(table) == 1 else raw
    except (ValueError, RecursionError):  # the first also for an integer of more digits than Python reads
        if wants_list and raw.startswith("[") and raw.endswith("]"):
            raise ConfigError(f'{text}: not a list; its texts need quotes, as in \'["a", "b"]\'') from None
        return raw
    # A directory may be called 2024-01-01, or 7, a regex [1]: an option of type text takes the typed text.
    wants_text = is_text(annotation)
    if isinstance(value, date | time) or (wants_text and not isinstance(value, (str, list) if wants_list else str)):
        return raw
    return value


def is_text(annotation: Any) -> bool:
    return annotation is str or str in get_args(annotation)


def suggest_key(section: str, key: str) -> str:
    """Hint for an unknown key: another program's word, same name elsewhere, nearest here, nearest anywhere."""
    from neox.config.elsewhere import meaning

    if named := meaning(key):
        return f"; {named}"
    everywhere = [f"{s}.{k}" for s, cls in SECTIONS.items() for k in cls.model_fields]
    same = [name for name in everywhere if name.endswith(f".{key}")]
    here = [name for name in everywhere if name.startswith(f"{section}.")]
    has = f"{section} has {', '.join(SECTIONS[section].model_fields)}" if section in SECTIONS else "see docs/options.md"
    return "; " + did_you_mean(key, same or here, did_you_mean(key, everywhere, has))


def section_of(cls: type[Section], key: str = "") -> str:
    """Name of the section that defines a class's option; empty for its own."""
    bases = [base for base in cls.__mro__ if issubclass(base, Section) and base is not Section]
    bases = [base for base in bases if key in base.model_fields][-1:] or bases
    return next((name for name, section in SECTIONS.items() if issubclass(section, tuple(bases))), "")


def _one_line(cls: type[Section], error: ValidationError) -> ConfigError:
    """The first of pydantic's complaints as one line, led by section.key."""
    faults = error.errors()
    first = faults[0]
    section = section_of(cls, str(first["loc"][0]) if first["loc"] else "")
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    key = section
    for part in first["loc"]:
        key += f"[{part}]" if isinstance(part, int) else f".{part}" if key else str(part)
    if first["type"] == "extra_forbidden":
        return ConfigError(f"{key}: no such key{suggest_key(section, str(first['loc'][-1]))}{more}", key)
    if first["type"] == "value_error":
        inner = str(first["ctx"]["error"])
        named = re.match(r"[\w.]+(?=(\[\d+\])?: )", inner)
        if named:
            key = f"{section}.{named[0]}" if section else named[0]
            return ConfigError((f"{section}." if section else "") + inner + more, key)
        return ConfigError(f"{key}: {inner}{more}", key)
    if first["type"] == "missing":
        return ConfigError(f"{key}: is missing{more}", key)
    message = re.sub(r"^\w+ should", "must", first["msg"])
    got = repr(first["input"])
    from neox.config.elsewhere import VALUES

    more += f"; write {VALUES[first['input']]}" if first["input"] in list(VALUES) else ""
    return ConfigError(f"{key}: {message}, got {got if len(got) <= 60 else got[:57] + '...'}{more}", key)


def spell(value: object) -> str:
    """A value as one types it after ``key=``: none, true, bare text, a JSON list."""
    if value is None or isinstance(value, str):
        return value or ("none" if value is None else "")
    return json.dumps(value, ensure_ascii=False, default=str)


def did_you_mean(word: str, options: Iterable[str], otherwise: str = "", nearest: int = 1) -> str:
    """Hint for an unknown word: the nearest options, or else all of them.

    `nearest` is their number, `otherwise` replaces the list of all. The last part of ``optim.lr`` counts.
    """
    options = list(options)
    bare = {option.rpartition(".")[2] if "/" not in option else option: option for option in reversed(options)}
    near = [option for option in options if option.endswith(f".{word}")]
    near = near or [bare[name] for name in difflib.get_close_matches(word, bare, nearest)]
    return f"did you mean {' or '.join(near)}?" if near else otherwise or f"there are {', '.join(options)}"

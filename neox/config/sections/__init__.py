"""Types of option values, as TOML and the command line spell them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field


# TOML has no null, and a resolved file must still be able to undo what a preset sets: hence the word.
def none(value: Any) -> Any:
    return None if value == "none" else value


def listed(value: Any) -> Any:
    """A list as the tuple of a frozen section; one string is a list of one."""
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


def pairs(value: Any) -> Any:
    """A table as pairs, so that sections can be hashed; `to_toml` writes pairs."""
    for key in value if isinstance(value, Mapping) else ():
        if isinstance(key, int) and key < 0:
            raise ValueError(f"{key} is no token")
    pairs = [(str(key), number) for key, number in value.items()] if isinstance(value, Mapping) else value
    if not isinstance(pairs, list | tuple):
        raise ValueError('must be a table such as {" the" = -100, 262 = 5}')
    return tuple(listed(pair) for pair in pairs)


def json_text(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, Mapping) else none(value)


def project(value: Any) -> Any:
    """A project's name: a switch, as other programs have it, names none."""
    if str(value).lower() in ("true", "yes", "1", "on"):
        raise ValueError(f"{value} names no project: log.wandb=my-project")
    return None if str(value).lower() in ("none", "false", "no", "0", "off") else value


def separated(value: Any) -> Any:
    """Names as one writes them on a command line: a,b."""
    return tuple(name.strip() for name in value.split(",") if name.strip()) if isinstance(value, str) else listed(value)


OptionalInt = Annotated[int | None, BeforeValidator(none)]
OptionalFloat = Annotated[float | None, BeforeValidator(none)]
OptionalStr = Annotated[str | None, BeforeValidator(none)]
Strings = Annotated[tuple[str, ...], BeforeValidator(listed)]
Names = Annotated[tuple[str, ...], BeforeValidator(separated)]
Ints = Annotated[tuple[int, ...], BeforeValidator(listed)]
Weights = Annotated[tuple[Annotated[float, Field(gt=0)], ...], BeforeValidator(listed)]
Biases = Annotated[tuple[tuple[str, Annotated[float, Field(ge=-100, le=100)]], ...], BeforeValidator(pairs)]
Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
NotNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]

"""Help, tables of the guides and JSON schema, from the options' fields.

    python -m neox.cli.reference docs/*.md        # writes the tables of the guides anew

A guide has its tables between ``<!-- options eval: tasks limit -->`` and ``<!-- end of options -->``: some options of a
verb or of a section, or all of them where none are named.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args, get_origin

from neox.config import SECTIONS, Config, Section, presets
from neox.config.options import section_of, spell

MARKED = re.compile(r"(<!-- options ([\w ]+?)(?:: ([\w. ]+))? -->\n).*?(<!-- end of options -->)", re.DOTALL)
TOPICS = ("inspect run", "inspect tokenizer", "inspect data", "inspect coordinates")
VERBS = ("prepare", "eval", "generate", "convert", "show", "bench", "doctor", *TOPICS)
KINDS = {str: "TEXT", int: "N", float: "X"}


def help_text(verb: ModuleType) -> str:
    """Help of a verb: its docstring, with its options before the examples."""
    lines = []
    for group in verb.OPTIONS if isinstance(verb.OPTIONS, tuple) else (verb.OPTIONS,):
        if isinstance(group, str):
            section, _, key = group.partition(".")
            lines.append(_help_line(SECTIONS[section], key, group))
        else:
            lines += [_help_line(group, key, key) for key in keys_of(group)]
    text = (verb.__doc__ or "").strip()
    before, examples, after = text.partition("\nExamples:\n")
    return "\n".join([before, *(["Options:", *lines, ""] if lines else []), (examples + after).strip("\n")])


def keys_of(cls: type[Section]) -> list[str]:
    """Options in the order of help: those of the class, then its bases'."""
    bases = [base for base in cls.__mro__ if issubclass(base, Section)]
    return list(dict.fromkeys(key for base in bases for key in base.__annotations__ if key in cls.model_fields))


def table(cls: type[Section], keys: Iterable[str] = (), prefix: str = "") -> str:
    """Markdown table of options. Raises KeyError for an unknown one."""
    rows = ["| option | default | description |", "|---|---|---|"]
    for key in keys or keys_of(cls):
        default, text = cls.model_fields[key].default, _described(cls, key).replace("|", r"\|")
        shown = f" `{spell(default)}`" if default not in ((), "", None) or "none = " in text else ""
        rows.append(f"| `{prefix}{key}` |{shown} | {text} |")
    return "\n".join(rows) + "\n"


def with_tables(text: str) -> str:
    """A guide's text with fresh tables. Raises KeyError for an unknown option."""

    def made(match: re.Match[str]) -> str:
        start, name, keys, end = match.groups()
        return start + table(_named(name), (keys or "").split(), "" if name in VERBS else f"{name}.") + end

    return MARKED.sub(made, text)


def all_options() -> str:
    """Page with all options of a config and of the verbs."""
    parts = [
        "# All options\n",
        "Options of a run file (TOML), of the command line (`section.key=value`, or `key=value` where one section has\n"
        "it) and of Python (`neox.Config`). `neox show` prints the values of a config, and `neox show\n"
        "config_schema=FILE.json` writes a JSON schema for editors. `make reference` generates this page from\n"
        "`neox/config/sections` and `neox/cli`.\n",
    ]
    parts += [f"## [{name}]\n\n{_doc(cls)}\n\n{table(cls)}" for name, cls in SECTIONS.items()]
    for verb in ("train", *VERBS):
        cls = _verb_options(verb)
        keys = [key for key in keys_of(cls) if not section_of(cls, key)]
        parts.append(f"## neox {verb}\n\n{table(cls, keys)}")
    return "\n".join(parts)


def json_schema() -> str:
    """JSON schema of run files, for completion and checks in editors."""
    schema = Config.model_json_schema()
    schema["properties"]["preset"]["enum"] = ["none", *presets.names()]
    return json.dumps({"$schema": "http://json-schema.org/draft-07/schema#", **_as_toml(schema)}, indent=1) + "\n"


def _as_toml(schema: Any) -> Any:
    """Schema of the values in TOML: "none" for null, lists or tables for pairs."""
    if isinstance(schema, list):
        return [_as_toml(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("type") == "null":
        return {"const": "none"}
    if schema.get("type") == "array" and "prefixItems" in schema.get("items", {}):
        return {**schema, "type": ["array", "object"], "items": {}, "default": {}}
    if "prefixItems" in schema:
        schema = {**schema, "items": schema["prefixItems"]}
        del schema["prefixItems"]
    return {key: _as_toml(value) for key, value in schema.items() if value is not None}


def _help_line(cls: type[Section], key: str, name: str) -> str:
    field = cls.model_fields[key]
    if field.default is None or field.default in ((), ""):
        kinds = [KINDS[kind] for kind in (*get_args(field.annotation), field.annotation) if kind in KINDS] or ["NAME"]
        shown = field.title or ("LIST" if get_origin(field.annotation) is tuple else kinds[0])
    else:
        shown = spell(field.default)
    first = f"  {f'{name}={shown}':<21}  "
    text = _described(cls, key)
    return textwrap.fill(text, 100, initial_indent=first, subsequent_indent=" " * 25, break_on_hyphens=False)


def _described(cls: type[Section], key: str) -> str:
    """Description of an option, followed by choices that it does not name."""
    field = cls.model_fields[key]
    text = " ".join((field.description or "").split())
    literals = [kind for kind in (field.annotation, *get_args(field.annotation)) if get_origin(kind) is Literal]
    choices = [spell(choice) for choice in get_args(literals[0])] if literals else []
    missing = any(not re.search(rf"(?<![\w_]){re.escape(choice)}(?![\w_])", text) for choice in choices)
    return f"{text} One of {', '.join(choices)}." if missing else text


def _doc(cls: type[Section]) -> str:
    return " ".join((cls.__doc__ or "").split())


def _named(name: str) -> type[Section]:
    """Options of a verb, or else of a section."""
    return _verb_options(name) if name in VERBS else SECTIONS[name]


def _verb_options(verb: str) -> type[Section]:
    options = import_module(f"neox.cli.{verb.replace(' ', '_')}").OPTIONS
    cls: type[Section] = options[0] if isinstance(options, tuple) else options
    return cls


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_text(all_options() if path.name == "options.md" else with_tables(path.read_text()))

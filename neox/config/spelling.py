"""Values as a user types them, and hints for a word that names nothing."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable


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

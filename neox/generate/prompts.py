"""Prompts from a file: one a line of a .txt or .jsonl."""

import json
import operator
from pathlib import Path
from typing import Any

KEYS = ("prompt", "context")
"""Keys of the prompt in a line of JSON; gpt-neox writes the second."""


def read_prompts(path: str | Path) -> list[tuple[str, str]]:
    """(prompt, file:line) of each prompt of a .txt or .jsonl file, in order.

    A prompt is taken as it stands, spaces included; lines of white space are passed over. In a .jsonl it may be empty.
    Raises FileNotFoundError, and ValueError with file and line for another suffix, bytes that are no UTF-8, a line that
    is no JSON object with a prompt, and a file without one.
    """
    path = Path(path)
    if path.suffix.lower() not in (".txt", ".jsonl"):
        raise ValueError(f"{path}: prompts come from a .txt (one a line) or a .jsonl (key {' or '.join(KEYS)})")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    prompts = []
    for number, raw in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        where = f"{path}:{number}"
        try:
            line = raw.removesuffix(b"\r").decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: not UTF-8 at byte {error.start} of the line; convert the file") from None
        if line.strip():
            prompts.append((_from_json(line, where) if path.suffix.lower() == ".jsonl" else line, where))
    if not prompts:
        raise ValueError(f"{path}: no prompt in it; write one a line, or give prompt='' to start from nothing")
    return prompts


def _from_json(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg}: column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise ValueError(f"{where}: not JSON ({reason}); every line must be one JSON object") from None
    if not isinstance(value, dict):
        raise ValueError(f'{where}: not a JSON object such as {{"prompt": "..."}}')
    key = next((key for key in KEYS if key in value), None)
    if key is None:
        raise ValueError(f"{where}: no key {' or '.join(KEYS)} (keys here: {', '.join(list(value)[:8]) or 'none'})")
    prompt = value[key]
    if not isinstance(prompt, str):
        raise ValueError(f"{where}: key {key} must hold a string")
    return prompt


def token_ids(prompt: Any) -> list[int]:
    """Token ids of a list, an array or a tensor of one dimension. Raises ValueError for values that are no integers."""
    values = prompt.tolist() if hasattr(prompt, "tolist") else list(prompt)
    try:
        return [operator.index(value) for value in values]
    except TypeError:
        wrong = next(value for value in values if not hasattr(value, "__index__"))
        raise ValueError(f"a prompt of token ids holds {wrong!r}: give whole numbers, one list a prompt") from None


def prompt_list(prompts: Any) -> list[Any]:
    """The prompts of a call: one is a text or a sequence of token ids; an array of two dimensions has one a row."""
    if hasattr(prompts, "tolist"):
        prompts = prompts.tolist()
    first = prompts[0] if len(prompts) else None
    single = isinstance(prompts, str) or isinstance(first, int | float) or getattr(first, "ndim", None) == 0
    return [prompts] if single else list(prompts)

"""Constrained output: the tokens that a JSON schema, a regular expression or a grammar allows next.

llguidance parses the tokens so far and walks the vocabulary's bytes for the allowed ones; it knows nothing of models or
torch. A JSON schema is one of its subset of JSON Schema, a grammar is in its dialect of Lark. Shapes: V vocab.
"""

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neox.config.structured import read_small
from neox.system.optional import optional
from neox.tokenizer import Tokenizer

OPTIONS = ("json_schema", "regex", "grammar")
# Between JSON's tokens a space, or a line break and its indentation. Without a bound a weak model may never leave it.
JSON_SPACE = r"( |\n {0,32})?"
DEAD_END = "no token may come next: it has no end, or names special tokens"


class Constraint:
    """The allowed tokens of one sequence, so that every finished output matches or validates."""

    def __init__(self, option: str, source: str, tokenizer: Tokenizer | None) -> None:
        """`option` is one of OPTIONS, `source` its text.

        Raises ValueError where `source` is wrong or allows no output, and without an end-of-document token.
        """
        if tokenizer is None:
            raise ValueError(f"generate.{option} needs a tokenizer: this model was loaded without one")
        if tokenizer.eod_id is None:
            raise ValueError(f"generate.{option} needs an end-of-document token, which this tokenizer does not have")
        self.option, self.eod = option, tokenizer.eod_id
        self._specials = list(tokenizer.special_tokens.values())
        self._matcher = _matcher(option, source, tokenizer).deep_copy()
        self.allowed()

    def allowed(self) -> Tensor:
        """Tokens (bool [V]) that may come next; end-of-document exactly where the output is complete.

        A text without alternatives comes in the tokens of its encoding. Raises ValueError where no token is allowed (a
        grammar without an end, or with special tokens), and beyond the library's limits.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed = torch.from_numpy(np.unpackbits(bits, bitorder="little")).bool()
        # A grammar can name tokens by number, special ones too.
        allowed[self._specials] = False
        allowed[self.eod] = self._matcher.is_accepting()
        self._check()
        if not allowed.any():
            raise ValueError(f"generate.{self.option}: {DEAD_END}")
        return allowed

    def take(self, token: int) -> None:
        """Append `token`, an allowed one. Raises ValueError beyond the library's limits."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if error := self._matcher.get_error():
            reason = DEAD_END if error.startswith("NoExtension") else _reason(self.option, error)
            raise ValueError(f"generate.{self.option}: {reason}")


def read(option: str, value: str) -> tuple[str, str]:
    """(text, file name or "") of `generate.OPTION`; a schema may be a file, a grammar always is one."""
    if option == "regex" or (option == "json_schema" and value.lstrip().startswith("{")):
        return value, ""
    try:
        return read_small(Path(value)).decode("utf-8"), value
    except OSError as error:
        hint = ", or write the schema itself, {...}" if option == "json_schema" else ""
        raise ValueError(f"generate.{option}: {value}: {error.strerror}; give a file{hint}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"generate.{option}: {value}: not text (no UTF-8 at byte {error.start})") from None


@lru_cache(maxsize=32)
def check(option: str, source: str) -> str:
    """llguidance's form of an option's text. Raises ValueError with place and reason, or the package to install."""
    matcher = optional("llguidance", f"generate.{option}", "grammar").LLMatcher
    place = ""
    try:
        if option == "json_schema":
            parsed = json.loads(source)
            form: str = matcher.grammar_from_json_schema(source, defaults={"whitespace_pattern": JSON_SPACE})
        else:
            form = matcher.grammar_from_regex(source) if option == "regex" else matcher.grammar_from_lark(source)
        fault = matcher.validate_grammar(form)
        if fault and option == "json_schema":
            place = f" (at #{_pointer(parsed, fault)})"
    except (json.JSONDecodeError, RecursionError) as error:
        at = f", line {error.lineno} column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise ValueError(f"generate.{option}: not JSON{at}: {getattr(error, 'msg', 'nested too deeply')}") from None
    except ValueError as error:
        fault = str(error)
    if fault:
        raise ValueError(f"generate.{option}: {_reason(option, fault)}{place}")
    return form


def _pointer(part: Any, fault: str, pointer: str = "") -> str:
    """JSON pointer of an innermost schema with this fault, which the library does not give; "" for the whole."""
    from llguidance import LLMatcher

    inner = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ()
    if deeper := next(filter(None, (_pointer(value, fault, f"{pointer}/{key}") for key, value in inner)), ""):
        return deeper
    fails = isinstance(part, dict) and fault == LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(part))
    return pointer if fails else ""


def _reason(option: str, message: str) -> str:
    """The library's error in one line, with its place in words."""
    first = message.partition("\n")[0]
    # A pattern is shown indented by four, its slashes escaped, with carets below.
    error = re.search(r"^    (.*)\n    ( *)\^+\nerror: (.*)$", message, re.MULTILINE)
    if option == "regex":
        before = error[1][: len(error[2])].replace(r"\/", "/") if error else ""
        return f"character {len(before) + 1}: {error[3]}" if error else first.rpartition("(in regex): ")[2]
    text = f"{first} {error[3]}" if error else first
    return re.sub(r"^(?:at )?(\d+)\((\d+)\): ", r"line \1, column \2: ", text)


class _Vocabulary:
    """A tokenizer as llguidance takes it."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        assert tokenizer.eod_id is not None
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.eod_id
        self.special_token_ids = [tokenizer.eod_id]
        # Special tokens without bytes: no text leads to them, and no grammar can name them.
        specials = set(tokenizer.special_tokens.values())
        self.tokens = [b"" if id in specials else text for id, text in enumerate(tokenizer.bytes_of_tokens)]
        self.tokens[self.eos_token_id] = b"end"  # llguidance wants a name; a grammar writes names as <name>

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)


@lru_cache(maxsize=4)
def _vocabulary(tokenizer: Tokenizer) -> Any:
    from llguidance import LLTokenizer, TokenizerWrapper

    return LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer)))


@lru_cache(maxsize=32)
def _matcher(option: str, source: str, tokenizer: Tokenizer) -> Any:
    """A matcher before the first token, for copies that share its view of the vocabulary."""
    form = check(option, source)
    from llguidance import LLMatcher

    matcher = LLMatcher(_vocabulary(tokenizer), form, log_level=0)
    if not matcher.is_error():
        matcher.compute_bitmask()
    return matcher

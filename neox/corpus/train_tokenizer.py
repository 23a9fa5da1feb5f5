"""The tokenizer that `neox prepare` trains on the text, and finds again later."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from neox.config.structured import read_json
from neox.corpus.plan import Plan
from neox.corpus.readers import Name, OnError, find_sources, read_documents
from neox.data.token_file import beside
from neox.system.files import write_atomic
from neox.tokenizer import Tokenizer, train_bpe

TRAINED = "-tokenizer.json"


def trained_tokenizer(
    sources: Sequence[Name],
    out_prefix: str,
    training: dict[str, Any],
    text_key: str = "text",
    on_error: OnError = "fail",
    overwrite: bool = False,
) -> Tokenizer:
    """Train the tokenizer `<out_prefix>-tokenizer.json`, unless it exists for these files and options.

    `training` holds the options of `train_bpe`. What it was made from is noted in `<out_prefix>-tokenizer.from.json`.
    Raises what `read_documents` and `train_bpe` raise.
    """
    path, origin = beside(out_prefix, TRAINED), beside(out_prefix, "-tokenizer.from.json")
    options = json.loads(json.dumps(training)) | {"text_key": text_key, "on_error": on_error}
    found = find_sources(sources, text_key, on_error)
    made_from = {"options": options, "text": Plan.of(found, options).key()}
    with suppress(OSError, ValueError):
        tokenizer = Tokenizer.from_file(path)
        if read_json(origin) == made_from | {"tokenizer_sha256": tokenizer.sha256}:
            return tokenizer
    if path.exists() and not overwrite:
        raise ValueError(
            f"{path}: exists, and was not trained on this text with these options: name it, tokenizer={path}, choose "
            "another out=, or set overwrite=true to train it anew"
        )
    tokenizer = train_bpe(read_documents(found, text_key, on_error), **training)
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(path)
    made_from["tokenizer_sha256"] = tokenizer.sha256
    write_atomic(origin, (json.dumps(made_from, indent=2) + "\n").encode("utf-8"))
    return tokenizer


def keep_tokenizer(tokenizer: Tokenizer, out_prefix: str) -> None:
    """Copy the tokenizer that tokens were made with to `<out_prefix>-tokenizer.json`, unless it lies there."""
    path = beside(out_prefix, TRAINED)
    with suppress(OSError, ValueError):
        if Tokenizer.from_file(path).sha256 == tokenizer.sha256:
            return
    tokenizer.save(path)
    beside(out_prefix, "-tokenizer.from.json").unlink(missing_ok=True)

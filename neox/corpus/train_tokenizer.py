"""The tokenizer that `neox prepare` trains on the text, and finds again later."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from neox.corpus.plan import Plan
from neox.corpus.readers import Name, OnError, find_sources, read_documents
from neox.system.files import write_atomic
from neox.tokenizer import Tokenizer, train_bpe


def trained_tokenizer(
    sources: Sequence[Name],
    out_prefix: str,
    training: dict[str, Any],
    text_key: str = "text",
    on_error: OnError = "fail",
) -> Tokenizer:
    """Train the tokenizer `<out_prefix>-tokenizer.json`, unless it exists for these files and options.

    `training` holds the options of `train_bpe`. What it was made from is noted in `<out_prefix>-tokenizer.from.json`.
    Raises what `read_documents` and `train_bpe` raise.
    """
    path, origin = Path(f"{out_prefix}-tokenizer.json"), Path(f"{out_prefix}-tokenizer.from.json")
    options = json.loads(json.dumps(training)) | {"text_key": text_key, "on_error": on_error}
    found = find_sources(sources, text_key, on_error)
    made_from = {"options": options, "text": Plan.of(found, options).key()}
    with suppress(OSError, ValueError):
        tokenizer = Tokenizer.from_file(path)
        if json.loads(origin.read_bytes()) == made_from | {"tokenizer_sha256": tokenizer.sha256}:
            return tokenizer
    tokenizer = train_bpe(read_documents(found, text_key, on_error), **training)
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(path)
    made_from["tokenizer_sha256"] = tokenizer.sha256
    write_atomic(origin, (json.dumps(made_from, indent=2) + "\n").encode("utf-8"))
    return tokenizer

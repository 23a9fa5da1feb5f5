"""The tokenizer that `neox prepare` trains on the text, and finds again later."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from neox.config.structured import read_json
from neox.corpus.plan import Plan
from neox.corpus.preparation import check_foreign, refuse_existing
from neox.corpus.readers import Name, OnError, find_sources, read_documents
from neox.data.manifest import Manifest
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
    Raises what `read_documents` and `train_bpe` raise; ValueError, with nothing written, where the output holds other
    tokens or another tokenizer and `overwrite` is false, and where another program wrote its `.json`.
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
    check_foreign(out_prefix)
    manifest = Manifest.read(out_prefix)
    if manifest is None and not overwrite:
        refuse_existing(out_prefix)
    tokenizer = train_bpe(read_documents(found, text_key, on_error), **training)
    if manifest and manifest.tokenizer_sha256 != tokenizer.sha256 and not overwrite:
        refuse_existing(out_prefix)
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(path)
    made_from["tokenizer_sha256"] = tokenizer.sha256
    write_atomic(origin, (json.dumps(made_from, indent=2) + "\n").encode("utf-8"))
    return tokenizer


def is_kept(tokenizer: Tokenizer, out_prefix: str) -> bool:
    """Tell whether `<out_prefix>-tokenizer.json` holds the tokenizer."""
    with suppress(OSError, ValueError):
        return Tokenizer.from_file(beside(out_prefix, TRAINED)).sha256 == tokenizer.sha256
    return False


def refuse_other(tokenizer: Tokenizer, out_prefix: str) -> None:
    """Raise ValueError where `<out_prefix>-tokenizer.json` is another file than the tokenizer's."""
    path = beside(out_prefix, TRAINED)
    if path.exists() and not is_kept(tokenizer, out_prefix):
        raise ValueError(
            f"{path}: exists, and is not the tokenizer that tokenizer= names: choose another out=, or set "
            "overwrite=true to replace it"
        )


def keep_tokenizer(tokenizer: Tokenizer, out_prefix: str) -> None:
    """Copy the tokenizer that tokens were made with to `<out_prefix>-tokenizer.json`, unless it lies there."""
    if not is_kept(tokenizer, out_prefix):
        tokenizer.save(beside(out_prefix, TRAINED))
        beside(out_prefix, "-tokenizer.from.json").unlink(missing_ok=True)

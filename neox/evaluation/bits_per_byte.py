"""Bits per byte on the Pile by component and group, as the Pile's paper defines it.

Each document is scored alone. A long one is cut into disjoint segments of at most the context's length, and each token
is scored once (appendix E.2). The first token of a document is predicted from the end-of-document token, the first of a
later segment from the token before it, as in lm-eval. lm-eval's score of the last segment is slightly better, because
it extends that segment backwards to the full context.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from neox.corpus.pile.components import documents_with_component
from neox.corpus.pile.statistics import Likelihood, by_group, in_order, likelihood_page, total
from neox.corpus.readers import find_sources
from neox.corpus.shards import shards
from neox.generate.score import token_logprobs
from neox.system.console import progress_bar
from neox.system.files import write_atomic
from neox.tokenizer import Tokenizer


def score(
    logits_of: Callable[[Tensor], Tensor],
    tokenizer: Tokenizer,
    documents: Iterable[tuple[str, str]],
    window: int,
    batch: int = 8,
) -> dict[str, Likelihood]:
    """Log-likelihood of documents (component, text), summed by component.

    `logits_of` maps tokens [B, T] to logits [B, T, V] with T <= `window`. Text that spells a special token is encoded
    as text. Raises ValueError where the tokenizer has no end-of-document token.
    """
    if tokenizer.eod_id is None:
        raise ValueError("bits per byte need a tokenizer with an end-of-document token, to predict first tokens from")
    by_component: dict[str, Likelihood] = {}
    for component, text in documents:
        tokens = tokenizer.encode(text, specials=False)
        logprobs = token_logprobs(logits_of, tokens, window, stride=window, batch=batch, first=tokenizer.eod_id)
        more = Likelihood(logprobs.double().sum().item(), len(text.encode()), len(tokens))
        by_component[component] = by_component.get(component, Likelihood()) + more
    return by_component


def score_files(
    logits_of: Callable[[Tensor], Tensor],
    tokenizer: Tokenizer,
    name: str,
    sources: str | list[str],
    out: Path,
    window: int,
    limit: int | None = None,
    progress: bool = True,
) -> dict[str, Likelihood]:
    """Score the first `limit` documents (all without one) of files of the Pile, such as its `test.jsonl.zst`.

    Writes `<out>/bits_per_byte.json` and `.md`, in which the model is called `name`. Raises what `score` and the
    readers raise, and ValueError on a document without a component.
    """
    pieces = shards(find_sources(sources))
    with progress_bar("bytes", show=progress) as bar:
        task = bar.add_task("score", total=sum(shard.size for shard in pieces) or None)

        def texts() -> Iterator[tuple[str, str]]:
            documents = (row for shard in pieces for row in documents_with_component(shard))
            for number, (document, component) in enumerate(documents):
                if number == limit:
                    break
                yield component, document.text
                bar.advance(task, document.taken)

        found = score(logits_of, tokenizer, texts(), window)
    if not found:
        raise ValueError(f"{sources}: holds no document to score")
    rows = {**{component: found[component] for component in in_order(found)}, **by_group(found)}
    rows["total"] = total(found.values())
    # Without text there is no figure, and JSON has no NaN.
    content = {
        key: asdict(row) | {"bits_per_byte": None if math.isnan(row.bits_per_byte) else row.bits_per_byte}
        for key, row in rows.items()
    }
    write_atomic(out / "bits_per_byte.json", json.dumps({"model": name, "rows": content}, indent=1).encode())
    write_atomic(out / "bits_per_byte.md", f"# {name}\n\n{likelihood_page(found, name)}".encode())
    return found

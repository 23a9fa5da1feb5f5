"""Tokenize one shard: the unit of work of `prepare`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from neox.corpus.clean.cleaning import Cleaning
from neox.corpus.encode import Backend, Difference, Encoder
from neox.corpus.pile.components import Components, ReadShard
from neox.corpus.plan import Plan, ShardOutputs
from neox.corpus.pool import Task, worker_loop
from neox.corpus.readers import ErrorPolicy, OnError
from neox.corpus.readers.errors import SkipReport
from neox.corpus.readers.urls import ends_digest
from neox.corpus.shards import Shard, batches, documents
from neox.data.token_file import TokenWriter, token_dtype
from neox.tokenizer import Tokenizer

BATCH_CHARACTERS = 1 << 20
BATCH_DOCUMENTS = 4096


@dataclass
class ShardCounts:
    """Counts of the documents that were read."""

    bytes: int = 0
    """UTF-8 bytes of the documents' text."""
    empty: int = 0
    """Documents left out because they hold no text."""
    origins: list[list[Any]] = field(default_factory=list)
    """[source, documents that hold text], in order."""

    def add_origins(self, origins: Iterable[Sequence[Any]]) -> None:
        """Count more documents of these sources, which come next."""
        for source, count in origins:
            if self.origins and self.origins[-1][0] == source:
                self.origins[-1][1] += count
            else:
                self.origins.append([source, count])


@dataclass(frozen=True)
class Work:
    """Everything that tokenizes the shards of a plan, set up once a process."""

    plan: Plan
    read: ReadShard
    encoder: Encoder

    @classmethod
    def of(cls, plan: Plan, tokenizer: Tokenizer, backend: Backend) -> Work:
        """Set up the work on a plan. Raises ValueError as Encoder does."""
        return cls(plan, reader(plan), Encoder(tokenizer, backend, plan.settings["special_in_text"] == "token"))


def reader(plan: Plan) -> ReadShard:
    """Choose the function that reads a shard: all documents, or those that cleaning keeps."""
    read: ReadShard = documents
    if "cleaning" in plan.settings:
        read = Cleaning.from_plan(plan).documents
    if folder := plan.settings.get("components"):
        read = Components(Path(folder), read).documents
    return read


def tokenize(
    work: Work, shard: Shard, writer: TokenWriter, policy: ErrorPolicy, advance: Callable[[float], object]
) -> ShardCounts:
    """Write the tokens of a shard's documents, in order.

    `advance` is called with the bytes of the files as they are done.

    Raises ReadError on a document that cannot be read (unless the policy skips errors) and on a file that changes
    meanwhile; ValueError where a sample shows that the encoder is not exact; OSError.
    """
    counts = ShardCounts()
    settings, encoder = work.plan.settings, work.encoder
    end = np.array([encoder.tokenizer.eod_id] if settings["append_eod"] else [], dtype=np.int64)
    numbered = enumerate(work.read(shard, settings["text_key"], policy, None))
    for batch in batches(numbered, lambda row: len(row[1].text), BATCH_CHARACTERS, BATCH_DOCUMENTS):
        texts = [document.text for _, document in batch if document.text]
        counts.add_origins((document.source, 1) for _, document in batch if document.text)
        counts.bytes += sum(len(text.encode("utf-8")) for text in texts)
        counts.empty += len(batch) - len(texts)
        taken = sum(document.taken for _, document in batch) / max(1, sum(map(len, texts)))
        sizes, size, held = [], 0, 0
        ids = []
        try:
            for part in encoder.encode(texts):
                ids += [part.ids, end] if part.last else [part.ids]
                size += len(part.ids)
                held += part.characters
                if part.last:
                    sizes.append(size + len(end))
                    size = 0
                else:
                    writer.add_tokens(np.concatenate(ids))
                    advance(taken * held)
                    ids, held = [], 0
        except Difference as error:
            number = [number for number, document in batch if document.text][error.document]
            raise ValueError(
                f"{shard.chunks[0].name}: document {number} from there: {error}; what is done stays: go on with "
                "data.backend=tokenizers"
            ) from None
        if ids:
            writer.add_tokens(np.concatenate(ids))
        writer.add_sizes(sizes)
        advance(taken * held)
    work.plan.check_unchanged(dict.fromkeys(chunk.name for chunk in shard.chunks), policy)
    return counts


def write_shard(
    outputs: ShardOutputs, work: Work, shard: Shard, on_error: OnError, advance: Callable[[float], object]
) -> None:
    """Write the token file of one shard, whole or not at all, unless it exists.

    Raises what `tokenize` raises.
    """
    if outputs.done_marker(work.plan, shard, ErrorPolicy(on_error)):
        advance(shard.size)
        return
    prefix = outputs.prefix(work.plan, shard)
    ends = {chunk.name: ends_digest(chunk.name) for chunk in shard.chunks if chunk.kind != "hub"}
    with TokenWriter(prefix, token_dtype(work.plan.settings["vocab_size"])) as writer, SkipReport(prefix) as report:
        policy = ErrorPolicy(on_error, report)
        counts = tokenize(work, shard, writer, policy, advance)
        report.place()
        writer.manifest = {
            "format": 1,
            "documents": writer.documents,
            "tokens": writer.tokens,
            **asdict(counts),
            "sha256": writer.sha256,
            "ends": ends,
            "skipped": {reason: asdict(skipped) for reason, skipped in policy.skipped.items()},
        }


def main(folder: str, on_error: OnError, backend: Backend) -> None:
    """Entry point of a process that tokenizes shards, see `neox.corpus.pool`."""

    def begin() -> Task:
        outputs = ShardOutputs(Path(folder).with_suffix(""))
        plan = Plan.read(outputs.plan_file)
        tokenizer = Tokenizer.from_file(outputs.folder / "tokenizer.json")
        if tokenizer.sha256 != plan.settings["tokenizer_sha256"]:
            raise ValueError(f"{outputs.folder / 'tokenizer.json'}: is not the tokenizer of the plan: begin anew")
        work = Work.of(plan, tokenizer, backend)
        return lambda number, advance: write_shard(outputs, work, plan.shards[number], on_error, advance)

    worker_loop(begin)

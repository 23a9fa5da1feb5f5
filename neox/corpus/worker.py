"""One shard to tokens: the task that all of `prepare` is made of, whoever runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from neox.corpus.clean.cleaning import Cleaning
from neox.corpus.encode import Backend, Difference, Encoder
from neox.corpus.pile.components import Components, Read
from neox.corpus.plan import Parts, Plan
from neox.corpus.pool import Task, serve
from neox.corpus.readers import Faults, OnError
from neox.corpus.readers.errors import SkipReport
from neox.corpus.readers.places import ends_digest
from neox.corpus.shards import Shard, batches, documents
from neox.data.token_file import TokenWriter, token_dtype
from neox.tokenizer import Tokenizer

BATCH_CHARACTERS = 1 << 20
BATCH_DOCUMENTS = 4096


@dataclass
class Counts:
    """What was read."""

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
    """What makes tokens of a plan's shards, set up once in a process."""

    plan: Plan
    read: Read
    encoder: Encoder

    @classmethod
    def of(cls, plan: Plan, tokenizer: Tokenizer, backend: Backend) -> Work:
        """Raises ValueError as Encoder does."""
        return cls(plan, reader(plan), Encoder(tokenizer, backend, plan.settings["special_in_text"] == "token"))


def reader(plan: Plan) -> Read:
    """The function that reads a shard: all of its documents, or those that the plan's cleaning keeps."""
    read: Read = documents
    if "cleaning" in plan.settings:
        read = Cleaning.again(plan).documents
    if folder := plan.settings.get("components"):
        read = Components(Path(folder), read).documents
    return read


def tokenize(
    work: Work, shard: Shard, writer: TokenWriter, faults: Faults, advance: Callable[[float], object]
) -> Counts:
    """Write the documents of a shard, in order; `advance` is told the bytes of the files as they are done.

    Raises Fault on what cannot be read (unless `faults` skips it) and on a file that changes meanwhile; ValueError
    where a sample shows that the encoder is not exact; OSError.
    """
    counts = Counts()
    settings, encoder = work.plan.settings, work.encoder
    end = np.array([encoder.tokenizer.eod_id] if settings["append_eod"] else [], dtype=np.int64)
    numbered = enumerate(work.read(shard, settings["text_key"], faults, None))
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
                f"{shard.pieces[0].name}: document {number} from there: {error}; what is done stays: go on with "
                "data.backend=tokenizers"
            ) from None
        if ids:
            writer.add_tokens(np.concatenate(ids))
        writer.add_sizes(sizes)
        advance(taken * held)
    work.plan.check_unchanged(dict.fromkeys(piece.name for piece in shard.pieces), faults)
    return counts


def make_part(parts: Parts, work: Work, shard: Shard, on_error: OnError, advance: Callable[[float], object]) -> None:
    """Make the part of one shard, whole or not at all, unless it is there already. Raises what `tokenize` raises."""
    if parts.marker(work.plan, shard, Faults(on_error)):
        advance(shard.size)
        return
    prefix = parts.prefix(work.plan, shard)
    ends = {piece.name: ends_digest(piece.name) for piece in shard.pieces if piece.kind != "hub"}
    with TokenWriter(prefix, token_dtype(work.plan.settings["vocab_size"])) as writer, SkipReport(prefix) as report:
        faults = Faults(on_error, report)
        counts = tokenize(work, shard, writer, faults, advance)
        report.place()
        writer.manifest = {
            "format": 1,
            "documents": writer.documents,
            "tokens": writer.tokens,
            **asdict(counts),
            "sha256": writer.sha256,
            "ends": ends,
            "skipped": {reason: asdict(skipped) for reason, skipped in faults.skipped.items()},
        }


def main(folder: str, on_error: OnError, backend: Backend) -> None:
    """What a process does that makes parts, see `neox.corpus.pool`."""

    def begin() -> Task:
        parts = Parts(Path(folder).with_suffix(""))
        plan = Plan.read(parts.plan_file)
        tokenizer = Tokenizer.from_file(parts.folder / "tokenizer.json")
        if tokenizer.sha256 != plan.settings["tokenizer_sha256"]:
            raise ValueError(f"{parts.folder / 'tokenizer.json'}: is not the tokenizer of the plan: begin anew")
        work = Work.of(plan, tokenizer, backend)
        return lambda number, advance: make_part(parts, work, plan.shards[number], on_error, advance)

    serve(begin)

"""Corpora to one `.bin`/`.idx` pair and its manifest, by all cores, resumable after a kill."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from neox.config import PrepareConfig
from neox.corpus.clean.cleaning import Cleaning, removed_lines
from neox.corpus.encode import Backend
from neox.corpus.plan import Plan, ShardOutputs
from neox.corpus.pool import run_workers
from neox.corpus.readers import ErrorPolicy, Name, OnError, Skipped, Source, find_sources
from neox.corpus.readers.errors import SHOWN, SkipReport
from neox.corpus.worker import ShardCounts, Work, tokenize, write_shard
from neox.data.manifest import Manifest, manifest_file
from neox.data.token_file import TokenFile, TokenWriter, beside, pair, token_dtype
from neox.system.console import progress_bar
from neox.system.machine import available_cores
from neox.tokenizer import END_OF_TEXT, Tokenizer

JOINED = 1 << 22  # bytes of a shard's tokens that are held at once


@dataclass(frozen=True)
class PrepareReport:
    """Result of `prepare`."""

    prefix: str
    """Output prefix: `<prefix>.bin`, `.idx` and `.json` were written."""
    documents: int
    bytes: int
    """UTF-8 bytes of the documents' text."""
    tokens: int
    """Tokens written, end-of-document tokens included."""
    empty: int
    """Documents left out because they hold no text."""
    skipped: dict[str, Skipped]
    """Documents that could not be read, by reason; empty unless `on_error` is "skip"."""
    removed: dict[str, Any]
    """Counts of duplicates and of overlaps with evaluation sets, from `Cleaning.finish`."""
    seconds: float
    done_before: bool = False
    """True where an earlier call had done everything already."""

    def left_out(self) -> list[str]:
        """Report for a user of the documents left out, by reason, with the first places."""
        lines = [f"left out: {self.empty:,} empty"] if self.empty else []
        for reason, skipped in self.skipped.items():
            lines += [f"left out: {skipped.documents:,} {reason}", *(f"  {place}" for place in skipped.first)]
        if self.skipped:
            lines.append(f"all of it: {self.prefix}.skipped.jsonl")
        return lines + removed_lines(self.removed, f"{self.prefix}.removed.jsonl")


def prepare(
    sources: Name | Sequence[Name],
    out_prefix: str | Path,
    tokenizer: Tokenizer,
    options: PrepareConfig | None = None,
    progress: bool = True,
    components: bool = False,
    overwrite: bool = False,
    **keywords: Any,
) -> PrepareReport:
    """Encode the documents of `sources`, in order, into `<out_prefix>.bin`/`.idx`, plus `<out_prefix>.json`.

    Options come as a section, such as a config's `data`, or as keywords of `PrepareConfig`; ConfigError on a wrong one.
    A source is a file, a folder, a saved data set or one of the hub, by name or as `find_sources` gave it. A document
    that cannot be read raises, or with `on_error="skip"` is left out, counted by reason in the report and the manifest,
    with the first places, and listed in `<out_prefix>.skipped.jsonl`.

    With `append_eod` each document ends in `<|endoftext|>`. Where its text spells out a special token, that becomes the
    token, or with `special_in_text="text"` text like any other.

    The work is cut into shards (see `neox.corpus.shards`), by the sources alone. Several shards are tokenized into
    `<out_prefix>.parts`, in `workers` processes (0: one a core), then joined and removed. A call that was killed is
    continued by the same call; after one that finished, it reads no text but that of the evaluation sets, to know that
    they are the same. The files do not depend on `workers` nor on `backend`, which library encodes (see
    `neox.corpus.encode`). All of them appear at the end, or none does; files of an earlier run stay whole until then.

    An output of other text or other settings is replaced with `overwrite` only.

    `dedup` leaves out what repeats an earlier document, `decontaminate` the text of evaluation sets (see
    `corpus.clean.cleaning`); what went and why is in `<out_prefix>.removed.jsonl`. With `components` each document's
    `meta.pile_set_name` is noted for `corpus.pile.components.count_components`.

    Raises FileNotFoundError or ValueError (file, line, what to do) on input that cannot be read, most of it before
    anything is read, on a file that changes meanwhile, on a corpus without text, on shards of other settings, and while
    another call writes the same output; OSError naming the file when it cannot be read or written.
    """
    started = time.monotonic()
    options = options or PrepareConfig(**keywords)
    on_error = options.on_error
    settings = settings_of(tokenizer, options)
    check_foreign(out_prefix)
    # All of them before the first is read: the tenth file's typing error should not cost an hour.
    every_source = find_sources(sources, options.text_key, on_error)
    if components:
        settings["components"] = str(beside(out_prefix, ".components"))
    plan = Plan.of(every_source, settings)
    cleaning = None
    if options.dedup or options.decontaminate:
        folder = beside(out_prefix, ".cleaning")
        cleaning = Cleaning.of(plan, folder, options.dedup, options.decontaminate, on_error)
        plan = replace(plan, settings={**settings, "cleaning": cleaning.settings})
    if done := _finished(out_prefix, plan, on_error):
        ShardOutputs(out_prefix).remove_finished(plan)
        if cleaning:
            cleaning.remove_finished()
        return _report(out_prefix, done, started, done_before=True)
    if not overwrite:
        refuse_existing(out_prefix)
    pair(out_prefix)[0].parent.mkdir(parents=True, exist_ok=True)
    count = options.workers or available_cores()
    held = cleaning.found(count, progress) if cleaning else nullcontext()
    with held, SkipReport(out_prefix) as report:
        policy = ErrorPolicy(on_error, report)
        for source in every_source:
            for read_error in source.unrecognized():
                policy.add(read_error)
        job = _Job(
            every_source,
            plan,
            Path(out_prefix),
            tokenizer,
            on_error,
            options.backend,
            count,
            progress,
            report,
            policy,
            cleaning,
        )
        alone = len(plan.shards) == 1 and not ShardOutputs(out_prefix).plan_file.exists()
        manifest = job.at_once() if alone else job.by_parts()
        if cleaning:
            cleaning.forget()
    return _report(out_prefix, manifest, started)


def settings_of(tokenizer: Tokenizer, options: PrepareConfig) -> dict[str, Any]:
    """Settings of a plan. Raises ValueError where documents cannot end as they should."""
    if options.append_eod and tokenizer.eod_id is None:
        raise ValueError(f"the tokenizer has no {END_OF_TEXT} token to end documents with; set data.append_eod=false")
    return {
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "text_key": options.text_key,
        "append_eod": options.append_eod,
        "special_in_text": options.special_in_text,
    }


@dataclass(frozen=True)
class _Job:
    sources: list[Source]
    plan: Plan
    out: Path
    tokenizer: Tokenizer
    on_error: OnError
    backend: Backend
    workers: int
    progress: bool
    report: SkipReport
    policy: ErrorPolicy
    cleaning: Cleaning | None

    @property
    def total(self) -> float | None:
        """Bytes to read, where all sources say."""
        sizes = [source.size for source in self.sources if source.size is not None]
        return sum(sizes) if len(sizes) == len(self.sources) else None

    def at_once(self) -> Manifest:
        """Tokenize a single shard straight into the output. Returns the manifest."""
        work = Work.of(self.plan, self.tokenizer, self.backend)
        with self.writer() as writer, progress_bar("bytes", show=self.progress) as bar:
            task = bar.add_task(f"prepare ({work.encoder.backend})", total=self.total)
            counts = tokenize(work, self.plan.shards[0], writer, self.policy, partial(bar.advance, task))
            if self.total is not None:
                bar.update(task, completed=self.total)
            return self.finish(writer, counts)

    def by_parts(self) -> Manifest:
        """Tokenize the missing shards of several, and join all. Returns the manifest."""
        outputs = ShardOutputs(self.out)
        with outputs.locked() as lock:
            try:
                outputs.begin(self.plan, self.tokenizer, self.policy)
                self.make(outputs, lock.fileno())
                manifest = self.join(outputs)
            except BaseException:
                if outputs.ours and not outputs.any_done():
                    outputs.remove()
                raise
            outputs.remove()
        return manifest

    def make(self, outputs: ShardOutputs, lock: int) -> None:
        """Tokenize the shards that are missing."""
        work = Work.of(self.plan, self.tokenizer, self.backend)
        with progress_bar("bytes", show=self.progress) as bar:
            task = bar.add_task(f"prepare ({work.encoder.backend})", total=self.total)
            advance = partial(bar.advance, task)
            missing = []
            for shard in self.plan.shards:
                if outputs.done_marker(self.plan, shard, self.policy):
                    advance(shard.size)
                else:
                    missing.append(shard)
            if self.workers > 1 and len(missing) > 1:
                names = {shard.number: shard.chunks[0].name for shard in missing}
                count = min(self.workers, len(missing))
                command = ["neox.corpus.worker", str(outputs.folder), self.on_error, work.encoder.backend]
                run_workers(command, names, count, lock, advance)
            else:
                for shard in missing:
                    write_shard(outputs, work, shard, self.on_error, advance)
            if self.total is not None:
                bar.update(task, completed=self.total)

    def join(self, outputs: ShardOutputs) -> Manifest:
        """Join all finished shards into the output, in order. Returns the manifest."""
        self.plan.check_unchanged(list(self.plan.versions), self.policy)
        counts = ShardCounts()
        with self.writer() as writer, progress_bar("bytes", show=self.progress) as bar:
            prefixes = [outputs.prefix(self.plan, shard) for shard in self.plan.shards]
            task = bar.add_task("join", total=sum(pair(prefix)[0].stat().st_size for prefix in prefixes))
            for prefix, shard in zip(prefixes, self.plan.shards, strict=True):
                marker = outputs.done_marker(self.plan, shard, self.policy)
                assert marker, "a finished shard is gone"
                _append(writer, prefix, marker["sha256"], partial(bar.advance, task))
                counts.bytes += marker["bytes"]
                counts.empty += marker["empty"]
                counts.add_origins(marker["origins"])
                for reason, row in marker["skipped"].items():
                    total = self.policy.skipped.setdefault(reason, Skipped())
                    total.documents += row["documents"]
                    total.first += row["first"][: SHOWN - len(total.first)]
                self.report.append(prefix)
            return self.finish(writer, counts)

    def writer(self) -> TokenWriter:
        return TokenWriter(self.out, token_dtype(self.tokenizer.vocab_size))

    def finish(self, writer: TokenWriter, counts: ShardCounts) -> Manifest:
        """Give the writer its manifest. Raises ValueError where there is no text at all."""
        if not writer.documents:
            raise ValueError(_no_text(self.sources, self.policy.skipped))
        self.report.place()
        removed = self.cleaning.finish(beside(self.out, ".removed.jsonl")) if self.cleaning else None
        manifest = Manifest(
            sources=[source.manifest_entry for source in self.sources],
            **self.plan.settings,
            dtype=writer.dtype.name,
            documents=writer.documents,
            bytes=counts.bytes,
            tokens=writer.tokens,
            empty=counts.empty,
            origins=counts.origins,
            skipped={reason: vars(one) for reason, one in self.policy.skipped.items()},
            sha256=writer.sha256,
            plan=self.plan.key(),
            removed=removed,
        )
        writer.manifest = manifest.content()
        return manifest


def _append(writer: TokenWriter, prefix: Path, sha256: str, advance: Callable[[float], object]) -> None:
    """Append a shard's tokens. Raises ValueError where they have changed since."""
    shard = TokenFile(prefix)
    digest = hashlib.sha256()
    with shard.bin.open("rb", buffering=0) as file:
        while block := file.read(JOINED):
            digest.update(block)
            writer.add_bytes(block)
            advance(len(block))
    if digest.hexdigest() != sha256:
        raise ValueError(f"{shard.bin}: damaged: its sha256 is no longer that of its manifest; remove it, run it again")
    for start in range(0, len(shard), JOINED):
        writer.add_sizes(shard.sizes[start : start + JOINED])


def _finished(out_prefix: str | Path, plan: Plan, on_error: OnError) -> Manifest | None:
    """Manifest of the output, if it is complete and belongs to `plan`."""
    with suppress(OSError, ValueError):
        manifest = Manifest.read(out_prefix)
        if manifest and manifest.plan == plan.key() and not (manifest.skipped and on_error == "fail"):
            file = TokenFile(out_prefix)
            if (len(file), len(file.tokens)) == (manifest.documents, manifest.tokens):
                return manifest
    return None


def _report(out_prefix: str | Path, manifest: Manifest, started: float, done_before: bool = False) -> PrepareReport:
    return PrepareReport(
        str(beside(out_prefix, "")),
        documents=manifest.documents or 0,
        bytes=manifest.bytes or 0,
        tokens=manifest.tokens or 0,
        empty=manifest.empty or 0,
        skipped={reason: Skipped(**one) for reason, one in (manifest.skipped or {}).items()},
        removed=manifest.removed or {},
        seconds=time.monotonic() - started,
        done_before=done_before,
    )


def _no_text(sources: Sequence[Source], skipped: dict[str, Skipped]) -> str:
    names = ", ".join(source.name for source in sources[:8]) + (", ..." if len(sources) > 8 else "")
    if not skipped:
        return f"no text in {names}: every document is empty"
    reasons = "; ".join(f"{one.documents:,} {why}, first {one.first[0]}" for why, one in skipped.items())
    return f"no text in {names}: every document is empty or was left out ({reasons})"


def refuse_existing(out_prefix: str | Path) -> None:
    """Raise ValueError where the output exists: it holds other text, or was made with other settings.

    A pair without its `.idx` is that of a run that was killed, where its parts or its manifest are there.
    """
    bin_file, idx = pair(out_prefix)
    begun = ShardOutputs(out_prefix).plan_file.exists() or manifest_file(out_prefix).exists()
    if existing := next((path for path in (idx, bin_file) if path.exists() and (path == idx or not begun)), None):
        raise ValueError(
            f"{existing}: exists, and not from this text with these settings: choose another out=, or set "
            "overwrite=true to replace it"
        )


def check_foreign(out_prefix: str | Path) -> None:
    """Raise ValueError where another program wrote the `.json` of an output.

    It may be a corpus, and would be overwritten.
    """
    path = manifest_file(out_prefix)
    try:
        manifest = Manifest.read(out_prefix)
        foreign = manifest is not None and not manifest.of_prepare
    except ValueError:
        foreign = True
    if foreign:
        raise ValueError(f"{path}: exists and is no manifest of prepare; choose another output name or move it away")

"""Deduplication and decontamination of a corpus, as `prepare` applies them.

    shards -> Cleaning.found: the repeats -> Cleaning.documents: what stays -> Cleaning.finish: removed.jsonl

Nothing depends on the number of workers, nor on how often the work was killed and begun again.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from typing import Any

from neox.config.structured import parse_json
from neox.corpus.clean.dedup import PARAMETERS, Method
from neox.corpus.clean.duplicates import DuplicateSearch, read_counts, read_duplicates
from neox.corpus.clean.overlap import RUN, Overlaps, cut, evaluation_texts
from neox.corpus.plan import Plan, locked
from neox.corpus.readers import Document, ErrorPolicy, OnError
from neox.corpus.shards import Shard, documents
from neox.system.files import write_atomic, write_whole

REASONS: Mapping[Method, str] = {"exact": "duplicate", "minhash": "near-duplicate"}
OVERLAP = "overlap"


@dataclass(frozen=True)
class Cleaning:
    """Deduplication and decontamination of one corpus; its results lie in `folder`.

    Any process can apply them: see `from_plan`.
    """

    folder: Path
    shards: tuple[Shard, ...]
    dedup: Method | None
    key: str
    """Hash that identifies this cleaning of these files."""
    overlaps: Overlaps = field(compare=False)
    """The evaluation sets, indexed."""
    search: DuplicateSearch | None = None
    """Search for duplicates; None without `dedup`, and where it has been done."""

    @property
    def settings(self) -> dict[str, Any]:
        """Settings for a plan, as JSON: the input of `from_plan`."""
        return {
            "folder": str(self.folder),
            "dedup": self.dedup,
            "decontaminate": [known.name for known in self.overlaps.sets],
            "key": self.key,
        }

    @classmethod
    def from_plan(cls, plan: Plan) -> Cleaning:
        """Open the cleaning that a plan's settings name, to apply it."""
        settings = plan.settings["cleaning"]
        folder = Path(settings["folder"])
        overlaps = Overlaps.load(folder / "overlaps.npz")
        return cls(folder, tuple(plan.shards), settings["dedup"], settings["key"], overlaps)

    @classmethod
    def of(
        cls,
        plan: Plan,
        folder: Path,
        dedup: Method | None = None,
        decontaminate: Sequence[str] = (),
        on_error: OnError = "fail",
    ) -> Cleaning:
        """Set up the cleaning of a plan's shards; index the evaluation sets.

        Reads no text of the shards yet.

        `decontaminate` names files or tasks, see `overlap.evaluation_texts`. Raises ValueError on one that
        cannot be read, or none of whose examples has 13 words.
        """
        overlaps = Overlaps.of((name, evaluation_texts(name)) for name in decontaminate)
        for known in overlaps.sets:
            if known.short == known.examples:
                raise ValueError(f"decontaminate: {known.name}: none of its {known.examples} examples has {RUN} words")
        shards, text_key = tuple(plan.shards), plan.settings["text_key"]
        versions = ([(asdict(chunk), plan.versions.get(chunk.name)) for chunk in shard.chunks] for shard in shards)
        keys = tuple(_key(dedup, PARAMETERS, text_key, on_error, of_shard) for of_shard in versions)
        search = DuplicateSearch(folder, dedup, text_key, on_error, shards, keys) if dedup else None
        return cls(folder, shards, dedup, _key(keys, overlaps.digest), overlaps, search)

    @contextmanager
    def found(self, workers: int = 1, progress: bool = True) -> Iterator[None]:
        """Find the duplicates, write the folder that `from_plan` opens, and hold it.

        Raises what the readers raise, and ValueError while another run holds the folder.
        """
        with locked(self.folder) as lock:
            self.overlaps.save(self.folder / "overlaps.npz")
            if self.search:
                self.search.run(workers, progress, lock.fileno())
            yield

    def documents(
        self, shard: Shard, text_key: str = "text", policy: ErrorPolicy | None = None, meta_key: str | None = None
    ) -> Iterator[Document]:
        """Read the documents of a shard that remain.

        Stands in for `neox.corpus.shards.documents`, which reads all of them.

        When it has come to its end, what was left out is on the disk for `finish`.
        Raises ValueError where the shard no longer holds the documents that were compared, ReadError as the readers do.
        """
        repeats = read_duplicates(self.folder, shard.number) if self.dedup else {}
        removed: list[dict[str, Any]] = []
        count, taken = 0, 0.0
        for number, document in enumerate(documents(shard, text_key, policy, meta_key)):
            count = number + 1
            row = {"source": document.source, "shard": shard.number, "document": number}
            taken += document.taken
            texts = [document.text]
            if self.dedup and (first := repeats.get(number)):
                texts = []
                removed.append({**row, "reason": REASONS[self.dedup], "kept": self._name(*first)})
            elif overlaps := self.overlaps.find(document.text):
                texts = cut(document.text, overlaps)
                sizes = {"characters": len(document.text), "left": sum(map(len, texts)), "pieces": len(texts)}
                rows = [asdict(overlap) for overlap in overlaps]
                removed.append({**row, "reason": OVERLAP, **sizes, "overlaps": rows})
            for text in texts:
                yield document._replace(text=text, taken=taken)
                taken = 0.0
        if self.dedup and count != sum(self._counts[shard.number]):
            raise ValueError(f"{shard.chunks[0].name}: changed while it was read; prepare it again")
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in removed)
        write_atomic(self._removed(shard.number), lines.encode())

    def finish(self, out: Path) -> dict[str, Any]:
        """Write the list of everything left out to `out`; return the counts.

        A line has `source`, `shard`, `document` (its number in the shard) and `reason`. For a repeat `kept` names the
        document that stays; for an overlap `overlaps` has each set, its words and their place, and `pieces` and `left`
        say what stays.
        """
        reasons: Counter[str] = Counter()
        hit: Counter[str] = Counter()

        def write(file: Any) -> None:
            for shard in self.shards:
                for line in self._removed(shard.number).read_bytes().splitlines(keepends=True):
                    row = parse_json(line)
                    reasons[row["reason"]] += 1
                    reasons["whole"] += row.get("pieces") == 0
                    hit.update({overlap["set"] for overlap in row.get("overlaps", ())})
                    file.write(line)

        write_whole(out, write)
        counts: dict[str, Any] = {REASONS[self.dedup]: reasons[REASONS[self.dedup]]} if self.dedup else {}
        if self.overlaps.sets:
            sets = [{**asdict(known), "documents": hit[known.name]} for known in self.overlaps.sets]
            counts[OVERLAP] = {"documents": reasons[OVERLAP], "whole": reasons["whole"], "sets": sets}
        return counts

    def forget(self) -> None:
        """Remove the folder, once the output is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def remove_finished(self) -> None:
        """Remove the folder that a run, killed after its output was complete, has left."""
        if self.folder.is_dir() and not self.folder.is_symlink():
            with suppress(ValueError), locked(self.folder):  # a run that holds it removes it itself
                self.forget()

    def _name(self, shard: int, document: int) -> dict[str, Any]:
        """Source and numbers of a document of any shard."""
        ends = accumulate(self._counts[shard])
        chunks = zip(self.shards[shard].chunks, ends, strict=True)
        source = next(chunk.name for chunk, end in chunks if document < end)
        return {"source": source, "shard": shard, "document": document}

    def _removed(self, number: int) -> Path:
        return self.folder / "removed" / f"{number:05d}.jsonl"

    @cached_property
    def _counts(self) -> list[list[int]]:
        """Number of documents in each chunk of each shard."""
        return [read_counts(self.folder, shard.number) for shard in self.shards]


def removed_lines(counts: dict[str, Any], path: str) -> list[str]:
    """Report for a user of the counts that `Cleaning.finish` gave.

    `path` is the file that lists every document.
    """
    lines = [f"left out: {counts[reason]:,} {reason}s" for reason in REASONS.values() if reason in counts]
    if overlap := counts.get(OVERLAP):
        whole = overlap["whole"]
        lines.append(f"cut: {overlap['documents'] - whole:,} documents with overlaps; left out: {whole:,} more of them")
        for known in overlap["sets"]:
            short = f" ({known['short']:,} too short to be found)" if known["short"] else ""
            lines.append(
                f"  {known['name']}: {known['examples']:,} examples{short} in {known['documents']:,} documents"
            )
    return [*lines, f"all of it: {path}"] if lines else []


def _key(*parts: Any) -> str:
    return blake2b(json.dumps([1, *parts]).encode(), digest_size=16).hexdigest()

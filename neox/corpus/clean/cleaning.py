"""Which documents `prepare` leaves out, and why: repeats of earlier ones, and text of evaluation sets.

    shards -> Cleaning.found: the repeats -> Cleaning.documents: what stays -> Cleaning.finish: removed.jsonl

Nothing depends on the number of workers, nor on how often the work was killed and begun again.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from typing import Any

from neox.corpus.clean.dedup import PARAMETERS, Method
from neox.corpus.clean.overlap import RUN, Overlaps, cut, evaluation_texts
from neox.corpus.clean.repeats import Search, read_counts, read_repeats
from neox.corpus.plan import Plan, locked
from neox.corpus.readers import Document, Faults, OnError
from neox.corpus.shards import Shard, documents
from neox.system.files import write_atomic, write_whole

REASONS: Mapping[Method, str] = {"exact": "duplicate", "minhash": "near-duplicate"}
OVERLAP = "overlap"


@dataclass(frozen=True)
class Cleaning:
    """What is left out of a corpus. What is `found` any process can apply: it is in `folder`."""

    folder: Path
    shards: tuple[Shard, ...]
    dedup: Method | None
    key: str
    """Tells this cleaning of these files from any other."""
    overlaps: Overlaps = field(compare=False)
    """The evaluation sets, indexed."""
    search: Search | None = None
    """How repeats are found; none where none are looked for, or they are found."""

    @property
    def settings(self) -> dict[str, Any]:
        """What `again` makes the same cleaning from, as JSON holds it."""
        return {
            "folder": str(self.folder),
            "dedup": self.dedup,
            "decontaminate": [known.name for known in self.overlaps.sets],
            "key": self.key,
        }

    @classmethod
    def again(cls, plan: Plan) -> Cleaning:
        """The cleaning of a plan, found elsewhere perhaps, to be applied."""
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
        """A cleaning of a plan's shards; its evaluation sets are read and indexed, of the shards nothing is read yet.

        `decontaminate` names files or tasks, see `overlap.evaluation_texts`. Raises ValueError on one that
        cannot be read, or none of whose examples has 13 words.
        """
        overlaps = Overlaps.of((name, evaluation_texts(name)) for name in decontaminate)
        for known in overlaps.sets:
            if known.short == known.examples:
                raise ValueError(f"decontaminate: {known.name}: none of its {known.examples} examples has {RUN} words")
        shards, text_key = tuple(plan.shards), plan.settings["text_key"]
        versions = ([(asdict(piece), plan.versions.get(piece.name)) for piece in shard.pieces] for shard in shards)
        keys = tuple(_key(dedup, PARAMETERS, text_key, on_error, of_shard) for of_shard in versions)
        search = Search(folder, dedup, text_key, on_error, shards, keys) if dedup else None
        return cls(folder, shards, dedup, _key(keys, overlaps.digest), overlaps, search)

    @contextmanager
    def found(self, workers: int = 1, progress: bool = True) -> Iterator[None]:
        """Find the repeats, see `repeats`, and put into the folder all that `again` needs; hold it meanwhile.

        Raises what the readers raise, and ValueError while another run holds the folder.
        """
        with locked(self.folder) as lock:
            self.overlaps.save(self.folder / "overlaps.npz")
            if self.search:
                self.search.run(workers, progress, lock.fileno())
            yield

    def documents(
        self, shard: Shard, text_key: str = "text", faults: Faults | None = None, meta_key: str | None = None
    ) -> Iterator[Document]:
        """What stays of a shard, in place of `neox.corpus.shards.documents`, which gives all of it.

        When it has come to its end, what was left out is on the disk for `finish`.
        Raises ValueError where the shard no longer holds the documents that were compared, Fault as the readers do.
        """
        repeats = read_repeats(self.folder, shard.number) if self.dedup else {}
        removed: list[dict[str, Any]] = []
        count, taken = 0, 0.0
        for number, document in enumerate(documents(shard, text_key, faults, meta_key)):
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
            raise ValueError(f"{shard.pieces[0].name}: changed while it was read; prepare it again")
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in removed)
        write_atomic(self._removed(shard.number), lines.encode())

    def finish(self, out: Path) -> dict[str, Any]:
        """Write what was left out of all shards to `out`, a line of JSON each; returns the counts, for a manifest.

        A line has `source`, `shard`, `document` (its number in the shard) and `reason`. For a repeat `kept` names the
        document that stays; for an overlap `overlaps` has each set, its words and their place, and `pieces` and `left`
        say what stays.
        """
        reasons: Counter[str] = Counter()
        hit: Counter[str] = Counter()

        def write(file: Any) -> None:
            for shard in self.shards:
                for line in self._removed(shard.number).read_bytes().splitlines(keepends=True):
                    row = json.loads(line)
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
        """Remove the folder, once what it led to is whole."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _name(self, shard: int, document: int) -> dict[str, Any]:
        """The source and the numbers of a document of any shard."""
        ends = accumulate(self._counts[shard])
        pieces = zip(self.shards[shard].pieces, ends, strict=True)
        source = next(piece.name for piece, end in pieces if document < end)
        return {"source": source, "shard": shard, "document": document}

    def _removed(self, number: int) -> Path:
        return self.folder / "removed" / f"{number:05d}.jsonl"

    @cached_property
    def _counts(self) -> list[list[int]]:
        """Documents of each piece of each shard."""
        return [read_counts(self.folder, shard.number) for shard in self.shards]


def removed_lines(counts: dict[str, Any], path: str) -> list[str]:
    """What `Cleaning.finish` counted, in lines for a user; `path` is where all of it was written."""
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

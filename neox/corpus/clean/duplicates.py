"""Search for duplicates in all shards of a corpus, by all cores, resumable after a kill.

In a folder: `keys/NNNNN-M.npy` and their marker `keys/NNNNN.json`, written last, so that a run that was killed goes on
behind it; `repeats/NNNNN.npy`, and `repeats/done.json` when all are there, whereupon the keys are removed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from neox.config.structured import read_json
from neox.corpus.clean.dedup import Method, find_duplicates, write_keys
from neox.corpus.pool import Task, run_workers, worker_loop
from neox.corpus.readers import ErrorPolicy, OnError, read_chunk
from neox.corpus.shards import Shard, shard_rows, shards_of
from neox.system.console import progress_bar
from neox.system.files import write_atomic, write_synced


@dataclass(frozen=True)
class DuplicateSearch:
    """Everything that the duplicates depend on; any process can do a share of the search."""

    folder: Path
    dedup: Method
    text_key: str
    on_error: OnError
    shards: tuple[Shard, ...]
    keys: tuple[str, ...]
    """Hash, for each shard, of its documents and of how they are compared."""

    def run(self, workers: int, progress: bool, lock: int) -> None:
        """Find the duplicates; reuse earlier results in `folder` for the same `keys`.

        `lock` is the file that holds the folder. Raises what the readers raise.
        """
        with progress_bar("bytes", show=progress) as bar:
            done = _repeats(self.folder, 0).with_name("done.json")
            if done.exists() and read_json(done, list) == list(self.keys):
                return
            done.unlink(missing_ok=True)
            task = bar.add_task(f"dedup={self.dedup}", total=sum(shard.size for shard in self.shards) or None)
            self._write_all(workers, lock, partial(bar.advance, task))
            written = []
            for shard in self.shards:
                marker = read_json(_done_marker(self.folder, shard.number))
                written.append((sum(marker["counts"]), _files(self.folder, shard.number, marker["files"])))
            size = sum(path.stat().st_size for _, files in written for path in files)
            task = bar.add_task("compare", total=size)
            found = find_duplicates(written, lambda share: bar.advance(task, share * size))
            done.parent.mkdir(exist_ok=True)
            for shard, repeats in zip(self.shards, found, strict=True):
                rows = np.stack((repeats.numbers, repeats.shards, repeats.kept))
                write_synced(_repeats(self.folder, shard.number), partial(np.save, arr=rows))
            write_atomic(done, json.dumps(self.keys).encode())
            for _, files in written:
                for path in files:  # of minhash 224 bytes a document
                    path.unlink()

    def write(self, number: int, advance: Callable[[float], object]) -> None:
        """Write the keys of one shard; the marker is last."""
        policy = ErrorPolicy(self.on_error)
        chunks = self.shards[number].chunks
        counts = [0] * len(chunks)

        def texts() -> Iterator[str]:
            for place, chunk in enumerate(chunks):
                for document in read_chunk(chunk, self.text_key, policy):
                    counts[place] += 1
                    advance(document.taken)
                    yield document.text

        marker = _done_marker(self.folder, number)
        _, files = write_keys(texts(), self.dedup, marker.with_suffix(""))
        content = {"key": self.keys[number], "counts": counts, "files": len(files)}
        write_atomic(marker, json.dumps(content).encode())

    def _write_all(self, workers: int, lock: int, advance: Callable[[float], object]) -> None:
        """Write the missing keys, in this process or in several."""
        missing = {shard.number: shard.chunks[0].name for shard in self.shards if not self._written(shard.number)}
        advance(sum(shard.size for shard in self.shards if shard.number not in missing))
        if workers > 1 and len(missing) > 1:
            content = [self.dedup, self.text_key, self.on_error, shard_rows(self.shards), self.keys]
            write_atomic(self.folder / "search.json", json.dumps(content).encode())
            run_workers([__name__, str(self.folder)], missing, min(workers, len(missing)), lock, advance)
        else:
            for number in missing:
                self.write(number, advance)

    def _written(self, number: int) -> bool:
        """Tell whether the keys of a shard are complete and belong to these documents."""
        marker = _done_marker(self.folder, number)
        if not marker.exists():
            return False
        known = read_json(marker)
        files = _files(self.folder, number, known["files"])
        return known["key"] == self.keys[number] and all(path.exists() for path in files)


def read_duplicates(folder: Path, number: int) -> dict[int, tuple[int, int]]:
    """Duplicates in a shard: document number -> (shard, number) of the one that is kept."""
    rows = np.load(_repeats(folder, number))
    return {place: (shard, kept) for place, shard, kept in rows.T.tolist()}


def read_counts(folder: Path, number: int) -> list[int]:
    """Number of documents in each chunk of a shard."""
    counts: list[int] = read_json(_done_marker(folder, number))["counts"]
    return counts


def _done_marker(folder: Path, number: int) -> Path:
    return folder / "keys" / f"{number:05d}.json"


def _files(folder: Path, number: int, count: int) -> list[Path]:
    """Paths of the files that `write_keys` wrote; only their count is read from disk."""
    return [folder / "keys" / f"{number:05d}-{place}.npy" for place in range(count)]


def _repeats(folder: Path, number: int) -> Path:
    return folder / "repeats" / f"{number:05d}.npy"


def main(folder: str) -> None:
    """Entry point of a process that writes keys, see `neox.corpus.pool`."""

    def begin() -> Task:
        dedup, text_key, on_error, rows, keys = read_json(Path(folder) / "search.json", list)
        return DuplicateSearch(Path(folder), dedup, text_key, on_error, tuple(shards_of(rows)), tuple(keys)).write

    worker_loop(begin)

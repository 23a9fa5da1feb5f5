"""The repeats in all shards of a corpus, found once: the keys of each shard, by all cores, then those that are equal.

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

from neox.corpus.clean.dedup import Method, repeated, write_keys
from neox.corpus.pool import Task, each, serve
from neox.corpus.readers import Faults, OnError, read_piece
from neox.corpus.shards import Shard, shard_rows, shards_of
from neox.system.files import byte_progress, write_atomic, write_synced


@dataclass(frozen=True)
class Search:
    """What repeats depend on; any process can take a part in it."""

    folder: Path
    dedup: Method
    text_key: str
    on_error: OnError
    shards: tuple[Shard, ...]
    keys: tuple[str, ...]
    """Tell the documents of each shard, and how they are compared, from others."""

    def run(self, workers: int, progress: bool, lock: int) -> None:
        """Find the repeats; what was found before in `folder`, for the same `keys`, stands.

        `lock` is the file that holds the folder. Raises what the readers raise.
        """
        with byte_progress(progress) as bar:
            done = _repeats(self.folder, 0).with_name("done.json")
            if done.exists() and json.loads(done.read_bytes()) == list(self.keys):
                return
            done.unlink(missing_ok=True)
            task = bar.add_task(f"dedup={self.dedup}", total=sum(shard.size for shard in self.shards) or None)
            self._write_all(workers, lock, partial(bar.advance, task))
            written = []
            for shard in self.shards:
                marker = json.loads(_marker(self.folder, shard.number).read_bytes())
                written.append((sum(marker["counts"]), _files(self.folder, shard.number, marker["files"])))
            size = sum(path.stat().st_size for _, files in written for path in files)
            task = bar.add_task("compare", total=size)
            found = repeated(written, lambda share: bar.advance(task, share * size))
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
        faults = Faults(self.on_error)
        pieces = self.shards[number].pieces
        counts = [0] * len(pieces)

        def texts() -> Iterator[str]:
            for place, piece in enumerate(pieces):
                for document in read_piece(piece, self.text_key, faults):
                    counts[place] += 1
                    advance(document.taken)
                    yield document.text

        marker = _marker(self.folder, number)
        _, files = write_keys(texts(), self.dedup, marker.with_suffix(""))
        content = {"key": self.keys[number], "counts": counts, "files": len(files)}
        write_atomic(marker, json.dumps(content).encode())

    def _write_all(self, workers: int, lock: int, advance: Callable[[float], object]) -> None:
        """Write the keys of each shard that are not there, in this process or in several."""
        missing = {shard.number: shard.pieces[0].name for shard in self.shards if not self._written(shard.number)}
        advance(sum(shard.size for shard in self.shards if shard.number not in missing))
        if workers > 1 and len(missing) > 1:
            content = [self.dedup, self.text_key, self.on_error, shard_rows(self.shards), self.keys]
            write_atomic(self.folder / "search.json", json.dumps(content).encode())
            each([__name__, str(self.folder)], missing, min(workers, len(missing)), lock, advance)
        else:
            for number in missing:
                self.write(number, advance)

    def _written(self, number: int) -> bool:
        """Whether the keys of a shard are there, whole and of these documents."""
        marker = _marker(self.folder, number)
        if not marker.exists():
            return False
        known = json.loads(marker.read_bytes())
        files = _files(self.folder, number, known["files"])
        return known["key"] == self.keys[number] and all(path.exists() for path in files)


def read_repeats(folder: Path, number: int) -> dict[int, tuple[int, int]]:
    """The documents of a shard that repeat an earlier one, each with the shard and the number there of what stays."""
    rows = np.load(_repeats(folder, number))
    return {place: (shard, kept) for place, shard, kept in rows.T.tolist()}


def read_counts(folder: Path, number: int) -> list[int]:
    """How many documents each piece of a shard had."""
    counts: list[int] = json.loads(_marker(folder, number).read_bytes())["counts"]
    return counts


def _marker(folder: Path, number: int) -> Path:
    return folder / "keys" / f"{number:05d}.json"


def _files(folder: Path, number: int, count: int) -> list[Path]:
    """What `write_keys` wrote; a marker says how many, and no path."""
    return [folder / "keys" / f"{number:05d}-{place}.npy" for place in range(count)]


def _repeats(folder: Path, number: int) -> Path:
    return folder / "repeats" / f"{number:05d}.npy"


def main(folder: str) -> None:
    """What a process does that writes keys, see `neox.corpus.pool`."""

    def begin() -> Task:
        dedup, text_key, on_error, rows, keys = json.loads((Path(folder) / "search.json").read_bytes())
        return Search(Path(folder), dedup, text_key, on_error, tuple(shards_of(rows)), tuple(keys)).write

    serve(begin)

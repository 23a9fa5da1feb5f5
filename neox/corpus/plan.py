"""What a run of `prepare` is going to do: settings, files as they are now, shards; and where its finished parts lie."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import IO, Any

from neox.corpus.readers import Fault, Faults, Source
from neox.corpus.readers.places import ends_digest, version_of
from neox.corpus.shards import Shard, shard_rows, shards, shards_of
from neox.data.token_file import pair, token_dtype
from neox.system.files import open_own, temporary_name, write_atomic
from neox.tokenizer import Tokenizer

PATIENCE = 5.0  # seconds until the processes of a run that was killed are gone


@dataclass(frozen=True)
class Plan:
    """All that the tokens depend on, and the shards that the work is cut into: the same for any number of workers."""

    settings: dict[str, Any]
    """Besides the text: `tokenizer_sha256`, `vocab_size`, `text_key`, `append_eod`, `special_in_text`."""
    versions: dict[str, list[Any]]
    """What tells a file from an older version of itself, by name; nothing for a data set on the hub: it is a commit."""
    shards: list[Shard]

    @classmethod
    def of(cls, sources: Sequence[Source], settings: dict[str, Any]) -> Plan:
        """The plan for sources as they are now. Raises OSError where one of them has gone."""
        found = shards(sources)
        files = dict.fromkeys(piece.name for shard in found for piece in shard.pieces if piece.kind != "hub")
        return cls(settings, {name: version_of(name) for name in files}, found)

    @classmethod
    def read(cls, path: Path) -> Plan:
        """A plan that was written. Raises ValueError naming the file where it is none."""
        try:
            raw = json.loads(path.read_bytes())
            return cls(raw["settings"], raw["versions"], shards_of(raw["shards"]))
        except (ValueError, KeyError, TypeError, AttributeError):
            folder = path.parent
            raise ValueError(f"{path}: no plan that `neox prepare` wrote; remove the folder {folder} first") from None

    def write(self, path: Path) -> None:
        """Write the plan, atomically."""
        content = {"format": 1, "settings": self.settings, "versions": self.versions, "shards": shard_rows(self.shards)}
        write_atomic(path, json.dumps(content).encode("utf-8"))

    def key(self, shard: Shard | None = None) -> str:
        """Equal where the tokens of a shard (or of all) are bound to be: a hash of settings, pieces and versions."""
        pieces = [piece for one in (self.shards if shard is None else [shard]) for piece in one.pieces]
        content = [self.settings, [[*astuple(piece), self.versions.get(piece.name)] for piece in pieces]]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8")).hexdigest()

    def check_unchanged(self, names: Iterable[str], faults: Faults) -> None:
        """Raises Fault, unless faults are skipped, where one of these files is no longer what was planned with."""
        for name in names:
            if name in self.versions and version_of(name) != self.versions[name]:
                faults.add(changed(name))


def changed(name: str) -> Fault:
    """The fault of a file that was written to after its text was planned with, or tokenized."""
    hint = "put it back as it was, or remove the .parts folder beside the output to begin anew"
    return Fault("changed", f"{name}: has changed since this run of prepare began: {hint}", 0)


class Parts:
    """The folder `<prefix>.parts`: the plan, and a `.bin`/`.idx` pair with a manifest for each shard that is done.

    Every name in it is made here; nothing that a file says is used as a path, and no link is followed.
    """

    def __init__(self, out_prefix: str | Path) -> None:
        self.folder = pair(out_prefix)[0].with_suffix(".parts")
        if self.folder.is_symlink():
            raise ValueError(f"{self.folder}: is a link; finished parts are kept in a folder of our own: remove it")

    @property
    def plan_file(self) -> Path:
        """Where the plan is."""
        return self.folder / "plan.json"

    def begin(self, plan: Plan, tokenizer: Tokenizer, faults: Faults) -> None:
        """Make this the plan, if an older one of the folder agrees with it; parts that are done are kept.

        Raises ValueError where the older one had other settings, such as another tokenizer, and where the folder is
        not ours; Fault where a file has changed since then, unless faults are skipped.
        """
        if self.plan_file.exists():
            old = Plan.read(self.plan_file)
            for key, value in plan.settings.items():
                if old.settings.get(key) != value:
                    what = "tokenizer" if key in ("tokenizer_sha256", "vocab_size") else f"data.{key}"
                    raise ValueError(
                        f"{self.folder}: its parts were made with another {what} ({old.settings.get(key)}, now "
                        f"{value}): go on with that one, or remove the folder to begin anew"
                    )
            for name in plan.versions.keys() & old.versions.keys():
                if plan.versions[name] != old.versions[name]:
                    faults.add(changed(name))
        elif not self.ours:
            raise ValueError(f"{self.folder}: is no folder of prepare; choose another output name or move it away")
        plan.write(self.plan_file)
        tokenizer.save(self.folder / "tokenizer.json")

    def prefix(self, plan: Plan, shard: Shard) -> Path:
        """The prefix of a shard's part; another one wherever its tokens may be others."""
        return self.folder / f"{shard.number:06d}-{plan.key(shard)[:16]}"

    def marker(self, plan: Plan, shard: Shard, faults: Faults) -> dict[str, Any] | None:
        """The manifest of a part that is whole; None where it has still to be made.

        A part with something left out counts as made only where faults are skipped.
        Raises ValueError on a link; Fault, unless faults are skipped, where a file has changed that kept size and time.
        """
        prefix = self.prefix(plan, shard)
        bin_file, idx = pair(prefix)
        for path in (bin_file, idx, prefix.with_suffix(".json")):
            if path.is_symlink():
                raise ValueError(f"{path}: is a link, and no part that prepare made: remove it")
        noted = None
        with suppress(OSError, ValueError):
            noted = json.loads(prefix.with_suffix(".json").read_bytes())
        if not isinstance(noted, dict) or not idx.exists():
            return None
        size = noted["tokens"] * token_dtype(plan.settings["vocab_size"]).itemsize
        if not bin_file.exists() or bin_file.stat().st_size != size or (noted["skipped"] and not faults.skips):
            return None
        for name, digest in noted["ends"].items():
            if ends_digest(name) != digest:
                faults.add(changed(name))
                idx.unlink()  # the work goes on with the file as it is now
                return None
        return noted

    @property
    def ours(self) -> bool:
        """Whether `prepare` made the folder, and may remove it."""
        begun = ("lock", temporary_name(self.plan_file).name)
        return self.plan_file.exists() or all(path.name in begun for path in self.folder.iterdir())

    def any_done(self) -> bool:
        """Whether there is a part to go on from."""
        return any(self.folder.glob("*.idx"))

    def remove(self) -> None:
        """The folder and all in it; what a link in it leads to stays."""
        shutil.rmtree(self.folder)

    def locked(self, shared: bool = False) -> AbstractContextManager[IO[bytes]]:
        """Hold the folder: alone, or shared by the processes of a cluster that each make some of its parts.

        Raises ValueError where another run holds it, after a moment in which one that was killed may end.
        """
        return locked(self.folder, shared)


@contextmanager
def locked(folder: Path, shared: bool = False) -> Iterator[IO[bytes]]:
    """Hold a folder, which is made where it is absent, by the file `lock` in it; see `Parts.locked`."""
    started = time.monotonic()
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        file = open_own(folder / "lock", "ab")
        if _lock(file, shared):
            with suppress(FileNotFoundError):  # the one before us may have removed the folder
                if os.path.samestat(os.fstat(file.fileno()), os.stat(folder / "lock")):
                    break
        file.close()
        if time.monotonic() - started > PATIENCE:
            raise ValueError(f"{folder}: another run is writing this output now; wait for it or choose another out=")
        time.sleep(0.1)
    try:
        yield file
    finally:
        file.close()


def _lock(file: IO[bytes], shared: bool) -> bool:
    try:
        import fcntl
    except ImportError:  # not POSIX: no advisory locks to ask for
        return True
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

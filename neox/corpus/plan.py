"""Plan of a run of `prepare`: settings, file versions, shards; and its finished shards on disk."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import IO, Any

from neox.config.structured import read_json
from neox.corpus.readers import ErrorPolicy, ReadError, Source
from neox.corpus.readers.urls import ends_digest, version_of
from neox.corpus.shards import Shard, shard_rows, shards, shards_of
from neox.data.token_file import beside, pair, token_dtype
from neox.system.files import is_at, open_own, temporary_name, try_lock, write_atomic
from neox.tokenizer import Tokenizer

PATIENCE = 5.0  # seconds until the processes of a run that was killed are gone


@dataclass(frozen=True)
class Plan:
    """Everything that the tokens depend on, and the shards, for any number of workers."""

    settings: dict[str, Any]
    """Everything besides the text: `tokenizer_sha256`, `vocab_size`, `text_key`, `append_eod`, `special_in_text`."""
    versions: dict[str, list[Any]]
    """Version of each file, by name (see `version_of`). A data set on the hub needs none: it is pinned to a commit."""
    shards: list[Shard]

    @classmethod
    def of(cls, sources: Sequence[Source], settings: dict[str, Any]) -> Plan:
        """Plan the work on sources as they are now. Raises OSError where one has gone."""
        every_shard = shards(sources)
        files = dict.fromkeys(chunk.name for shard in every_shard for chunk in shard.chunks if chunk.kind != "hub")
        return cls(settings, {name: version_of(name) for name in files}, every_shard)

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Read a plan from a file. Raises ValueError naming the file where it holds none."""
        try:
            raw = read_json(path)
            return cls(raw["settings"], raw["versions"], shards_of(raw["shards"]))
        except (ValueError, KeyError, TypeError, AttributeError):
            folder = path.parent
            raise ValueError(f"{path}: no plan that `neox prepare` wrote; remove the folder {folder} first") from None

    def write(self, path: Path) -> None:
        """Write the plan, atomically."""
        content = {"format": 1, "settings": self.settings, "versions": self.versions, "shards": shard_rows(self.shards)}
        write_atomic(path, json.dumps(content).encode("utf-8"))

    def key(self, shard: Shard | None = None) -> str:
        """Hash of settings, chunks and file versions, of a shard or of all.

        Equal keys mean equal tokens.
        """
        chunks = [chunk for one in (self.shards if shard is None else [shard]) for chunk in one.chunks]
        content = [self.settings, [[*astuple(chunk), self.versions.get(chunk.name)] for chunk in chunks]]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8")).hexdigest()

    def check_unchanged(self, names: Iterable[str], policy: ErrorPolicy) -> None:
        """Compare files with their planned versions.

        Raises ReadError where one of these files has changed, unless the policy skips errors.
        """
        for name in names:
            if name in self.versions and version_of(name) != self.versions[name]:
                policy.add(changed(name))


def changed(name: str) -> ReadError:
    """Make the error of a file that was changed after it was planned or tokenized."""
    hint = "put it back as it was, or remove the .parts folder beside the output to begin anew"
    return ReadError("changed", f"{name}: has changed since this run of prepare began: {hint}", 0)


class ShardOutputs:
    """The folder `<prefix>.parts`: the plan, and a token file for each finished shard.

    The done marker of a shard, a manifest, makes its token file count.

    Every name in it is made here; nothing that a file says is used as a path, and no link is followed.
    """

    def __init__(self, out_prefix: str | Path) -> None:
        self.folder = beside(out_prefix, ".parts")
        if self.folder.is_symlink():
            raise ValueError(f"{self.folder}: is a link; finished parts are kept in a folder of our own: remove it")

    @property
    def plan_file(self) -> Path:
        """Path of the plan."""
        return self.folder / "plan.json"

    def begin(self, plan: Plan, tokenizer: Tokenizer, policy: ErrorPolicy) -> None:
        """Write the plan, unless an older one in the folder disagrees; finished shards stay.

        Raises ValueError where the older one had other settings, such as another tokenizer, and where the folder is
        not ours; ReadError where a file has changed since then, unless the policy skips errors.
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
                    policy.add(changed(name))
        elif not self.ours:
            raise ValueError(f"{self.folder}: is no folder of prepare; choose another output name or move it away")
        plan.write(self.plan_file)
        tokenizer.save(self.folder / "tokenizer.json")

    def prefix(self, plan: Plan, shard: Shard) -> Path:
        """Prefix of a shard's token file; different wherever its tokens may differ."""
        return self.folder / f"{shard.number:06d}-{plan.key(shard)[:16]}"

    def done_marker(self, plan: Plan, shard: Shard, policy: ErrorPolicy) -> dict[str, Any] | None:
        """Read the done marker of a shard; None where its tokens must still be made.

        A shard with documents left out counts as finished only where the policy skips errors.
        Raises ValueError on a link; ReadError, unless the policy skips errors, where a file has changed but kept its
        size and time.
        """
        prefix = self.prefix(plan, shard)
        bin_file, idx = pair(prefix)
        for path in (bin_file, idx, beside(prefix, ".json")):
            if path.is_symlink():
                raise ValueError(f"{path}: is a link, and no part that prepare made: remove it")
        marker = None
        with suppress(OSError, ValueError):
            marker = read_json(beside(prefix, ".json"))
        if not isinstance(marker, dict) or not idx.exists():
            return None
        size = marker["tokens"] * token_dtype(plan.settings["vocab_size"]).itemsize
        if not bin_file.exists() or bin_file.stat().st_size != size or (marker["skipped"] and not policy.skips):
            return None
        for name, digest in marker["ends"].items():
            if ends_digest(name) != digest:
                policy.add(changed(name))
                idx.unlink()  # the work goes on with the file as it is now
                return None
        return marker

    @property
    def ours(self) -> bool:
        """Tell whether `prepare` made the folder, and may remove it."""
        begun = ("lock", temporary_name(self.plan_file).name)
        return self.plan_file.exists() or all(path.name in begun for path in self.folder.iterdir())

    def any_done(self) -> bool:
        """Tell whether there is a finished shard to continue from."""
        return any(self.folder.glob("*.idx"))

    def remove(self) -> None:
        """Remove the folder and all in it; links in it are not followed.

        The plan goes last but for the lock: a removal that is killed leaves a folder that is still `ours`.
        """
        for path in self.folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path not in (self.plan_file, self.folder / "lock"):
                path.unlink()
        self.plan_file.unlink(missing_ok=True)
        shutil.rmtree(self.folder)

    def remove_finished(self, plan: Plan) -> None:
        """Remove the folder that a run of `plan`, killed after its output was complete, has left.

        Parts of another plan stay, as does a folder that is not `ours`. A run that holds it removes it itself.
        """
        if not self.folder.is_dir() or not self.ours:
            return
        with suppress(ValueError):
            if self.plan_file.exists() and Plan.read(self.plan_file).key() != plan.key():
                return
            with self.locked():
                self.remove()

    def locked(self, shared: bool = False) -> AbstractContextManager[IO[bytes]]:
        """Hold the folder: alone, or shared by the processes of a cluster.

        Raises ValueError where another run holds it, after a moment in which one that was killed may end.
        """
        return locked(self.folder, shared)


@contextmanager
def locked(folder: Path, shared: bool = False) -> Iterator[IO[bytes]]:
    """Hold a folder by its file `lock`; make the folder where it is absent."""
    started = time.monotonic()
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        file = open_own(folder / "lock", "ab")
        if try_lock(file, shared) and is_at(file, folder / "lock"):  # its last holder may have removed the folder
            break
        file.close()
        if time.monotonic() - started > PATIENCE:
            raise ValueError(f"{folder}: another run is writing this output now; wait for it or choose another out=")
        time.sleep(0.1)
    try:
        yield file
    finally:
        file.close()

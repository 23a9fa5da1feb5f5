"""Sources of names: a file, glob, folder or URL of files, or a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from neox.corpus.readers.chunks import Chunk, Document
from neox.corpus.readers.columns import check_arrow, check_parquet, read_arrow, read_parquet, split_parquet
from neox.corpus.readers.errors import ErrorPolicy, OnError, ReadError
from neox.corpus.readers.hub_datasets import HUB, HubDataset, SavedDataset, is_saved, read_dataset
from neox.corpus.readers.streams import COMPRESSED
from neox.corpus.readers.text import read_jsonl, read_txt, split_jsonl
from neox.corpus.readers.urls import below_url, is_pattern, is_url, matching, open_raw, size_of
from neox.system.optional import optional

FileId = tuple[int, int] | str
"""Device and inode of a file, whatever its name; or the identity of a data set of the hub."""


class Source(Protocol):
    """One name that the user gave, and the documents behind it."""

    name: str
    size: int | None
    """Bytes that the progress bar counts to: of the files, compressed ones as they are; None where nothing says."""
    manifest_entry: dict[str, Any]
    """Its entry in the manifest: `path` (the name), `bytes`, and `files` or `revision`."""

    def chunks(self) -> list[Chunk]:
        """Chunks of the source, in order."""
        ...

    def check(self, text_key: str) -> None:
        """Check everything that can be known without reading the text. Raises ReadError."""
        ...

    def unrecognized(self) -> Iterator[ReadError]:
        """An error for each file of an unknown kind."""
        ...


Name = str | Path | Source
"""Name of a source, see `find_sources`; or a source that was found already, which stands as it is."""


class Format(NamedTuple):
    """Functions that read one kind of file."""

    read: Callable[[Chunk, str, ErrorPolicy, str | None], Iterator[Document]]
    package: str | None = None
    split: Callable[[str], list[int]] = lambda name: [0]
    """Start of each chunk, in the unit of `Chunk.start` for this kind."""
    check: Callable[[str, str], None] | None = None


TEXT = {".txt": Format(read_txt), ".jsonl": Format(read_jsonl, None, split_jsonl)}
TEXT[".json"] = TEXT[".jsonl"]
PACKAGES = {".gz": None, ".zst": "zstandard"}
FORMATS: dict[str, Format] = {
    **TEXT,
    **{
        suffix + packed: format._replace(package=PACKAGES[packed])
        for suffix, format in TEXT.items()
        for packed in COMPRESSED
    },
    ".parquet": Format(read_parquet, "pyarrow", split_parquet, check_parquet),
    ".arrow": Format(read_arrow, "pyarrow", check=check_arrow),
    "saved": Format(read_dataset, "datasets"),
    "hub": Format(read_dataset, "datasets"),
}
SUFFIXES = [kind for kind in FORMATS if kind.startswith(".")]
KINDS = f"{', '.join(TEXT)}, each also with {' or '.join(COMPRESSED)}, .parquet and .arrow"


def read_chunk(chunk: Chunk, text_key: str, policy: ErrorPolicy, meta_key: str | None = None) -> Iterator[Document]:
    """Read each document of a chunk, empty ones too.

    Raises ReadError unless the policy skips errors.

    `text_key` names the member or the column that holds the text, `meta_key` another one that is wanted beside it.
    """
    return FORMATS[chunk.kind].read(chunk, text_key, policy, meta_key)


def read_source(source: Source, text_key: str, policy: ErrorPolicy) -> Iterator[Document]:
    """Read each document of a source, empty ones too, with its share of `size`.

    Raises ReadError unless the policy skips errors.
    """
    for read_error in source.unrecognized():
        policy.add(read_error)
    for chunk in source.chunks():
        yield from read_chunk(chunk, text_key, policy)


def find_sources(names: Name | Sequence[Name], text_key: str = "text", on_error: OnError = "fail") -> list[Source]:
    """Find the source of each name, before any text is read.

    A name is a file whose suffix FORMATS knows; a glob; a folder of such files, read recursively in the order of their
    paths within it, hidden files (`.name`) passed over; the URL of a file, a folder or a glob that fsspec reads; a
    folder that `Dataset.save_to_disk` wrote; or a data set of the Hugging Face hub, as
    `hf:OWNER/NAME[:CONFIG][@REVISION][#SPLIT]` or `hf://OWNER/NAME...`.
    Raises FileNotFoundError, and ValueError on a file that is reached twice, a file of an unknown kind, a folder
    without a file that can be read, a package that is missing; OSError on a file that cannot be opened. With
    `on_error="fail"` also ReadError on a Parquet file or a saved data set that is damaged or has no column of texts
    `text_key`.
    """
    if not (listed := list(names) if isinstance(names, Sequence) and not isinstance(names, str) else [names]):
        raise ValueError("no input files given")
    if "" in listed:  # pathlib reads it as the current folder
        raise ValueError("a source has an empty name: leave the option out for none")
    seen: dict[FileId, str] = {}
    sources = [_source(str(name), seen) if isinstance(name, str | Path) else name for name in listed]
    if on_error == "fail":
        for source in (source for source, name in zip(sources, listed, strict=True) if source is not name):
            try:
                source.check(text_key)
            except ReadError as read_error:
                ErrorPolicy(on_error).add(read_error)
    return sources


def _source(name: str, seen: dict[FileId, str]) -> Source:
    if name.startswith(HUB):
        hub = HubDataset(name)
        _once(hub.identity, name, seen)
        return hub
    if is_pattern(name) or is_url(name):
        found = matching(name) if is_pattern(name) else below_url(name)
        for file in found:
            _once(file, file, seen) if is_url(file) else _meet(Path(file), seen)
        if not found:
            raise FileNotFoundError(f"{name}: no file matches")
        if not is_pattern(name) and len(found) == 1 and not _format(found[0]):
            raise ValueError(f"{name}: unknown kind of file; the suffixes are {KINDS}")
        return Files(name, found)
    path = Path(name)
    if path.is_dir():
        if is_saved(path):
            _meet(path, seen)
            return SavedDataset(name)
        return Files(name, [str(found) for found in _below(path, seen)])
    if not path.exists():
        raise FileNotFoundError(f"{name}: no such file or folder")
    _meet(path, seen)
    if not _format(name):
        raise ValueError(f"{name}: unknown kind of file; the suffixes are {KINDS}")
    return Files(name, [name])


def _below(folder: Path, seen: dict[FileId, str]) -> Iterator[Path]:
    """Every file below `folder`, in no order, links followed.

    Unlike os.walk it does not pass over a folder that cannot be opened.
    """
    _meet(folder, seen)
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _below(path, seen)
        else:
            _meet(path, seen)
            yield path


def _meet(path: Path, seen: dict[FileId, str]) -> None:
    """Note a file or a folder by its identity on the disk.

    Raises ValueError where it was met already, by any name, and where it is a pipe or the like.
    """
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{path!r}: its name is not UTF-8, and cannot stand in the manifest; rename it") from None
    if not (path.is_file() or path.is_dir()):
        # All text is read twice where a tokenizer is trained.
        path.stat()  # a link to nothing has an error of its own
        raise ValueError(f"{path}: neither a file nor a folder; write its content to a file first")
    status = path.stat()
    _once((status.st_dev, status.st_ino), str(path), seen)


def _once(place: FileId, name: str, seen: dict[FileId, str]) -> None:
    if place in seen:
        raise ValueError(f"{name}: is the same as {seen[place]}; its text would come twice: name it once")
    seen[place] = name


class Files:
    """A file, the files below a folder, or those of a glob, sorted by path."""

    def __init__(self, name: str, paths: list[str]) -> None:
        self.name = name
        paths = sorted(paths)
        self._paths = [path for path in paths if _format(path)]
        self._unknown = [path for path in paths if not _format(path)]
        if not self._paths:
            raise ValueError(f"{name}: holds no file that can be read; the suffixes are {KINDS}")
        for path in self._paths:
            if package := FORMATS[_format(path)].package:
                optional(package, path, "data")
        self._sizes = {path: size_of(path) for path in self._paths}
        known = [size for size in self._sizes.values() if size is not None]
        self.size: int | None = sum(known) if len(known) == len(self._sizes) else None
        self.manifest_entry: dict[str, Any] = {"path": name, "bytes": self.size}
        if self._paths != [name]:
            self.manifest_entry["files"] = [
                {"path": path.removeprefix(name.rstrip("/") + "/"), "bytes": size} for path, size in self._sizes.items()
            ]

    def check(self, text_key: str) -> None:
        """Check the kind of each file, and the columns of tables.

        Raises ReadError on a file of an unknown kind and on a bad table, OSError on a file that cannot be opened.
        """
        for read_error in self.unrecognized():
            raise read_error
        for path in self._paths:
            if not is_url(path):
                open_raw(path).close()
            if check := FORMATS[_format(path)].check:
                check(path, text_key)

    def unrecognized(self) -> Iterator[ReadError]:
        """An error for each file of an unknown kind."""
        for path in self._unknown:
            hint = f"the suffixes are {KINDS}; move it away or name the files to read"
            yield ReadError("unknown kind", f"{path}: unknown kind of file; {hint}")

    def chunks(self) -> list[Chunk]:
        """File after file, large ones in several chunks where the format allows it."""
        found = []
        for path, size in self._sizes.items():
            starts = FORMATS[_format(path)].split(path)
            share = (size or 0) // len(starts)
            ends = [*starts[1:], None]
            found += [Chunk(path, _format(path), a, b, share) for a, b in zip(starts, ends, strict=True)]
        return found


def _format(path: str | Path) -> str:
    """Suffix by which FORMATS knows `path`, or an empty string."""
    return next((suffix for suffix in SUFFIXES if str(path).lower().endswith(suffix)), "")

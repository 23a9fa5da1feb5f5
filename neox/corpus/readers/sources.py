"""From names to sources: a file, a glob, a folder or a URL of files, a saved data set, or one of the hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from neox.corpus.readers.chunks import Document, Piece
from neox.corpus.readers.columns import check_arrow, check_parquet, read_arrow, read_parquet, split_parquet
from neox.corpus.readers.errors import Fault, Faults, OnError, optional
from neox.corpus.readers.hub_datasets import HUB, HubDataset, SavedDataset, is_saved, read_dataset
from neox.corpus.readers.places import below_url, is_pattern, is_url, matching, open_place, size_of
from neox.corpus.readers.streams import COMPRESSED
from neox.corpus.readers.text import read_jsonl, read_txt, split_jsonl

FileId = tuple[int, int] | str
"""Device and inode of a file, whatever its name; or the identity of a data set of the hub."""


class Source(Protocol):
    """One name that the user gave, and the documents behind it."""

    name: str
    size: int | None
    """Bytes that the progress bar counts to: of the files, compressed ones as they are; None where nothing says."""
    noted: dict[str, Any]
    """What the manifest says of it: `path` (the name), `bytes`, and more where there is more to say."""

    def pieces(self) -> list[Piece]:
        """What it is read as, in order, whoever reads it."""
        ...

    def check(self, text_key: str) -> None:
        """Raises Fault on what can be known to be wrong without reading the text."""
        ...

    def strangers(self) -> Iterator[Fault]:
        """A fault for each file that is of no known kind."""
        ...


Name = str | Path | Source
"""What a user names: see `find_sources`; or a source that was found already, which stands as it is."""


class Format(NamedTuple):
    """How one kind of file is read."""

    read: Callable[[Piece, str, Faults, str | None], Iterator[Document]]
    package: str | None = None
    split: Callable[[str], list[int]] = lambda name: [0]
    """Where its pieces begin, in what `Piece.start` counts for this kind."""
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


def read_piece(piece: Piece, text_key: str, faults: Faults, meta_key: str | None = None) -> Iterator[Document]:
    """Each document of a piece, empty ones too. Raises Fault unless `faults` skips them.

    `text_key` names the member or the column that holds the text, `meta_key` another one that is wanted beside it.
    """
    return FORMATS[piece.kind].read(piece, text_key, faults, meta_key)


def read_source(source: Source, text_key: str, faults: Faults) -> Iterator[Document]:
    """Each document of a source, empty ones too, with its share of `size`. Raises Fault unless `faults` skips them."""
    for fault in source.strangers():
        faults.add(fault)
    for piece in source.pieces():
        yield from read_piece(piece, text_key, faults)


def find_sources(names: Name | Sequence[Name], text_key: str = "text", on_error: OnError = "fail") -> list[Source]:
    """Find the source of each name, before any text is read.

    A name is a file whose suffix FORMATS knows; a glob; a folder of such files, read recursively in the order of their
    paths within it, hidden files (`.name`) passed over; the URL of a file, a folder or a glob that fsspec reads; a
    folder that `Dataset.save_to_disk` wrote; or a data set of the Hugging Face hub, as
    `hf:OWNER/NAME[:CONFIG][@REVISION][#SPLIT]` or `hf://OWNER/NAME...`.
    Raises FileNotFoundError, and ValueError on a file that is reached twice, a file of an unknown kind, a folder
    without a file that can be read, a package that is missing; OSError on a file that cannot be opened. Unless faults
    are skipped also Fault on a Parquet file or a saved data set that is damaged or has no column of texts `text_key`.
    """
    if not (listed := list(names) if isinstance(names, Sequence) and not isinstance(names, str) else [names]):
        raise ValueError("no input files given")
    seen: dict[FileId, str] = {}
    sources = [_source(str(name), seen) if isinstance(name, str | Path) else name for name in listed]
    if on_error == "fail":
        for source in (source for source, name in zip(sources, listed, strict=True) if source is not name):
            try:
                source.check(text_key)
            except Fault as fault:
                Faults(on_error).add(fault)
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
    """Every file below `folder`, through links too, in no order. Unlike os.walk it hides no folder that is closed."""
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
    """Note a file or a folder by its place on the disk.

    Raises ValueError where it was met already, by any name, and where it is a pipe or the like.
    """
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(
            f"{path!r}: its name is not UTF-8, and could not be noted in the manifest; rename it"
        ) from None
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
    """One file, all files below a folder, or all that match a glob, sorted by their paths."""

    def __init__(self, name: str, paths: list[str]) -> None:
        self.name = name
        paths = sorted(paths)
        self._paths = [path for path in paths if _format(path)]
        self._unknown = [path for path in paths if not _format(path)]
        if not self._paths:
            raise ValueError(f"{name}: holds no file that can be read; the suffixes are {KINDS}")
        for path in self._paths:
            if package := FORMATS[_format(path)].package:
                optional(package, path)
        self._sizes = {path: size_of(path) for path in self._paths}
        known = [size for size in self._sizes.values() if size is not None]
        self.size: int | None = sum(known) if len(known) == len(self._sizes) else None
        self.noted: dict[str, Any] = {"path": name, "bytes": self.size}
        if self._paths != [name]:
            self.noted["files"] = [
                {"path": path.removeprefix(name.rstrip("/") + "/"), "bytes": size} for path, size in self._sizes.items()
            ]

    def check(self, text_key: str) -> None:
        """Raises Fault on a file of an unknown kind and on a bad table, OSError on a file that cannot be opened."""
        for fault in self.strangers():
            raise fault
        for path in self._paths:
            if not is_url(path):
                open_place(path).close()
            if check := FORMATS[_format(path)].check:
                check(path, text_key)

    def strangers(self) -> Iterator[Fault]:
        """A fault for each file that is of no known kind."""
        for path in self._unknown:
            hint = f"the suffixes are {KINDS}; move it away or name the files to read"
            yield Fault("unknown kind", f"{path}: unknown kind of file; {hint}")

    def pieces(self) -> list[Piece]:
        """File after file, large ones in several pieces where the format allows it."""
        found = []
        for path, size in self._sizes.items():
            starts = FORMATS[_format(path)].split(path)
            share = (size or 0) // len(starts)
            ends = [*starts[1:], None]
            found += [Piece(path, _format(path), a, b, share) for a, b in zip(starts, ends, strict=True)]
        return found


def _format(path: str | Path) -> str:
    """The suffix by which FORMATS knows how `path` is read, or an empty string."""
    return next((suffix for suffix in SUFFIXES if str(path).lower().endswith(suffix)), "")

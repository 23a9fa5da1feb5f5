"""From names to sources: a file, a folder of files, a saved data set, or one of the hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from neox.data.readers.columns import check_parquet, read_parquet
from neox.data.readers.faults import Fault, Faults, OnError, optional
from neox.data.readers.huggingface import HUB, HubDataset, SavedDataset, is_saved
from neox.data.readers.streams import COMPRESSED
from neox.data.readers.text import read_jsonl, read_txt

Place = tuple[int, int] | str
"""Which file this is on the disk, by whatever name; or which data set of the hub."""


class Source(Protocol):
    """One name that the user gave, and the documents behind it."""

    name: str
    size: int | None
    """Bytes that the progress bar counts to: of the files, compressed ones as they are; None where nothing says."""
    noted: dict[str, Any]
    """What the manifest says of it: `path` (the name), `bytes`, and more where there is more to say."""

    def records(self, text_key: str, faults: Faults) -> Iterator[tuple[str, float]]:
        """Each document, empty ones too, with its share of `size`. Raises Fault unless `faults` skips them."""
        ...

    def check(self, text_key: str) -> None:
        """Raises Fault on what can be known to be wrong without reading the text."""
        ...


class Format(NamedTuple):
    """How one kind of file is read."""

    read: Callable[[Path, str, Faults], Iterator[tuple[str, float]]]
    package: str | None = None


TEXT = {".txt": read_txt, ".jsonl": read_jsonl, ".json": read_jsonl}
PACKAGES = {".gz": None, ".zst": "zstandard"}
FORMATS: dict[str, Format] = {
    **{suffix: Format(read) for suffix, read in TEXT.items()},
    **{suffix + packed: Format(read, PACKAGES[packed]) for suffix, read in TEXT.items() for packed in COMPRESSED},
    ".parquet": Format(read_parquet, "pyarrow"),
}
KINDS = f"{', '.join(TEXT)}, each also with {' or '.join(COMPRESSED)}, and .parquet"


def find_sources(
    names: str | Path | Sequence[str | Path], text_key: str = "text", on_error: OnError = "fail"
) -> list[Source]:
    """What the names stand for, before any of it is read.

    A name is a file whose suffix FORMATS knows; a folder of such files, read recursively in the order of their paths
    within it, hidden files (`.name`) passed over; a folder that `Dataset.save_to_disk` wrote; or a data set of the
    Hugging Face hub, as `hf:OWNER/NAME[:CONFIG][@REVISION][#SPLIT]`.
    Raises FileNotFoundError, and ValueError on a file that is reached twice, a file of an unknown kind, a folder
    without a file that can be read, a package that is missing; OSError on a file that cannot be opened. Unless faults
    are skipped also Fault on a Parquet file or a saved data set that is damaged or has no column of texts `text_key`.
    """
    if not (listed := [names] if isinstance(names, str | Path) else list(names)):
        raise ValueError("no input files given")
    seen: dict[Place, str] = {}
    sources = [_source(str(name), seen) for name in listed]
    if on_error == "fail":
        for source in sources:
            try:
                source.check(text_key)
            except Fault as fault:
                Faults(on_error).add(fault)
    return sources


def _source(name: str, seen: dict[Place, str]) -> Source:
    if name.startswith(HUB):
        hub = HubDataset(name)
        _once(hub.identity, name, seen)
        return hub
    path = Path(name)
    if path.is_dir():
        if is_saved(path):
            _meet(path, seen)
            return SavedDataset(name)
        return Files(name, list(_below(path, seen)))
    if not path.exists():
        raise FileNotFoundError(f"{name}: no such file or folder")
    _meet(path, seen)
    if not _format(path):
        raise ValueError(f"{name}: unknown kind of file; the suffixes are {KINDS}")
    return Files(name, [path])


def _below(folder: Path, seen: dict[Place, str]) -> Iterator[Path]:
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


def _meet(path: Path, seen: dict[Place, str]) -> None:
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


def _once(place: Place, name: str, seen: dict[Place, str]) -> None:
    if place in seen:
        raise ValueError(f"{name}: is the same as {seen[place]}; its text would come twice: name it once")
    seen[place] = name


class Files:
    """One file, or all files below a folder, sorted by their path within it."""

    def __init__(self, name: str, paths: list[Path]) -> None:
        self.name = name
        paths = sorted(paths, key=lambda path: path.as_posix())
        self._paths = [path for path in paths if _format(path)]
        self._unknown = [path for path in paths if not _format(path)]
        if not self._paths:
            raise ValueError(f"{name}: holds no file that can be read; the suffixes are {KINDS}")
        for path in self._paths:
            if package := FORMATS[_format(path)].package:
                optional(package, str(path))
        sizes = {path: path.stat().st_size for path in self._paths}
        self.size: int | None = sum(sizes.values())
        self.noted: dict[str, Any] = {"path": name, "bytes": self.size}
        if Path(name).is_dir():
            self.noted["files"] = [
                {"path": path.relative_to(name).as_posix(), "bytes": size} for path, size in sizes.items()
            ]

    def check(self, text_key: str) -> None:
        """Raises Fault on a file of an unknown kind and on a bad Parquet file, OSError on one that cannot be opened."""
        for fault in self._strangers():
            raise fault
        for path in self._paths:
            path.open("rb").close()
            if _format(path) == ".parquet":
                check_parquet(path, text_key)

    def records(self, text_key: str, faults: Faults) -> Iterator[tuple[str, float]]:
        """The documents of file after file, each with the file bytes it took."""
        for fault in self._strangers():
            faults.add(fault)
        for path in self._paths:
            yield from FORMATS[_format(path)].read(path, text_key, faults)

    def _strangers(self) -> Iterator[Fault]:
        for path in self._unknown:
            hint = f"the suffixes are {KINDS}; move it away or name the files to read"
            yield Fault("unknown kind", f"{path}: unknown kind of file; {hint}")


def _format(path: Path) -> str:
    """The suffix by which FORMATS knows how `path` is read, or an empty string."""
    return next((suffix for suffix in FORMATS if path.name.lower().endswith(suffix)), "")

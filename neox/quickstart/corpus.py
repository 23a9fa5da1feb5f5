"""Real text that every install already has: the documented source of pure-Python packages that torch itself brings.

torch needs sympy and networkx, they and it need mpmath and jinja2. All four are `py3-none-any` wheels, so a pinned
version has the same bytes on every machine, and their releases are years apart, so even an unpinned install usually
has the same text. `corpus_manifest.txt` holds the list of files with a hash of each. It is this rule applied to the
pinned versions (see `manifest_lines`):

- every `.py` file of the four packages, but no tests (folders tests, test, testing, benchmarks; test_*.py, conftest.py)
  and no parsers written by a generator (folder _antlr) or sample inputs of one (test-examples);
- at least a third of the file is docstrings: text and code about the same things, side by side;
- at most a quarter of the file is digits: tables of constants are noise to a language model.

A text is what the file holds after universal newlines and NFC (which the tokenizer would apply anyway, so that bits
per byte count the same bytes for the model and for the compressors).
"""

import ast
import hashlib
import importlib.machinery
import importlib.metadata
import unicodedata
import warnings
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path, PurePosixPath

PACKAGES = ("jinja2", "mpmath", "networkx", "sympy")
SKIP_FOLDERS = frozenset({"tests", "test", "testing", "benchmarks", "_antlr", "test-examples"})
MIN_DOCSTRINGS = 1 / 3
MAX_DIGITS = 1 / 4
HELDOUT_ONE_IN = 27  # chosen among its neighbours for a file from each of the four packages, 455 KB in all
HASH_DIGITS = 16

Document = tuple[str, str]  # (path such as "sympy/core/add.py", text)


@dataclass(frozen=True)
class Corpus:
    """Documents in order of path, and differences between the install and the pinned one."""

    train: list[Document]
    heldout: list[Document]
    pinned_files: int  # how many files the manifest names
    changed: list[str]  # paths whose text differs from the pinned one; they are used as they are
    missing: list[str]  # paths that are absent or not UTF-8; they are left out
    note: str | None  # one line for the user where the install differs from the pinned one, else None

    @cached_property
    def train_bytes(self) -> bytes:
        """Training texts concatenated in order, UTF-8: the input that primes the compressor."""
        return b"".join(text.encode() for _, text in self.train)

    @cached_property
    def heldout_bytes(self) -> bytes:
        """Held-out texts concatenated in order, UTF-8: the bytes of every bits-per-byte figure."""
        return b"".join(text.encode() for _, text in self.heldout)

    @property
    def digest(self) -> str:
        """sha256 over every path and text: two runs with one digest saw the same corpus and the same split."""
        digest = hashlib.sha256()
        for part in (self.train, self.heldout):
            for path, text in part:
                data = text.encode()
                digest.update(f"{path}\0{len(data)}\0".encode() + data)
            digest.update(b"\xff")  # no UTF-8 text holds this byte
        return digest.hexdigest()

    @property
    def package_bytes(self) -> dict[str, int]:
        """Bytes of text (training and held-out) by package."""
        sizes = dict.fromkeys(PACKAGES, 0)
        for path, text in self.train + self.heldout:
            sizes[path.split("/", 1)[0]] += len(text.encode())
        return sizes


def is_heldout(path: str) -> bool:
    """True if a file is held out; depends on its path alone, so no other file or edit changes it."""
    return zlib.crc32(path.encode()) % HELDOUT_ONE_IN == 0


def build_corpus(folders: Mapping[str, Path] | None = None) -> Corpus:
    """Read the manifest's files from the installed packages, without importing any of them.

    `folders` maps a package name to its folder; by default they are looked up on the import path. A file that differs
    from the pinned one is used as it is, one that is missing or is not UTF-8 is left out, and `note` says so.

    Raises ValueError where no training or no held-out text is left at all.
    """
    pinned_versions, entries = read_manifest()
    folders = dict(locate_packages() if folders is None else folders)
    train: list[Document] = []
    heldout: list[Document] = []
    changed: list[str] = []
    missing: list[str] = []
    for prefix, size, path in entries:
        package, rest = path.split("/", 1)
        try:
            text = read_text((folders[package] / rest).read_bytes())
        except (KeyError, OSError, UnicodeDecodeError):
            missing.append(path)
            continue
        if text_hash(text) != (prefix, size):
            changed.append(path)
        (heldout if is_heldout(path) else train).append((path, unicodedata.normalize("NFC", text)))
    if not any(text for _, text in train) or not any(text for _, text in heldout):
        raise ValueError(
            f"quickstart found no text to train on: {len(missing)} of {len(entries)} files of the packages "
            f"{', '.join(PACKAGES)} are missing; install them again: pip install -c constraints.txt -e ."
        )
    note = _describe_difference(pinned_versions, len(entries), changed, missing)
    return Corpus(train, heldout, len(entries), changed, missing, note)


def read_text(data: bytes) -> str:
    """The text of a source file: UTF-8 with or without a mark, any line ends. Raises UnicodeDecodeError."""
    return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def text_hash(text: str) -> tuple[str, int]:
    """(first hex digits of the sha256, size in bytes) of a text as UTF-8: what a line of the manifest starts with."""
    data = text.encode()
    return hashlib.sha256(data).hexdigest()[:HASH_DIGITS], len(data)


def locate_packages() -> dict[str, Path]:
    """Folder of each package that is installed, found on the import path and not imported."""
    folders = {}
    for name in PACKAGES:
        # PathFinder, not importlib.util.find_spec: that one answers from sys.modules when torch has imported sympy.
        spec = importlib.machinery.PathFinder.find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            folders[name] = Path(next(iter(spec.submodule_search_locations)))
    return folders


def installed_version(package: str) -> str | None:
    """Version by the package's metadata; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def read_manifest() -> tuple[dict[str, str], list[tuple[str, int, str]]]:
    """The shipped manifest: ({package: version}, [(hash prefix, size in bytes, path)] in order of path)."""
    versions: dict[str, str] = {}
    entries: list[tuple[str, int, str]] = []
    for line in files(__package__).joinpath("corpus_manifest.txt").read_text(encoding="utf-8").splitlines():
        match line.split():
            case ["package", name, version]:
                versions[name] = version
            case [prefix, size, path] if not line.startswith("#"):
                entries.append((prefix, int(size), path))
    return versions, entries


def manifest_lines() -> Iterator[str]:
    """The manifest's lines for the packages installed here, by the rule in this module's docstring.

    When a pin moves: python -m neox.quickstart.corpus > corpus_manifest.txt, and copy it over the shipped one.
    """
    yield "# Text of the quickstart corpus, in order of path. Made by: python -m neox.quickstart.corpus"
    yield f"# package NAME VERSION | first {HASH_DIGITS} hex digits of sha256, bytes, path (line ends as \\n)"
    folders = locate_packages()
    for name in PACKAGES:
        yield f"package {name} {installed_version(name)}"
    for name in PACKAGES:
        paths = [PurePosixPath(name, file.relative_to(folders[name])) for file in folders[name].rglob("*.py")]
        for path in sorted(paths, key=str):
            if SKIP_FOLDERS.intersection(path.parts) or path.name == "conftest.py" or path.name.startswith("test_"):
                continue
            text = read_text(folders[name].joinpath(*path.parts[1:]).read_bytes())
            if is_readable(text):
                yield f"{' '.join(map(str, text_hash(text)))} {path}"


def is_readable(text: str) -> bool:
    """True for documented code: at least a third docstrings, few digits."""
    data = text.encode()
    digits = sum(data.count(digit) for digit in b"0123456789")
    return bool(data) and digits <= MAX_DIGITS * len(data) and docstring_bytes(text) >= MIN_DOCSTRINGS * len(data)


def docstring_bytes(source: str) -> int:
    """Bytes of the docstring literals of a module, its classes and functions, quotes included.

    Counted by their place in the source: what `ast` makes of a docstring's value changed between Python versions.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # an invalid escape in somebody's docstring is not our news
        tree = ast.parse(source)
    starts = [0]
    for line in source.encode().split(b"\n"):
        starts.append(starts[-1] + len(line) + 1)
    total = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            match node.body:
                case [ast.Expr(value=ast.Constant(value=str()) as literal), *_]:
                    assert literal.end_lineno is not None
                    assert literal.end_col_offset is not None
                    total += starts[literal.end_lineno - 1] + literal.end_col_offset
                    total -= starts[literal.lineno - 1] + literal.col_offset
    return total


def _describe_difference(pinned: Mapping[str, str], total: int, changed: list[str], missing: list[str]) -> str | None:
    if not changed and not missing:
        return None
    parts = []
    for package in PACKAGES:
        counts = [sum(path.startswith(f"{package}/") for path in paths) for paths in (changed, missing)]
        if any(counts):
            found = installed_version(package) or "nothing"
            what = ", ".join(f"{n} {word}" for n, word in zip(counts, ("changed", "missing"), strict=True) if n)
            parts.append(f"{package}: {what} (found {found}, pinned {pinned[package]})")
    return (
        f"corpus: {len(changed) + len(missing)} of {total} files differ from the pinned ones: {'; '.join(parts)}. "
        f"Going on with what is here; figures will differ a little from the published ones."
    )


if __name__ == "__main__":
    for _line in manifest_lines():
        print(_line)

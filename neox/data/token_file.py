"""Token files: gpt-neox's `.bin`/`.idx` pair ("mmap" layout), written as a stream and read through np.memmap.

`.idx`, little-endian: 9 bytes magic, u64 version 1, u8 dtype code, u64 N, u64 D, int32 sizes[N] (tokens a document),
int64 pointers[N] (byte offsets into `.bin`), int64 doc_idx[D] (0 and the number of documents after each document).
`.bin`: the documents' tokens, one after another.
Source: EleutherAI/gpt-neox, megatron/data/indexed_dataset.py (MMapIndexedDataset).
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from neox.system.files import is_at, open_own, sync_folder, temporary_name, try_lock, write_atomic, write_error

MAGIC = b"MMIDIDX\x00\x00"
TNTIDX = b"TNTIDX\x00\x00"  # the magic bytes of the layout before
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, N, D
DTYPE_OF_CODE: dict[int, np.dtype[Any]] = {
    1: np.dtype("<u1"),
    2: np.dtype("<i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f4"),
    7: np.dtype("<f8"),
    8: np.dtype("<u2"),
}
CODE_OF_DTYPE = {dtype: code for code, dtype in DTYPE_OF_CODE.items()}
CHECKED = 1 << 20  # documents whose places are checked when a file is opened: some milliseconds
STRETCHES = 64
BLOCK = 1 << 20  # documents whose index entries are held in memory at once, beside the sizes


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Dtype in which gpt-neox stores ids: uint16 for vocabularies below 65500, else int32."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


def pair(prefix: str | Path) -> tuple[Path, Path]:
    """Paths of the `.bin` and the `.idx` of a prefix.

    The name of either file may stand for the prefix.
    """
    return beside(prefix, ".bin"), beside(prefix, ".idx")


def beside(prefix: str | Path, suffix: str) -> Path:
    """Path of a file of a prefix: its name and `suffix`, such as `.json`; dots within the name stay.

    Raises ValueError where the prefix has no name.
    """
    name = str(prefix)
    if not name or name.endswith(("/", os.sep)):
        raise ValueError(f"'{name}': a prefix is a folder and a name, such as {name}corpus")
    return Path((name[:-4] if name.endswith((".bin", ".idx")) else name) + suffix)


class TokenWriter:
    """Writer of a `.bin`/`.idx` pair: `with TokenWriter(prefix, dtype) as w: w.add_document(tokens)`.

    The tokens stream to a temporary name. On leaving the block the `.bin` is put in place, then the manifest if one
    is set, then the `.idx`, whose presence marks the pair as complete; an exception removes what was written.
    An older pair of the same prefix stays whole until then.
    Raises OSError naming the file (disk full, folder missing); `add_document` raises ValueError on unfit tokens.
    """

    def __init__(self, prefix: str | Path, dtype: npt.DTypeLike) -> None:
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if self.dtype not in CODE_OF_DTYPE or self.dtype.kind not in "iu":
            names = ", ".join(str(d) for d in CODE_OF_DTYPE if d.kind in "iu")
            raise ValueError(f"{prefix}: tokens cannot be stored as {np.dtype(dtype)}; take one of {names}")
        self.bin, self.idx = pair(prefix)
        self.manifest: dict[str, Any] | None = None
        """Written as JSON to `<prefix>.json` between `.bin` and `.idx`."""
        self.tokens = 0
        self.documents = 0
        self._digest = hashlib.sha256()
        self._file: IO[bytes] | None = None
        self._index: IO[bytes] | None = None

    @property
    def sha256(self) -> str:
        """Hash of the tokens written so far: of the whole `.bin` in the end."""
        return self._digest.hexdigest()

    def __enter__(self) -> TokenWriter:
        self.bin.parent.mkdir(parents=True, exist_ok=True)
        self._file = _open_alone(temporary_name(self.bin))
        try:
            # Sizes go to the index at once: those of all documents of a large corpus would fill the memory.
            self._index = open_own(temporary_name(self.idx), "w+b")
            self._index.write(bytes(HEADER.size))
        except OSError as error:
            self._discard()
            raise write_error(error, self.idx) from error
        return self

    def add_document(self, tokens: npt.ArrayLike) -> None:
        """Append one document: a flat sequence of integer ids that fit the dtype. Raises ValueError on others."""
        ids = np.asarray(tokens)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise ValueError(f"{self.bin}: a document must be a flat sequence of integers, not {ids.dtype} {ids.shape}")
        self.add_tokens(ids)
        self.add_sizes([ids.size])

    def add_tokens(self, ids: npt.NDArray[Any]) -> None:
        """Append tokens of a document, or of several, whose sizes follow. Raises ValueError on unfit ids; OSError."""
        limits = np.iinfo(self.dtype)
        if ids.size and not (limits.min <= int(ids.min()) and int(ids.max()) <= limits.max):
            raise ValueError(f"{self.bin}: token ids {ids.min()} to {ids.max()} do not fit {self.dtype}")
        self.add_bytes(ids.astype(self.dtype).tobytes())

    def add_bytes(self, tokens: bytes | memoryview) -> None:
        """Append tokens as they are stored. Raises OSError."""
        assert self._file is not None, "tokens added outside of the with block"
        self._digest.update(tokens)
        try:
            self._file.write(tokens)
        except OSError as error:
            raise write_error(error, self.bin) from error
        self.tokens += len(tokens) // self.dtype.itemsize

    def add_sizes(self, sizes: Sequence[int] | npt.NDArray[Any]) -> None:
        """Append the sizes of documents whose tokens were added. Raises ValueError; OSError."""
        assert self._index is not None, "sizes added outside of the with block"
        longest = max(sizes, default=0)
        if longest > np.iinfo(np.int32).max:
            raise ValueError(f"{self.bin}: a document of {longest} tokens is too long for the format; split it")
        try:
            self._index.write(np.asarray(sizes, dtype="<i4").tobytes())
        except OSError as error:
            raise write_error(error, self.idx) from error
        self.documents += len(sizes)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            self._discard()

    def _commit(self) -> None:
        assert self._file is not None
        assert self._index is not None
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise write_error(error, self.bin) from error
        try:
            self._finish(self._index)
        except OSError as error:
            raise write_error(error, self.idx) from error
        # The old index goes first: beside the new .bin it could pass for a complete pair.
        self.idx.unlink(missing_ok=True)
        sync_folder(self.bin.parent)
        os.replace(temporary_name(self.bin), self.bin)
        self._file.close()
        sync_folder(self.bin.parent)
        if self.manifest is not None:
            content = json.dumps(self.manifest, indent=2, ensure_ascii=False) + "\n"
            write_atomic(beside(self.bin, ".json"), content.encode("utf-8"))
        os.replace(temporary_name(self.idx), self.idx)
        sync_folder(self.bin.parent)

    def _discard(self) -> None:
        """Close, and remove what was not put in place."""
        for file, path in ((self._file, self.bin), (self._index, self.idx)):
            if file is None:
                continue
            if not file.closed and self._ours(file, temporary_name(path)):
                temporary_name(path).unlink(missing_ok=True)
            with suppress(OSError):  # closing flushes once more, and the disk may still be full
                file.close()
        self._file = self._index = None

    def _ours(self, file: IO[bytes], path: Path) -> bool:
        with suppress(OSError):
            return os.path.samestat(os.fstat(file.fileno()), os.lstat(path))
        return False

    def _finish(self, file: IO[bytes]) -> None:
        """Put pointers and documents behind the sizes, and the header before them."""
        count, start = self.documents, 0
        for block in _blocks(count):
            file.seek(HEADER.size + 4 * block.start)
            sizes = np.frombuffer(file.read(4 * (block.stop - block.start)), "<i4")
            ends = start + np.cumsum(sizes, dtype=np.int64) * self.dtype.itemsize
            file.seek(0, os.SEEK_END)
            file.write(np.concatenate([[start], ends[:-1]]).astype("<i8").tobytes())
            start = int(ends[-1])
        assert start == self.tokens * self.dtype.itemsize, "sizes that do not add up"
        file.seek(0, os.SEEK_END)
        for block in _blocks(count + 1):
            file.write(np.arange(block.start, block.stop, dtype="<i8").tobytes())
        file.seek(0)
        file.write(HEADER.pack(MAGIC, VERSION, CODE_OF_DTYPE[self.dtype], count, count + 1))
        file.flush()
        os.fsync(file.fileno())


def _blocks(count: int) -> list[slice]:
    return [slice(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK)]


def _stretches(count: int) -> list[slice]:
    """Ranges of documents to check: all of up to CHECKED, else as many, spread evenly.

    Consecutive ranges of a complete check share a document.
    """
    length = CHECKED // STRETCHES
    if count <= CHECKED:
        return [slice(max(0, start - 1), min(start + length, count)) for start in range(0, count, length)]
    return [slice(start, start + length) for start in np.linspace(0, count - length, STRETCHES, dtype=int).tolist()]


def _open_alone(path: Path) -> IO[bytes]:
    """Open `path` for writing, emptied, unless another process is writing it.

    Two at once would mix their tokens.
    """
    try:
        file = open_own(path, "ab")
    except OSError as error:
        raise write_error(error, path) from error
    # Between our open and our lock its writer may have put the file in place: then it is no longer ours to empty.
    if not (try_lock(file) and is_at(file, path)):
        file.close()
        raise ValueError(f"{path}: another process is writing this file now; wait for it or choose another output name")
    file.truncate(0)
    return file


class TokenFile:
    """A `.bin`/`.idx` pair, read through the page cache: nothing but the index header is loaded.

    `tokens`: all tokens, flat, in document order; `sizes` [N] int32; `doc_idx` [D] int64; `document(i)`; `len`.
    Raises FileNotFoundError, and ValueError that names the file with what was expected and found, when the pair is
    not whole.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.bin, self.idx = pair(prefix)
        for path in (self.idx, self.bin):
            if not path.is_file():
                hint = f"; run prepare with {str(self.bin)[:-4]} as its output"
                raise FileNotFoundError(f"{path}: no such token file{hint}")
        found = self.idx.stat().st_size
        with self.idx.open("rb") as file:
            head = file.read(HEADER.size)
        if head.startswith(TNTIDX):
            raise self._foreign("it is the first layout of Megatron's indexed data sets (TNTIDX)")
        if head[: len(MAGIC)] != MAGIC[: len(head)]:
            raise self._broken(self.idx, f"it starts with {head[: len(MAGIC)]!r}, not with {MAGIC!r}")
        if len(head) < HEADER.size:
            raise self._broken(self.idx, f"expected at least {HEADER.size} bytes, found {found}")
        _, version, code, count, marks = HEADER.unpack(head)
        if version != VERSION:
            raise self._broken(self.idx, f"expected version {VERSION}, found {version}")
        if code in DTYPE_OF_CODE and DTYPE_OF_CODE[code].kind not in "iu":
            raise self._foreign(f"its values are {DTYPE_OF_CODE[code]}, no token ids")
        if code not in DTYPE_OF_CODE:
            known = ", ".join(f"{c} ({d})" for c, d in DTYPE_OF_CODE.items() if d.kind in "iu")
            raise self._broken(self.idx, f"expected a dtype code of integers, {known}; found {code}")
        expected = HEADER.size + 12 * count + 8 * marks
        if found != expected:
            raise self._broken(
                self.idx, f"expected {expected} bytes for {count} documents and {marks} marks, found {found}"
            )
        self.dtype = DTYPE_OF_CODE[code]
        self.sizes: npt.NDArray[np.int32] = _map(self.idx, "<i4", HEADER.size, count)
        self._pointers: npt.NDArray[np.int64] = _map(self.idx, "<i8", HEADER.size + 4 * count, count)
        self.doc_idx: npt.NDArray[np.int64] = _map(self.idx, "<i8", HEADER.size + 12 * count, marks)
        tokens = self._count()
        found = self.bin.stat().st_size
        if found != tokens * self.dtype.itemsize:
            raise self._broken(
                self.bin,
                f"expected {tokens * self.dtype.itemsize} bytes for {tokens} tokens of {self.dtype}, found {found}",
            )
        self.tokens: npt.NDArray[Any] = _map(self.bin, self.dtype, 0, tokens)

    def _count(self) -> int:
        """Count the tokens; check that documents lie in the `.bin` without gaps.

        Of an index too long to be read before the first step, stretches all over it are looked at.
        """
        start = 0
        for block in _stretches(len(self.sizes)):
            # Read, not mapped: the system maps far more around what is looked at, and counts it as ours.
            count, sizes_at, pointers_at = block.stop - block.start, HEADER.size, HEADER.size + 4 * len(self)
            sizes = np.fromfile(self.idx, "<i4", count, offset=sizes_at + 4 * block.start).astype(np.int64)
            sizes *= self.dtype.itemsize
            pointers = np.fromfile(self.idx, "<i8", count, offset=pointers_at + 8 * block.start)
            if block.start:
                start = int(pointers[0])
            expected = start + np.cumsum(sizes) - sizes
            wrong = np.flatnonzero((pointers != expected) | (sizes < 0))
            if wrong.size:
                first = int(wrong[0])
                raise self._broken(
                    self.idx,
                    f"document {block.start + first} of {self.sizes[block.start + first]} tokens should start at byte "
                    f"{expected[first]} of the .bin, found {pointers[first]}",
                )
            start = int(expected[-1] + sizes[-1])
        return start // self.dtype.itemsize

    def _foreign(self, what: str) -> ValueError:
        return ValueError(f"{self.idx}: is not supported: {what}; make token files of the text with `neox prepare`")

    def _broken(self, path: Path, what: str) -> ValueError:
        return ValueError(f"{path}: damaged or incomplete: {what}; run prepare again")

    def __len__(self) -> int:
        """Documents."""
        return len(self.sizes)

    @property
    def pointers(self) -> npt.NDArray[np.int64]:
        """Byte offset of each document in the `.bin` [N].

        An empty document begins where the next one does.
        """
        return self._pointers

    def document(self, i: int) -> npt.NDArray[Any]:
        """Tokens of document `i`, [sizes[i]], a view. Raises IndexError outside of 0 .. len - 1."""
        if not 0 <= i < len(self):
            raise IndexError(f"{self.bin}: document {i} does not exist; there are {len(self)}")
        start = int(self._pointers[i]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.sizes[i])]


def _map(path: Path, dtype: npt.DTypeLike, offset: int, count: int) -> npt.NDArray[Any]:
    if count == 0:  # an empty range cannot be mapped
        return np.zeros(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,))

"""Arrays that are computed once and cached on disk, by a hash of their inputs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import numpy as np
import numpy.typing as npt

from neox.system.files import write_whole

Arrays = dict[str, npt.NDArray[Any]]


def content_key(depends_on: dict[str, Any], *content: npt.NDArray[Any]) -> str:
    """Hash values and the bytes of arrays: 24 hex digits."""
    digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode())
    for array in content:
        for first in range(0, len(array), 1 << 20):  # a map is never whole in memory
            digest.update(np.ascontiguousarray(array[first : first + (1 << 20)]).data)
    return digest.hexdigest()[:24]


def cached_arrays(folder: Path, key: str, names: tuple[str, ...], build: Callable[[], Arrays]) -> Arrays:
    """Map the arrays `FOLDER/KEY_NAME.npy`; build and write them first if one is missing.

    Each file is whole or absent, and several processes may build at once: they write the same bytes.
    Raises OSError that names the file where it cannot be written, ValueError where one is no array.
    """
    paths = {name: folder / f"{key}_{name}.npy" for name in names}
    if not all(path.exists() for path in paths.values()):
        folder.mkdir(parents=True, exist_ok=True)
        for name, array in build().items():
            path = paths[name]
            # A name of its own: another process may be writing the same array.
            write_npy(path, array.dtype, array.shape, [array], path.with_name(f"{path.name}.{uuid4().hex}.tmp"))
    try:
        return {name: np.load(path, mmap_mode="r", allow_pickle=False) for name, path in paths.items()}
    except (ValueError, EOFError) as error:
        raise ValueError(f"{folder}/{key}_*.npy: damaged ({error}): remove them, they are made again") from None


def write_npy(
    path: Path,
    dtype: npt.DTypeLike,
    shape: tuple[int, ...],
    blocks: Iterable[npt.NDArray[Any]],
    temporary: Path | None = None,
) -> None:
    """Write a `.npy` file, whole or not at all, from blocks of rows.

    The blocks may come one at a time.

    `temporary` as for `write_whole`. Raises OSError that names the file.
    """
    dtype = np.dtype(dtype)
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}

    def write(file: IO[bytes]) -> None:
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            file.write(np.ascontiguousarray(block, dtype).data)

    write_whole(path, write, temporary)

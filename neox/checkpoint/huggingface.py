"""Hugging Face folders: config.json, safetensors or pytorch_model.bin files with an index, tokenizer.json."""

import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neox.checkpoint import families
from neox.checkpoint.weight_source import CheckpointError, WeightSource, read_json, slices
from neox.config import ModelConfig
from neox.config.structured import check_regular
from neox.system.console import one_line
from neox.tokenizer import Tokenizer

_FLOATING = ("F64", "F32", "F16", "BF16", "float64", "float32", "float16", "bfloat16")  # of safetensors, of torch
_OPEN_FILES = 2
"""A parameter's q, k and v may lie in two files; a .bin file of an old torch is in memory while it is open."""


class HuggingFaceFolder(WeightSource):
    """Weights of a Hugging Face folder, of any family in `families`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "config.json", read_config(folder))
        self.folder = folder
        self._open: dict[Path, Any] = {}  # the latest used is the last
        files = _weight_files(folder)
        spelled = families.canonical(self.config, files)
        self._stored = {ours: (name, files[name]) for ours, name in spelled.items()}
        if self.config.tie_word_embeddings:
            if self._head_differs():
                self.reshape(self.config.replace(tie_word_embeddings=False))
        elif all(ours != name for ours, name in spelled.items()) and self._head not in spelled:
            self.headless = True
            self.shapes = {name: shape for name, shape in self.shapes.items() if not name.startswith("embed_out.")}
        self._check_names()

    @classmethod
    def matches(cls, folder: Path) -> bool:
        return (folder / "config.json").exists()

    @property
    def dtype(self) -> torch.dtype:
        stored: torch.dtype = self._tensor(families.their_names(self.config, "embed_in.weight")[0])[:1].dtype
        return stored

    def names(self) -> Iterable[str]:
        def place(name: str) -> tuple[bool, Path]:
            return not name.startswith("embed_"), self._stored[families.their_names(self.config, name)[0]][1]

        return sorted(self.shapes, key=place)  # file by file, so that each is opened once

    def read(self, name: str, shape: Sequence[int] | None = None, offsets: Sequence[int] | None = None) -> Tensor:
        whole, theirs = self.shapes[name], families.their_names(self.config, name)
        ranges = slices(whole, shape, offsets)
        expected = [whole[0] // len(theirs), *whole[1:]]
        if len(theirs) == 1:
            return self._slice(theirs[0], ranges, expected)
        # The rows that are asked for are part of whole heads of q, k and v.
        rows, width = ranges[0], self.config.head_dim
        first, last = rows.start // (3 * width), -(-rows.stop // (3 * width))
        heads = (slice(first * width, last * width), *ranges[1:])
        fused = families.fuse(self.config, [self._slice(each, heads, expected) for each in theirs])
        return fused[rows.start - first * 3 * width : rows.stop - first * 3 * width]

    def tokenizer(self) -> Tokenizer | None:
        path = self.folder / "tokenizer.json"
        return Tokenizer.from_file(path) if path.exists() else None

    def _check_names(self) -> None:
        config, stored = self.config, self._stored.keys()
        expected = {theirs for name in self.shapes for theirs in families.their_names(config, name)}
        missing = sorted(expected - stored)
        extra = sorted(name for name in stored - expected if not families.IGNORED.search(name))
        if config.tie_word_embeddings:
            extra = [name for name in extra if name not in ("embed_out.weight", "lm_head.weight")]
        for problem, names in (("is missing", missing), ("is not part of this model", extra)):
            if names:
                more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
                raise CheckpointError(
                    f"{self.folder}: tensor {names[0]} {problem}{more}: config.json and the weight files do not belong "
                    "together"
                )

    @property
    def _head(self) -> str:
        return families.their_names(self.config, "embed_out.weight")[0]

    def _head_differs(self) -> bool:
        """Compare a stored head with the embedding that it should share: transformers keeps both where they differ."""
        if self._head not in self._stored:
            return False
        embedding = families.their_names(self.config, "embed_in.weight")[0]
        shape = list(self.shapes["embed_in.weight"])
        for at in range(0, shape[0], 4096):
            rows = (slice(at, at + 4096), slice(None))
            if not torch.equal(self._slice(self._head, rows, shape), self._slice(embedding, rows, shape)):
                return True
        return False

    def _slice(self, theirs: str, ranges: tuple[slice, ...], expected: list[int]) -> Tensor:
        name, path = self._stored[theirs]
        try:
            tensor = self._tensor(theirs)
            shape = list(tensor.shape) if isinstance(tensor, Tensor) else tensor.get_shape()
            kind = str(tensor.dtype).removeprefix("torch.") if isinstance(tensor, Tensor) else tensor.get_dtype()
            if kind not in _FLOATING:
                raise CheckpointError(
                    f"{path}: tensor {name} is stored as {kind}, no floating-point type of 16 bits or more: quantized "
                    "weights are not read here; take the folder that they were made from"
                )
            if shape == expected:
                return tensor[ranges]
        except _safetensors_error() as error:
            raise _unreadable(path, error) from None
        raise CheckpointError(
            f"{path}: tensor {name} has shape {shape}, config.json says {expected}: the weights and the config do "
            "not belong together"
        )

    def _tensor(self, theirs: str) -> Any:
        """Stored tensor of a .bin file (memory-mapped), or handle into a safetensors file that reads slices."""
        name, path = self._stored[theirs]
        file = self._open.pop(path, None) or _open_file(path)
        while len(self._open) >= _OPEN_FILES:
            del self._open[next(iter(self._open))]
        self._open[path] = file
        if isinstance(file, dict):
            if name not in file:
                raise CheckpointError(f"{path}: the index names tensor {name}, which is not in the file")
            return file[name]
        try:
            return file.get_slice(name)
        except _safetensors_error() as error:
            raise _unreadable(path, error) from None


def read_config(folder: Path) -> ModelConfig:
    """Read the config.json of a Hugging Face folder. Raises CheckpointError."""
    try:
        return families.read_config(read_json(folder / "config.json"))
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from None


def _weight_files(folder: Path) -> dict[str, Path]:
    """Map the name of each stored tensor to its file; a single file wins over an index, as in transformers."""
    for index, single in (
        ("model.safetensors.index.json", "model.safetensors"),
        ("pytorch_model.bin.index.json", "pytorch_model.bin"),
    ):
        if (folder / single).exists():
            return dict.fromkeys(_open_file(folder / single).keys(), folder / single)
        if (folder / index).exists():
            table = read_json(folder / index).get("weight_map")
            if not isinstance(table, dict) or not all(_plain_name(file) for file in table.values()):
                raise CheckpointError(f"{folder / index}: its weight_map does not name files; fetch it again")
            absent = sorted({file for file in table.values() if not (folder / file).is_file()})
            if absent:
                raise CheckpointError(
                    f"{folder}: {len(absent)} shard(s) missing, the first is {absent[0]}; fetch again"
                )
            return {name: folder / file for name, file in table.items()}
    raise CheckpointError(f"{folder}: no model.safetensors, its index, or pytorch_model.bin in this folder")


def _plain_name(file: object) -> bool:
    return isinstance(file, str) and bool(file) and Path(file).name == file


def _safetensors_error() -> type[Exception]:
    from safetensors import SafetensorError

    return SafetensorError


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path}: cannot be read ({one_line(error)}); it is truncated or no weight file, fetch it again"
    )


def _open_file(path: Path) -> Any:
    """Open a safetensors file, or map a .bin file: {name: tensor}."""
    try:
        check_regular(path, limit=None)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{one_line(error)}: fetch it again") from None
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        try:
            return safe_open(path, "pt")
        except _safetensors_error() as error:
            raise _unreadable(path, error) from None
    try:
        # torch before 1.6 wrote no zip file; only a zip file can be mapped.
        content = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except Exception as error:
        raise _unreadable(path, error) from None
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path}: holds more than named tensors; it is no model's pytorch_model.bin")
    return content

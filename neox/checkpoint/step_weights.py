"""Reader of the tensors of a run's checkpoint, checked against their digests.

torch.distributed.checkpoint's .metadata is a pickle, so it is read here with an unpickler that admits the handful of
classes that describe tensors and nothing else: loading executes nothing from a checkpoint.
"""

import io
import pickle
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from neox.checkpoint import checksums
from neox.checkpoint.checksums import Checksums, DamagedCheckpoint
from neox.checkpoint.steps import (
    ALONE,
    FAILURES,
    all_ranks_or_raise,
    find_cause,
    is_step,
    latest_valid,
    named_state,
    read_step,
    reraise_interrupt,
    step_tokenizer,
    unreadable,
)
from neox.checkpoint.weight_source import CheckpointError, WeightSource
from neox.config import ModelConfig
from neox.model.decoder import GPTNeoX
from neox.system.processes import Processes

if TYPE_CHECKING:
    from neox.tokenizer import Tokenizer


class _TensorsOnly(pickle.Unpickler):
    """Unpickler of a DCP .metadata: classes that describe tensors, and no others."""

    _ADMITTED = (
        ("torch.distributed.checkpoint.metadata", None),
        ("torch", "Size"),
        ("torch", "device"),
        ("torch.serialization", "_get_layout"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
        ("pathlib", "PosixPath"),
        ("pathlib._local", "PosixPath"),
        ("collections", "OrderedDict"),
        ("collections", "defaultdict"),
    )

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        plain = "." not in name and not name.startswith("__")
        if plain and (dtype or (module, None) in self._ADMITTED or (module, name) in self._ADMITTED):
            value = super().find_class(module, name)
            if dtype or module != "torch.distributed.checkpoint.metadata" or value.__module__ == module:
                return value
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a checkpoint's description")


class StepWeights(WeightSource):
    """The weights of one step of a run."""

    shares_memory = False
    dtype = torch.float32  # of every run

    def __init__(self, folder: Path) -> None:
        config, _ = read_step(folder)
        super().__init__(folder / "config.toml", config.model)
        self.folder = folder
        self._reader = matching_reader(folder, config.model, {}, with_optimizers=False)

    @classmethod
    def matches(cls, folder: Path) -> bool:
        return is_step(folder)

    def read(self, name: str, shape: Sequence[int] | None = None, offsets: Sequence[int] | None = None) -> Tensor:
        whole = self.shapes[name]
        return self._reader.read_slice(f"model.{name}", shape or whole, offsets or [0] * len(whole))

    def tokenizer(self) -> "Tokenizer | None":
        return step_tokenizer(self.folder)


class SafeReader(dcp.FileSystemReader):
    """Reader of the tensors of a checkpoint. Raises DamagedCheckpoint where bytes have changed."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder, self.checksums = folder, Checksums(folder)
        self.names: dict[tuple[str, int], str] = {}  # of the pieces, by file and offset
        self._metadata: Metadata | None = None

    def entries(self) -> dict[str, TensorStorageMetadata]:
        """Map names to stored tensors; anything else is refused, as it would be unpickled freely."""
        stored = {}
        for key, entry in self.read_metadata().state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                raise CheckpointError(f"{self.path}: entry {key} is no tensor; neox did not write this checkpoint")
            # A part that no chunk covers would be left as the memory was.
            if sum(chunk.sizes.numel() for chunk in entry.chunks) != entry.size.numel():
                raise DamagedCheckpoint(self.folder, f"tensor {key} is not whole")
            stored[key] = entry
        return stored

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata:
            return self._metadata
        path = self.folder / ".metadata"
        try:
            content = path.read_bytes()
            if checksums.digest(content) != self.checksums.files[path.name]:
                raise ValueError("its bytes are not those that were written")
            metadata = _TensorsOnly(io.BytesIO(content)).load()
            if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, dict):
                raise TypeError("it holds no table of tensors")
            self.names = {
                (info.relative_path, info.offset): index.fqn for index, info in (metadata.storage_data or {}).items()
            }
        except Exception as error:
            raise DamagedCheckpoint(path, unreadable(error)) from None
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        self._metadata = metadata
        return metadata

    def _slice_file(self, file: IO[bytes], sinfo: Any) -> IO[bytes]:
        file.seek(sinfo.offset)
        content = file.read(sinfo.length)
        piece = (sinfo.relative_path, sinfo.offset)
        self.checksums.check_piece(*piece, content, self.names[piece])
        return io.BytesIO(content)

    def read(self, tensors: dict[str, Tensor], processes: Processes = ALONE) -> None:
        """Fill the tensors by their names. All processes call this together."""
        with self._explained(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(tensors, storage_reader=self, no_dist=processes.world == 1)

    def read_slice(self, name: str, shape: Sequence[int], offsets: Sequence[int]) -> Tensor:
        """Read the slice of `shape` at `offsets` of one tensor, without other processes."""
        out = torch.empty(*shape)
        with self._explained():
            metadata = self.read_metadata()
            self.set_up_storage_reader(metadata, True)
            entry = metadata.state_dict_metadata[name]
            assert isinstance(entry, TensorStorageMetadata)
            wanted = ChunkStorageMetadata(torch.Size(offsets), torch.Size(shape))
            self.read_data(LoadPlan(create_read_items_for_chunk_list(name, entry, [wanted])), _IntoTensor(out))
        return out

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except FAILURES as error:
            reraise_interrupt(error)
            if damaged := find_cause(error, DamagedCheckpoint):
                raise damaged from None
            if find_cause(error, MemoryError, torch.OutOfMemoryError):
                raise
            if not find_cause(error, OSError):
                raise CheckpointError(f"{self.folder}: {unreadable(error)}") from None
            raise DamagedCheckpoint(self.folder, unreadable(find_cause(error, OSError) or error)) from None


class _IntoTensor(DefaultLoadPlanner):
    """Load planner that puts all that is read into one tensor."""

    def __init__(self, out: Tensor) -> None:
        super().__init__()
        self.out = out

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        return narrow_tensor_by_index(self.out, read_item.dest_offsets, read_item.lengths)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass


def load_tensors(
    folder: Path,
    parts: Sequence[GPTNeoX],
    optimizers: Iterable[torch.optim.Optimizer] = (),
    processes: Processes = ALONE,
) -> None:
    """Fill the parts of a model, and the optimizers' state, from a complete checkpoint.

    Names and shapes must agree. The layout of the processes that wrote it does not matter; all of those that read it
    call this together. Optimizers hold the state to be filled already, as those of `build_optimizers` do.

    Raises CheckpointError naming the tensor that is missing, left over or misshapen, DamagedCheckpoint (on all
    processes) naming the file that has changed.
    """
    optimizers = list(optimizers)
    tensors = named_state(parts, optimizers)
    reader = all_ranks_or_raise(lambda: matching_reader(folder, parts[0].config, tensors, bool(optimizers)), processes)
    reader.read(tensors, processes)


def load_latest(
    run: Path, parts: Sequence[GPTNeoX], optimizers: Sequence[torch.optim.Optimizer], processes: Processes
) -> tuple[Path, dict[str, Any]]:
    """Fill model and optimizers from the run's latest valid checkpoint; return (folder, state)."""

    def use(folder: Path) -> tuple[Path, dict[str, Any]]:
        _, state = all_ranks_or_raise(lambda: read_step(folder), processes)
        load_tensors(folder, parts, optimizers, processes)
        return folder, state

    return latest_valid(run, use, processes)


def matching_reader(
    folder: Path, config: ModelConfig, tensors: Mapping[str, Tensor], with_optimizers: bool
) -> SafeReader:
    """Open a complete checkpoint whose tensors are those of `config` and `tensors`.

    Raises CheckpointError where one is missing, of another shape, or left over.
    """
    reader = SafeReader(folder)
    stored = reader.entries()
    hint = "the run's own model and optim settings fit it"
    # All of the model, also what other processes hold: all of them then find the same fault.
    with torch.device("meta"):
        whole = dict(GPTNeoX(config).named_parameters())
    shapes = {f"model.{name}": parameter.shape for name, parameter in whole.items()}
    for key, shape in (shapes | {key: value.shape for key, value in tensors.items()}).items():
        if key not in stored:
            raise CheckpointError(f"{folder}: tensor {key} is missing; {hint}")
        if stored[key].size != shape:
            raise CheckpointError(
                f"{folder}: tensor {key} has shape {list(stored[key].size)}, this config expects {list(shape)}; {hint}"
            )
    elsewhere = whole.keys() - {key.removeprefix("model.") for key in tensors if key.startswith("model.")}
    extra = sorted(
        key
        for key in stored.keys() - tensors.keys() - shapes.keys()
        if not key.startswith("optim.")
        or (with_optimizers and key.removeprefix("optim.").rpartition(".")[0] not in elsewhere)
    )
    if extra:
        raise CheckpointError(f"{folder}: tensor {extra[0]} is not part of what this config describes; {hint}")
    return reader

"""A run's own checkpoints: one fresh folder a step, independent of the layout that wrote it, resumable bit for bit.

    RUN_DIR/step_00001000/
        __0_0.distcp ...   tensors under their full logical names: model.NAME, optim.NAME.STATE
        config.toml        the resolved config, accepted back verbatim
        state.json         format version, step, samples consumed
        .metadata          written last: the folder is complete exactly when this file exists

Tensors are written by torch.distributed.checkpoint. Its .metadata is a pickle, so it is read here with an unpickler
that admits the handful of classes that describe tensors and nothing else: loading executes nothing from a checkpoint.
"""

import json
import pickle
import re
import shutil
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from neox.checkpoint.huggingface import CheckpointError, read_json
from neox.config import Config, load_config
from neox.files import sync_folder, write_synced
from neox.model import GPTNeoX

FORMAT_VERSION = 1
FAILURES = (Exception, dcp.CheckpointException)  # torch derives the latter from BaseException
_STEP = re.compile(r"step_(\d{8})$")


def step_folder(run: Path, step: int) -> Path:
    return run / f"step_{step:08d}"


def complete_steps(run: Path) -> list[Path]:
    """Folders of complete checkpoints, oldest first."""
    if not run.is_dir():
        return []
    return sorted(p for p in run.iterdir() if _STEP.match(p.name) and (p / ".metadata").is_file())


def _named_state(model: GPTNeoX, optimizers: Iterable[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Every tensor of a run under its full logical name."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    tensors: dict[str, Tensor] = {f"model.{name}": parameter.detach() for parameter, name in names.items()}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                assert isinstance(value, Tensor), f"optimizer state {key} is no tensor"
                tensors[f"optim.{names[parameter]}.{key}"] = value
    return tensors


def save_step(
    run: Path, model: GPTNeoX, optimizers: Iterable[torch.optim.Optimizer], config: Config, state: dict[str, Any]
) -> Path:
    """Write the checkpoint of `state["step"]` and return its folder; it counts only once it is whole.

    Raises OSError (a full disk) with nothing of it left behind.
    """
    folder = step_folder(run, state["step"])
    if (folder / ".metadata").is_file():
        return folder
    # What a killed writer left is never reused: an old .metadata over new data would read as complete.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        written = json.dumps({"format_version": FORMAT_VERSION, **state}, indent=2) + "\n"
        for name, content in (("config.toml", config.to_toml()), ("state.json", written)):
            write_synced(folder / name, _writer(content.encode()))
        sync_folder(folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that one process saves without a process group is intended
            dcp.save(
                _named_state(model, optimizers),
                storage_writer=dcp.FileSystemWriter(folder, sync_files=True, overwrite=True),
                no_dist=True,
            )
        sync_folder(folder)
        sync_folder(run)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, Exception) and (cause := _disk_error(error)):
            raise OSError(
                cause.errno,
                f"{cause.strerror or cause}: nothing was kept of this checkpoint; free space, then resume",
                str(folder),
            ) from None
        raise
    return folder


def _writer(content: bytes) -> Callable[[IO[bytes]], None]:
    def write(file: IO[bytes]) -> None:
        file.write(content)

    return write


def _disk_error(error: BaseException) -> OSError | None:
    """The OSError inside what torch.distributed.checkpoint raises around it."""
    seen: list[BaseException] = [error]
    for found in seen:
        if isinstance(found, OSError):
            return found
        inner = getattr(found, "failures", {})
        seen += [e[0] if isinstance(e, tuple) else e for e in inner.values()]
        seen += [e for e in (found.__cause__, found.__context__) if e is not None and e not in seen]
    return None


def read_step(folder: Path) -> tuple[Config, dict[str, Any]]:
    """The config and state of a complete checkpoint; CheckpointError where a newer format wrote it."""
    if not (folder / ".metadata").is_file():
        raise CheckpointError(f"{folder}: is not a complete checkpoint (no .metadata): use the step before it")
    state = read_json(folder / "state.json")
    version = state.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{folder}: format version {version}, this neox reads {FORMAT_VERSION}: upgrade neox")
    return load_config(files=[folder / "config.toml"]), state


class _TensorsOnly(pickle.Unpickler):
    """Reads a DCP .metadata; any class beyond those that describe tensors is refused."""

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
            found = super().find_class(module, name)
            if dtype or module != "torch.distributed.checkpoint.metadata" or found.__module__ == module:
                return found
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a checkpoint's description")


class _SafeReader(dcp.FileSystemReader):
    def entries(self) -> dict[str, TensorStorageMetadata]:
        """What is stored under which name; anything but a tensor is refused, as it would be unpickled freely."""
        stored = {}
        for key, entry in self.read_metadata().state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                raise CheckpointError(f"{self.path}: entry {key} is no tensor; neox did not write this checkpoint")
            stored[key] = entry
        return stored

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        try:
            with open(path, "rb") as file:
                metadata: Metadata = _TensorsOnly(file).load()
        except Exception as error:
            raise CheckpointError(f"{path}: cannot be read ({error}); use the step before it") from None
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def load_tensors(folder: Path, model: GPTNeoX, optimizers: Iterable[torch.optim.Optimizer] = ()) -> None:
    """Fill the model, and the state of the optimizers, from a complete checkpoint; all names and shapes must agree.

    Raises CheckpointError naming the tensor that is missing, left over or misshapen, or the file that is cut.
    """
    optimizers = list(optimizers)
    reader = _SafeReader(folder)
    stored = reader.entries()
    names = dict(model.named_parameters())
    owner = {p: o for o in optimizers for group in o.param_groups for p in group["params"]}
    wanted: dict[str, Tensor] = {f"model.{name}": parameter.detach() for name, parameter in names.items()}
    for key, entry in stored.items():
        if not key.startswith("optim.") or not optimizers:
            continue
        name, _, kind = key.removeprefix("optim.").rpartition(".")
        if name not in names:
            raise CheckpointError(f"{folder}: {key} belongs to no parameter of this model")
        like = names[name]
        state = owner[like].state[like]
        # State of the parameter's shape lives where the parameter lives; step counters are scalars on the CPU.
        value = torch.empty_like(like) if entry.size == like.shape else torch.empty(entry.size)
        state[kind] = value.to(entry.properties.dtype)
        wanted[key] = state[kind]
    for key, value in wanted.items():
        if key not in stored:
            raise CheckpointError(f"{folder}: tensor {key} is missing")
        if stored[key].size != value.shape:
            raise CheckpointError(
                f"{folder}: tensor {key} has shape {list(stored[key].size)}, this model expects {list(value.shape)}"
            )
    extra = sorted(k for k in stored if k not in wanted and (optimizers or not k.startswith("optim.")))
    if extra:
        raise CheckpointError(f"{folder}: tensor {extra[0]} is not part of this model")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(wanted, storage_reader=reader, no_dist=True)
    except FAILURES as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise CheckpointError(f"{folder}: cannot be read ({reason}); it is damaged, use the step before it") from None


def load_native(folder: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> GPTNeoX:
    """The model of a complete checkpoint, in evaluation mode."""
    config, _ = read_step(folder)
    with torch.device("meta"):
        model = GPTNeoX(config.model)
    model.to_empty(device=device)
    model.tie()
    load_tensors(folder, model)
    return model.to(dtype).eval()

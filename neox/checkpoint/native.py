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
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from neox.checkpoint.huggingface import CheckpointError, read_json
from neox.config import Config, load_config, without_code
from neox.files import sync_folder, write_synced
from neox.model import GPTNeoX
from neox.runtime import Processes

FORMAT_VERSION = 2
DAMAGED = "it is damaged: remove the folder, and the run resumes at the step before it"
ALONE = Processes()
FAILURES = (Exception, dcp.CheckpointException)  # torch derives the latter from BaseException
Kind = TypeVar("Kind", bound=BaseException)
UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    # Before there was a loss scaler every step was an update, and the order of the data was not noted.
    1: lambda state: {**state, "updates": state["step"], "loss_scaler": {}, "order": ""},
}
"""From the state.json of a format version to that of the next one."""
_STEP = re.compile(r"step_(\d{8})$")


def step_folder(run: Path, step: int) -> Path:
    return run / f"step_{step:08d}"


def complete_steps(run: Path) -> list[Path]:
    """Folders of complete checkpoints, oldest first."""
    if not run.is_dir():
        return []
    return sorted(p for p in run.iterdir() if _STEP.match(p.name) and (p / ".metadata").is_file())


def _named_state(parts: Iterable[GPTNeoX], optimizers: Iterable[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Every tensor of a run that is here, under its full logical name."""
    names: dict[Tensor, str] = {parameter: name for part in parts for name, parameter in part.named_parameters()}
    tensors: dict[str, Tensor] = {f"model.{name}": parameter.detach() for parameter, name in names.items()}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                assert isinstance(value, Tensor), f"optimizer state {key} is no tensor"
                tensors[f"optim.{names[parameter]}.{key}"] = value
    return tensors


def save_step(
    run: Path,
    parts: Iterable[GPTNeoX],
    optimizers: Iterable[torch.optim.Optimizer],
    config: Config,
    state: dict[str, Any],
    processes: Processes = ALONE,
) -> Path:
    """Write the checkpoint of `state["step"]` and return its folder; it counts only once it is whole.

    All processes of the run call it together, each with the parts of the model that it holds and writes. Raises OSError
    (a full disk) with nothing of it left behind.
    """
    folder = step_folder(run, state["step"])
    if (folder / ".metadata").is_file():
        return folder
    try:
        with processes.first_alone():
            if not processes.rank:
                _begin(folder, config, state)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that one process saves without a process group is intended
            dcp.save(
                _named_state(parts, optimizers),
                storage_writer=dcp.FileSystemWriter(folder, sync_files=True, overwrite=True),
                no_dist=processes.world == 1,
            )
        sync_folder(folder)
        sync_folder(run)
    except BaseException as error:
        with suppress(OSError):
            (folder / ".metadata").unlink()  # first: what is half removed must not read as complete
        shutil.rmtree(folder, ignore_errors=True)
        _pass_interrupt_on(error)
        if isinstance(error, FAILURES) and (cause := _inside(error, OSError)):
            reason = os.strerror(cause.errno) if cause.errno else cause
            raise OSError(
                cause.errno,
                f"{reason}: nothing was kept of this checkpoint; free space, then resume the run",
                str(folder),
            ) from None
        raise
    return folder


def _begin(folder: Path, config: Config, state: dict[str, Any]) -> None:
    """A fresh folder with all but the tensors."""
    # What a killed writer left is never reused: an old .metadata over new data would read as complete.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    written = json.dumps({"format_version": FORMAT_VERSION, **state}, indent=2) + "\n"
    for name, content in (("config.toml", config.to_toml()), ("state.json", written)):
        write_synced(folder / name, _writer(content.encode()))
    sync_folder(folder)


def _writer(content: bytes) -> Callable[[IO[bytes]], None]:
    def write(file: IO[bytes]) -> None:
        file.write(content)

    return write


def _inside(error: BaseException, kind: type[Kind]) -> Kind | None:
    """The error of that kind inside what torch.distributed.checkpoint raises around it."""
    seen: list[BaseException] = [error]
    for found in seen:
        if isinstance(found, kind):
            return found
        inner = getattr(found, "failures", {})
        seen += [e[0] if isinstance(e, tuple) else e for e in inner.values()]
        seen += [e for e in (found.__cause__, found.__context__) if e is not None and e not in seen]
    return None


def _pass_interrupt_on(error: BaseException) -> None:
    """torch.distributed.checkpoint wraps a Ctrl-C as it does a failure: it is none, and nothing is damaged."""
    if isinstance(error, dcp.CheckpointException) and _inside(error, KeyboardInterrupt):
        raise KeyboardInterrupt from None


def read_step(folder: Path) -> tuple[Config, dict[str, Any]]:
    """The config and state of a complete checkpoint; CheckpointError where a newer format wrote it."""
    if not (folder / ".metadata").is_file():
        raise CheckpointError(f"{folder}: is not a complete checkpoint (no .metadata): use the step before it")
    state = read_json(folder / "state.json")
    version = state.get("format_version")
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise CheckpointError(
            f"{folder}: format version {version}, this neox reads 1 to {FORMAT_VERSION}: upgrade neox"
        )
    if not all(isinstance(state.get(key), int) for key in ("step", "samples")):
        raise CheckpointError(f"{folder / 'state.json'}: step or samples is no number; {DAMAGED}")
    for old in range(version, FORMAT_VERSION):
        state = UPGRADES[old](state)
    if not isinstance(state.get("updates"), int) or not isinstance(state.get("loss_scaler"), dict):
        raise CheckpointError(f"{folder / 'state.json'}: updates or loss_scaler is missing; {DAMAGED}")
    return without_code(load_config(files=[folder / "config.toml"])), state


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
            # A part that no chunk covers would be left as the memory was.
            if sum(chunk.sizes.numel() for chunk in entry.chunks) != entry.size.numel():
                raise CheckpointError(f"{self.path}: tensor {key} is not whole; {DAMAGED}")
            stored[key] = entry
        return stored

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        try:
            with open(path, "rb") as file:
                metadata = _TensorsOnly(file).load()
            if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, dict):
                raise TypeError("it holds no table of tensors")
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise CheckpointError(f"{path}: cannot be read ({reason}); {DAMAGED}") from None
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def load_tensors(
    folder: Path,
    parts: Sequence[GPTNeoX],
    optimizers: Iterable[torch.optim.Optimizer] = (),
    processes: Processes = ALONE,
) -> None:
    """Fill the parts of a model, and the optimizers' state, from a complete checkpoint; names and shapes must agree.

    The layout of the processes that wrote it does not matter; all of those that read it call this together.

    Raises CheckpointError naming the tensor that is missing, left over or misshapen, or the file that is cut.
    """
    optimizers = list(optimizers)
    fill_state(optimizers)
    reader = _SafeReader(folder)
    stored = reader.entries()
    wanted = _named_state(parts, optimizers)
    hint = "the run's own model and optim settings fit it"
    # All of the model, also what other processes hold: what is wrong is then found by all of them alike.
    with torch.device("meta"):
        whole = dict(GPTNeoX(parts[0].config).named_parameters())
    shapes = {f"model.{name}": parameter.shape for name, parameter in whole.items()}
    for key, shape in (shapes | {key: value.shape for key, value in wanted.items()}).items():
        if key not in stored:
            raise CheckpointError(f"{folder}: tensor {key} is missing; {hint}")
        if stored[key].size != shape:
            raise CheckpointError(
                f"{folder}: tensor {key} has shape {list(stored[key].size)}, this config expects {list(shape)}; {hint}"
            )
    elsewhere = whole.keys() - {key.removeprefix("model.") for key in wanted if key.startswith("model.")}
    extra = sorted(
        key
        for key in stored.keys() - wanted.keys() - shapes.keys()
        if not key.startswith("optim.")
        or (optimizers and key.removeprefix("optim.").rpartition(".")[0] not in elsewhere)
    )
    if extra:
        raise CheckpointError(f"{folder}: tensor {extra[0]} is not part of what this config describes; {hint}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(wanted, storage_reader=reader, no_dist=processes.world == 1)
    except FAILURES as error:
        _pass_interrupt_on(error)
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise CheckpointError(f"{folder}: cannot be read ({reason}); {DAMAGED}") from None


def fill_state(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Give every parameter that has none the state that its optimizer begins its first update with: zeros.

    A checkpoint then holds the same tensors at every step, the first and a skipped one too.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter not in optimizer.state:
                    optimizer.state[parameter] = _zero_state(optimizer, group, parameter)


def _zero_state(optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: Tensor) -> dict[str, Tensor]:
    if isinstance(optimizer, torch.optim.Muon):
        return {"momentum_buffer": torch.zeros_like(parameter)}
    assert isinstance(optimizer, torch.optim.AdamW), f"state of {type(optimizer).__name__} is unknown"
    # torch's fused kernel wants the step counter beside the parameter, the others on the CPU.
    step = torch.zeros((), device=parameter.device if group["fused"] else "cpu")
    return {"step": step, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}


def load_native(folder: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> GPTNeoX:
    """The model of a complete checkpoint, in evaluation mode."""
    config, _ = read_step(folder)
    with torch.device("meta"):
        model = GPTNeoX(config.model)
    model.to_empty(device=device)
    model.tie()
    load_tensors(folder, [model])
    return model.to(dtype).eval()

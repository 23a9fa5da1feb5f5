"""A run's own checkpoints: one fresh folder a step, independent of the layout that wrote it, resumable bit for bit.

    RUN_DIR/step_00001000/
        __0_0.distcp ...   tensors under their full logical names: model.NAME, optim.NAME.STATE
        config.toml        the resolved config, accepted back verbatim
        state.json         format version, step, samples consumed
        checksums.json     digests of all of these, and of .metadata
        .metadata          written last: the folder is complete exactly when this file exists

Tensors are written by torch.distributed.checkpoint (writer.py). Its .metadata is a pickle, so it is read here with an
unpickler that admits the handful of classes that describe tensors and nothing else: loading executes nothing from a
checkpoint.
"""

import io
import pickle
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from neox.checkpoint import checksums
from neox.checkpoint.checksums import Checksums, DamagedCheckpoint
from neox.checkpoint.huggingface import CheckpointError, Transform, read_json, transform_layer
from neox.config import Config, ModelConfig, load_config
from neox.model.decoder import GPTNeoX
from neox.system.runtime import OtherProcessFailed, Processes
from neox.tokenizer import Tokenizer

FORMAT_VERSION = 4
TOKENIZER = "tokenizer.json"
ALONE = Processes()
FAILURES = (Exception, dcp.CheckpointException)  # torch derives the latter from BaseException
Kind = TypeVar("Kind", bound=BaseException)
Found = TypeVar("Found")
UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    # Before there was a loss scaler every step was an update, and the order of the data was not noted.
    1: lambda state: {**state, "updates": state["step"], "loss_scaler": {}, "order": ""},
    # Before there were checksums.
    2: lambda state: state,
    # Before updates were left out and data was stepped over.
    3: lambda state: {**state, "stepped_over": [], "guard": {}, "seconds": {}},
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


def is_step(folder: Path) -> bool:
    """Whether a folder is that of one checkpoint, not of a run."""
    return (folder / ".metadata").exists() or folder.name.startswith("step_")


def step_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer beside a checkpoint or that of its run, None where there is none."""
    stored = next((p for p in (folder / TOKENIZER, folder.parent / TOKENIZER) if p.exists()), None)
    return Tokenizer.from_file(stored) if stored else None


def step_number(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def named_state(parts: Iterable[GPTNeoX], optimizers: Iterable[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Every tensor of a run that is here, under its full logical name."""
    names: dict[Tensor, str] = {parameter: name for part in parts for name, parameter in part.named_parameters()}
    tensors: dict[str, Tensor] = {f"model.{name}": parameter.detach() for parameter, name in names.items()}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                assert isinstance(value, Tensor), f"optimizer state {key} is no tensor"
                tensors[f"optim.{names[parameter]}.{key}"] = value
    return tensors


def inside(error: BaseException, *kinds: type[Kind]) -> Kind | None:
    """The error of such a kind inside what torch.distributed.checkpoint raises around it."""
    seen: list[BaseException] = [error]
    for found in seen:
        if isinstance(found, kinds):
            return found
        inner = getattr(found, "failures", {})
        seen += [e[0] if isinstance(e, tuple) else e for e in inner.values()]
        seen += [e for e in (found.__cause__, found.__context__) if e is not None and e not in seen]
    return None


def pass_interrupt_on(error: BaseException) -> None:
    """torch.distributed.checkpoint wraps a Ctrl-C as it does a failure: it is none, and nothing is damaged."""
    if isinstance(error, dcp.CheckpointException) and inside(error, KeyboardInterrupt):
        raise KeyboardInterrupt from None


def read_step(folder: Path) -> tuple[Config, dict[str, Any]]:
    """The config and state of a complete checkpoint.

    Raises CheckpointError where a newer format wrote it, DamagedCheckpoint (one of them) where its bytes have changed;
    of the files with tensors only the sizes are looked at.
    """
    if not (folder / ".metadata").is_file():
        raise CheckpointError(f"{folder}: is not a complete checkpoint (no .metadata): use the step before it")
    sums = _checksums(folder)
    if sums:
        sums.check()
    try:
        state = read_json(folder / "state.json")
    except (CheckpointError, OSError) as error:
        raise DamagedCheckpoint(folder / "state.json", _reason(error)) from None
    version = state.get("format_version")
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise CheckpointError(
            f"{folder}: format version {version}, this neox reads 1 to {FORMAT_VERSION}: upgrade neox"
        )
    if version >= 3 and not sums:
        raise DamagedCheckpoint(folder / checksums.NAME, "is missing")
    if not all(isinstance(state.get(key), int) for key in ("step", "samples")):
        raise DamagedCheckpoint(folder / "state.json", "step or samples is no number")
    for old in range(version, FORMAT_VERSION):
        state = UPGRADES[old](state)
    return load_config(files=[folder / "config.toml"]), state


def _checksums(folder: Path) -> Checksums | None:
    """None where an older format wrote the checkpoint."""
    return Checksums(folder) if (folder / checksums.NAME).exists() else None


def _reason(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return f"cannot be read ({text.splitlines()[-1]})"


def is_sound(folder: Path) -> bool:
    """Whether every byte of a complete checkpoint is as it was written, as far as its format can tell."""
    try:
        read_step(folder)
        if sums := _checksums(folder):
            sums.check_all()
    except DamagedCheckpoint:
        return False
    return True


def newest_sound(run: Path, use: Callable[[Path], Found], processes: Processes = ALONE) -> Found:
    """use(folder) of the newest complete checkpoint for which it does not raise DamagedCheckpoint.

    Each one passed over is named by a line on stderr. All processes call it together, and `use` raises
    DamagedCheckpoint on all of them or on none. Raises CheckpointError where there is no checkpoint, or none is sound.
    """
    steps = complete_steps(run)
    first: DamagedCheckpoint | None = None
    for folder in reversed(steps):
        try:
            return use(folder)
        except DamagedCheckpoint as error:
            first = first or error
            if folder != steps[0] and not processes.rank:
                print(f"neox: warning: {error.brief}: damaged, using the checkpoint before it", file=sys.stderr)
    if not first:
        raise CheckpointError(f"{run}: neither a Hugging Face folder (config.json) nor a run with a complete step")
    if processes.rank:
        raise OtherProcessFailed("no checkpoint can be used")  # rank 0 says so
    raise CheckpointError(
        f"{run}: no checkpoint can be used, {len(steps)} damaged, the newest: {first.brief}; restore one from a copy, "
        "or begin the run anew"
    )


def set_aside_after(run: Path, used: Path) -> None:
    """Let the damaged checkpoints newer than `used` no longer count as complete; the run writes these steps again."""
    for folder in complete_steps(run):
        if step_number(folder) > step_number(used):
            (folder / ".metadata").rename(folder / ".metadata.damaged")


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


class SafeReader(dcp.FileSystemReader):
    """Reads the tensors of a checkpoint; what differs from what was written raises DamagedCheckpoint."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder, self.sums = folder, _checksums(folder)
        self.names: dict[tuple[str, int], str] = {}  # of the pieces, by file and offset
        self._metadata: Metadata | None = None

    def entries(self) -> dict[str, TensorStorageMetadata]:
        """What is stored under which name; anything but a tensor is refused, as it would be unpickled freely."""
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
            if self.sums and checksums.digest(content) != self.sums.files[path.name]:
                raise ValueError("its bytes are not those that were written")
            metadata = _TensorsOnly(io.BytesIO(content)).load()
            if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, dict):
                raise TypeError("it holds no table of tensors")
            self.names = {
                (info.relative_path, info.offset): index.fqn for index, info in (metadata.storage_data or {}).items()
            }
        except Exception as error:
            raise DamagedCheckpoint(path, _reason(error)) from None
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        self._metadata = metadata
        return metadata

    def _slice_file(self, file: IO[bytes], sinfo: Any) -> IO[bytes]:
        if not self.sums:
            return super()._slice_file(file, sinfo)
        file.seek(sinfo.offset)
        content = file.read(sinfo.length)
        place = (sinfo.relative_path, sinfo.offset)
        self.sums.check_piece(*place, content, self.names[place])
        return io.BytesIO(content)

    def read(self, tensors: dict[str, Tensor], processes: Processes = ALONE) -> None:
        """Fill the tensors from what is stored under their names. All processes call it together."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                dcp.load(tensors, storage_reader=self, no_dist=processes.world == 1)
        except FAILURES as error:
            pass_interrupt_on(error)
            if damaged := inside(error, DamagedCheckpoint):
                raise damaged from None
            if inside(error, MemoryError, torch.OutOfMemoryError):
                raise
            if self.sums and not inside(error, OSError):
                raise CheckpointError(f"{self.folder}: {_reason(error)}") from None
            raise DamagedCheckpoint(self.folder, _reason(inside(error, OSError) or error)) from None


def load_tensors(
    folder: Path,
    parts: Sequence[GPTNeoX],
    optimizers: Iterable[torch.optim.Optimizer] = (),
    processes: Processes = ALONE,
) -> None:
    """Fill the parts of a model, and the optimizers' state, from a complete checkpoint; names and shapes must agree.

    The layout of the processes that wrote it does not matter; all of those that read it call this together.

    Raises CheckpointError naming the tensor that is missing, left over or misshapen, DamagedCheckpoint (on all
    processes) naming the file that has changed.
    """
    optimizers = list(optimizers)
    fill_state(optimizers)
    wanted = named_state(parts, optimizers)
    reader = agreed(lambda: fitting_reader(folder, parts[0].config, wanted, bool(optimizers)), processes)
    reader.read(wanted, processes)


def fitting_reader(
    folder: Path, config: ModelConfig, wanted: Mapping[str, Tensor], with_optimizers: bool
) -> SafeReader:
    """A reader of a complete checkpoint that holds the model of `config`, the `wanted` tensors, and no others."""
    reader = SafeReader(folder)
    stored = reader.entries()
    hint = "the run's own model and optim settings fit it"
    # All of the model, also what other processes hold: what is wrong is then found by all of them alike.
    with torch.device("meta"):
        whole = dict(GPTNeoX(config).named_parameters())
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
        or (with_optimizers and key.removeprefix("optim.").rpartition(".")[0] not in elsewhere)
    )
    if extra:
        raise CheckpointError(f"{folder}: tensor {extra[0]} is not part of what this config describes; {hint}")
    return reader


def agreed(call: Callable[[], Found], processes: Processes) -> Found:
    """call() on each process. Where one raises DamagedCheckpoint all do; where another error, they do not go on."""
    if processes.world == 1:
        return call()
    import torch.distributed as dist

    found, error = None, None
    try:
        found = call()
    except Exception as raised:
        error = raised
    damaged = isinstance(error, DamagedCheckpoint)
    errors: list[Any] = [None] * processes.world
    dist.all_gather_object(errors, error if damaged else error is not None)
    if True in errors:
        if error and not damaged and errors.index(True) == processes.rank:
            raise error
        raise OtherProcessFailed(f"rank {errors.index(True)} failed")
    if first := next((e for e in errors if e), None):
        raise first
    assert found is not None
    return found


def load_newest(
    run: Path, parts: Sequence[GPTNeoX], optimizers: Sequence[torch.optim.Optimizer], processes: Processes
) -> tuple[Path, dict[str, Any]]:
    """Fill model and optimizers from the run's newest complete checkpoint that is sound; its folder and its state."""

    def use(folder: Path) -> tuple[Path, dict[str, Any]]:
        _, state = agreed(lambda: read_step(folder), processes)
        load_tensors(folder, parts, optimizers, processes)
        return folder, state

    return newest_sound(run, use, processes)


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


def load_native(
    folder: Path, device: torch.device, dtype: torch.dtype = torch.float32, transform: Transform | None = None
) -> GPTNeoX:
    """The model of a complete checkpoint, in evaluation mode; `transform` as for `load_huggingface`."""
    config, _ = read_step(folder)
    with torch.device("meta"):
        model = GPTNeoX(config.model)
    stored = {f"model.{name}": parameter for name, parameter in model.named_parameters()}
    reader = fitting_reader(folder, config.model, stored, with_optimizers=False)
    names = [name for name, module in model.named_modules() if module._parameters] if transform else [""]
    for name in names:
        module = model.get_submodule(name)
        module.to_empty(device=device)
        model.tie()
        prefix = f"model.{name}." if name else "model."
        values = {prefix + leaf: parameter.detach() for leaf, parameter in module.named_parameters()}
        if "model.embed_out.weight" not in stored and "model.embed_out.weight" in values:  # tied
            values["model.embed_in.weight"] = values.pop("model.embed_out.weight")
        reader.read(values)
        module.to(dtype)
        if transform:
            transform_layer(model, name, transform)
    return model.eval()

"""Checkpoints of a run: their layout on disk, their schedule, and which are kept.

One fresh folder a step, independent of the parallel layout that wrote it:

    RUN_DIR/step_00001000/
        __0_0.distcp ...   tensors under their full logical names: model.NAME, optim.NAME.STATE
        config.toml        the resolved config, accepted back verbatim
        state.json         format version, step, samples consumed, loss scale, ...
        checksums.json     digests of all of these, and of .metadata
        .metadata          written last: the folder is complete exactly when this file exists

torch.distributed.checkpoint writes the tensors (writer.py) and reads them (step_weights.py).
"""

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from neox.checkpoint.checksums import Checksums, DamagedCheckpoint
from neox.checkpoint.weight_source import CheckpointError, read_json
from neox.config import CheckpointConfig, Config, load_config
from neox.model.decoder import GPTNeoX
from neox.system.processes import OtherProcessFailed, Processes

if TYPE_CHECKING:
    from neox.tokenizer import Tokenizer

FORMAT_VERSION = 1
TOKENIZER = "tokenizer.json"
HAS_SAVED = ".saved"
"""Empty file in a run directory: the run has had a complete checkpoint."""
ALONE = Processes()
FAILURES = (Exception, dcp.CheckpointException)  # torch derives the latter from BaseException
Error = TypeVar("Error", bound=BaseException)
Result = TypeVar("Result")
_STEP = re.compile(r"step_(\d{8})$")


def step_folder(run: Path, step: int) -> Path:
    """Folder of the checkpoint of a step."""
    return run / f"step_{step:08d}"


def step_number(folder: Path) -> int:
    """Step of a checkpoint's folder."""
    return int(folder.name.removeprefix("step_"))


def complete_steps(run: Path) -> list[Path]:
    """Folders of complete checkpoints, oldest first."""
    if not run.is_dir():
        return []
    # Whatever .metadata is: what is no file is damaged, not absent.
    return sorted(p for p in run.iterdir() if _STEP.match(p.name) and os.path.lexists(p / ".metadata"))


def is_step(folder: Path) -> bool:
    """Tell the folder of one checkpoint from that of a run."""
    named = bool(_STEP.match(folder.resolve().name)) and not (folder / ".lock").exists()  # a run may have any name
    return (folder / ".metadata").exists() or named


FolderKind = Literal["absent", "empty", "step", "run", "huggingface", "other"]


def folder_kind(path: Path) -> FolderKind:
    """Tell what a path holds; hidden files and logs (.log, .out, .err) do not count.

    A run has a lock, or what a copy without hidden files keeps: its config and its rows, or complete checkpoints.
    """
    if not path.is_dir():
        return "other" if path.exists() else "absent"
    names = {one.name for one in path.iterdir()}
    if ".lock" in names:
        return "run"
    if ".metadata" in names or (_STEP.match(path.resolve().name) and names & {"state.json", "config.toml"}):
        return "step"
    if {"config.toml", "metrics.jsonl"} <= names or complete_steps(path):
        return "run"
    if "config.json" in names or any(name.endswith(".safetensors") for name in names):
        return "huggingface"
    counted = [name for name in names if not name.startswith(".") and not name.endswith((".log", ".out", ".err"))]
    return "other" if counted else "empty"


def step_tokenizer(folder: Path) -> "Tokenizer | None":
    """Tokenizer beside a checkpoint, or that of its run; None where there is none."""
    path = next((p for p in (folder / TOKENIZER, folder.parent / TOKENIZER) if p.exists()), None)
    if path is None:
        return None
    from neox.tokenizer import Tokenizer

    return Tokenizer.from_file(path)


def named_state(parts: Iterable[GPTNeoX], optimizers: Iterable[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Map full logical names to this process's tensors of model and optimizers."""
    names: dict[Tensor, str] = {parameter: name for part in parts for name, parameter in part.named_parameters()}
    tensors: dict[str, Tensor] = {f"model.{name}": parameter.detach() for parameter, name in names.items()}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                assert isinstance(value, Tensor), f"optimizer state {key} is no tensor"
                tensors[f"optim.{names[parameter]}.{key}"] = value
    return tensors


def find_cause(error: BaseException, *types: type[Error]) -> Error | None:
    """Find an error of the given types inside one of torch.distributed.checkpoint."""
    seen: list[BaseException] = [error]
    for each in seen:
        if isinstance(each, types):
            return each
        failures = getattr(each, "failures", {})
        seen += [e[0] if isinstance(e, tuple) else e for e in failures.values()]
        seen += [e for e in (each.__cause__, each.__context__) if e is not None and e not in seen]
    return None


def reraise_interrupt(error: BaseException) -> None:
    """Raise KeyboardInterrupt where torch.distributed.checkpoint has wrapped a Ctrl-C as a failure."""
    if isinstance(error, dcp.CheckpointException) and find_cause(error, KeyboardInterrupt):
        raise KeyboardInterrupt from None


def read_step(folder: Path) -> tuple[Config, dict[str, Any]]:
    """Read the config and state of a complete checkpoint.

    Small files are checked byte for byte, files with tensors by their sizes. Raises CheckpointError where it is
    incomplete or of another format version, and its subclass DamagedCheckpoint where its bytes have changed.
    """
    if not os.path.lexists(folder / ".metadata"):
        raise CheckpointError(f"{folder}: is not a complete checkpoint (no .metadata): use the step before it")
    Checksums(folder).check()
    try:
        state = read_json(folder / "state.json")
    except (CheckpointError, OSError) as error:
        raise DamagedCheckpoint(folder / "state.json", unreadable(error)) from None
    version = state.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{folder}: format version {version}, this neox reads {FORMAT_VERSION}: upgrade neox")
    if not all(isinstance(state.get(key), int) for key in ("step", "samples")):
        raise DamagedCheckpoint(folder / "state.json", "step or samples is no number")
    return load_config(files=[folder / "config.toml"]), state


def unreadable(error: BaseException) -> str:
    """One line that says why something cannot be read."""
    text = str(error).strip() or type(error).__name__
    return f"cannot be read ({text.splitlines()[-1]})"


def is_valid(folder: Path) -> bool:
    """Check every byte of a complete checkpoint against its digests."""
    try:
        read_step(folder)
        Checksums(folder).check_all()
    except DamagedCheckpoint:
        return False
    return True


def latest_valid(run: Path, use: Callable[[Path], Result], processes: Processes = ALONE, warn: bool = True) -> Result:
    """Return use(folder) for the latest complete checkpoint that is not damaged.

    A checkpoint for which `use` raises DamagedCheckpoint is passed over, with a line on stderr if `warn`. All processes
    call this together, and `use` raises DamagedCheckpoint on all of them or on none. Raises CheckpointError where there
    is no checkpoint, or none is valid.
    """
    steps = complete_steps(run)
    latest: DamagedCheckpoint | None = None
    for folder in reversed(steps):
        try:
            return use(folder)
        except DamagedCheckpoint as error:
            latest = latest or error
            if warn and folder != steps[0] and not processes.rank:
                print(f"neox: warning: {error.brief}: damaged, using the checkpoint before it", file=sys.stderr)
    if not latest:
        raise CheckpointError(f"{run}: neither a Hugging Face folder (config.json) nor a run with a complete step")
    if processes.rank:
        raise OtherProcessFailed("no checkpoint can be used")  # rank 0 says so
    raise CheckpointError(
        f"{run}: no checkpoint can be used, {len(steps)} damaged, the newest: {latest.brief}; restore one from a copy, "
        "or begin the run anew"
    )


def invalidate_after(run: Path, used: Path, reason: Literal["damaged", "superseded"]) -> None:
    """Make checkpoints newer than `used` incomplete; the run writes these steps again.

    Their .metadata is kept as .metadata.REASON: `superseded` by a rewind, or `damaged`.
    """
    for folder in complete_steps(run):
        if step_number(folder) > step_number(used):
            (folder / ".metadata").rename(folder / f".metadata.{reason}")


def all_ranks_or_raise(call: Callable[[], Result], processes: Processes) -> Result:
    """Return call() on each rank, or raise on all of them.

    A DamagedCheckpoint is raised on all ranks; another error on its own rank, and OtherProcessFailed on the others.
    `call` makes no collective calls.
    """
    if processes.world == 1:
        return call()
    import torch.distributed as dist

    results: list[Result] = []
    error: Exception | None = None
    try:
        results.append(call())
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
    return results[0]


def _early(config: CheckpointConfig, step: int) -> bool:
    return step <= config.early and config.early > 0 and step & (step - 1) == 0  # 0 and the powers of two


def is_due(config: CheckpointConfig, step: int) -> bool:
    """Tell that the schedule saves a step. Pythia's is early = 512, every = 1000."""
    return _early(config, step) or (config.every > 0 and step > 0 and step % config.every == 0)


def expired(config: CheckpointConfig, steps: Iterable[int]) -> list[int]:
    """Saved steps that are no longer kept: never the newest `keep_last`."""
    if not config.keep_last:
        return []
    older = sorted(steps)[: -config.keep_last]
    return [s for s in older if not (_early(config, s) or (config.keep_every and s % config.keep_every == 0))]


def prune(run: Path, config: CheckpointConfig) -> None:
    """Remove the run's expired checkpoints."""
    folders = {step_number(folder): folder for folder in complete_steps(run)}
    for step in expired(config, folders):
        # Metadata first: a folder that is half removed must not read as complete.
        (folders[step] / ".metadata").unlink()
        shutil.rmtree(folders[step], ignore_errors=True)

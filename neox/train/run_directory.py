"""A run directory: the config it resumes with, its lock, and signals that end the run with a save."""

import contextlib
import itertools
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from neox.checkpoint.steps import (
    HAS_SAVED,
    complete_steps,
    folder_kind,
    is_step,
    is_valid,
    latest_valid,
    read_step,
    step_folder,
    step_number,
)
from neox.config import Config, load_config
from neox.config.options import parse_override
from neox.system.files import read_rows, sync_folder, try_lock, write_atomic
from neox.system.processes import Processes, launched

CODE = ("include_path", "tasks")
"""Options of `eval` that name task files, whose YAML may import Python functions."""


def run_config(run: Path, overrides: Iterable[str] = (), asked: Config | None = None) -> Config:
    """Config that a resumed run continues with: its own, with the overrides on top.

    RUN/config.toml holds what the run was last started or resumed with; a copy without it has its newest checkpoint's.
    `asked` is the config of the command line's own recipes. Raises ValueError where the directory holds neither, and
    where its config names task files that would be loaded, and the command does not.
    """
    kept = run / "config.toml"
    if not os.path.lexists(kept):
        if not complete_steps(run):
            raise ValueError(f"{run}: holds no run (no config.toml): start one with `neox train ... out={run}`")

        def use(step: Path) -> Path:
            read_step(step)
            return step / "config.toml"

        kept = latest_valid(run, use)
    overrides = list(overrides)
    config = load_config(files=[kept], overrides=overrides)
    if config.eval.tasks_every:
        named = {parse_override(override)[:2] for override in overrides}
        for key in CODE:
            value = getattr(config.eval, key)
            files = [one for one in ([value] if key == "include_path" else value) if one and _is_file(one)]
            if files and ("eval", key) not in named and not (asked and getattr(asked.eval, key) == value):
                raise ValueError(
                    f"{kept}: eval.{key} names {files[0]}, and task files may run code, which a run directory may not "
                    f"ask for: name it again on the command line, eval.{key}=..., or set eval.tasks_every=0"
                )
    # The run may have been moved: it is where it was found.
    return config.model_copy(update={"log": config.log.model_copy(update={"out": str(run)})})


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) or Path(name).exists()


def step_to_resume(path: Path) -> tuple[Path, int | None]:
    """The run that `resume=PATH` names, and the step where PATH is one of its checkpoints.

    Raises ValueError where PATH is neither, or an incomplete checkpoint.
    """
    kind = folder_kind(path)
    if kind == "absent" and begun_by_this_launch(path.parent):
        return path.parent, None  # a restart, after the step that the launch began with was pruned
    if kind == "step" or (kind != "absent" and is_step(path)):
        if not (path / ".metadata").is_file():
            raise ValueError(f"{path}: is no complete checkpoint (no .metadata): resume={path.resolve().parent}")
        return path.resolve().parent, step_number(path.resolve())
    if kind in ("absent", "huggingface") or (kind == "other" and not (path / "config.toml").is_file()):
        start = f"start one with `neox train ... out={path}`"
        advice = f"train.init={path} starts one from its weights" if kind == "huggingface" else start
        raise ValueError(f"{path}: holds no run (no config.toml): {advice}")
    return path, None


def refuse_existing(run: Path) -> None:
    """Raise ValueError if a new run cannot have the directory: it holds a run, or anything else of somebody's."""
    for parent in run.absolute().parents:
        if parent.name.startswith("step_") and folder_kind(parent) == "step":
            raise ValueError(f"{run}: lies in the checkpoint {parent}: choose another out=")
    kind = folder_kind(run)
    if kind == "step":
        whole = run.resolve().parent
        raise ValueError(f"{run}: is a checkpoint of {whole}: continue with resume={run}, or choose another out=")
    if run.exists() and not run.is_dir():
        raise ValueError(f"{run}: is a file, no run directory: choose another out=")
    if kind in ("huggingface", "other"):
        raise ValueError(f"{run}: holds files that are no part of a run: choose another out=, a new folder")
    if complete_steps(run) or (run / "metrics.jsonl").exists():
        raise ValueError(f"{run}: holds a run: continue it with `neox train resume={run}`, or choose another out=")


def check_checkpoints(run: Path, quiet: bool) -> None:
    """Raise ValueError where a run has saved a checkpoint, and has none.

    A disk that is not mounted and a purge look like this; going on would begin anew and drop the rows. A run that was
    killed before its first checkpoint begins again, with a line that says so.
    """
    rows = run / "metrics.jsonl"
    if not rows.is_file() or complete_steps(run):
        return
    last = max((row["step"] for row in read_rows(rows) if isinstance(row.get("step"), int)), default=0)
    if (run / HAS_SAVED).exists():
        raise ValueError(
            f"{run}: metrics.jsonl goes up to step {last}, but the checkpoints are gone: put them back (is a disk not "
            f"mounted?), or begin anew with another out=, or here after removing {HAS_SAVED} and metrics.jsonl"
        )
    if last and not quiet:
        print(f"neox: {run}: no checkpoint had been written: begins again at step 1", file=sys.stderr)


def go_back(run: Path, step: int) -> None:
    """Move the checkpoints beyond a step into RUN/set_aside, with copies of what the run has written of itself.

    That folder is a run of its own; one line on stderr names it. Raises ValueError, and moves nothing, where the step's
    checkpoint is damaged: the run would go on from an earlier one.
    """
    kept = step_folder(run, step)
    if not is_valid(kept):
        raise ValueError(f"{kept}: is damaged: go on from another step")
    beyond = [folder for folder in complete_steps(run) if step_number(folder) > step]
    rows = run / "metrics.jsonl"
    if not beyond and not any(row.get("step", 0) > step for row in (read_rows(rows) if rows.exists() else ())):
        return
    number = next(n for n in itertools.count(1) if not (run / "set_aside" / f"{kept.name}-{n}").exists())
    aside = run / "set_aside" / f"{kept.name}-{number}"
    aside.mkdir(parents=True)
    for name in ("config.toml", "metrics.jsonl", "samples.jsonl", "tokenizer.json"):
        if (run / name).exists():
            write_atomic(aside / name, (run / name).read_bytes())
    for folder in reversed(beyond):  # of those that a crash leaves behind none is missing in the middle
        folder.rename(aside / folder.name)
    sync_folder(run)
    names = ", ".join(str(step_number(folder)) for folder in beyond)
    said = (
        f"the checkpoint{'s' if len(beyond) > 1 else ''} of {names}, and the rows" if beyond else "the rows beyond it"
    )
    print(f"neox: {run}: goes on from step {step}; set aside in {aside}: {said}", file=sys.stderr)


@contextlib.contextmanager
def opened(run: Path, resume: bool, processes: Processes, step: int | None = None) -> Iterator[bool]:
    """Inside, the run directory has this run as its only writer; yields True if the run continues.

    It does on `resume`, from its newest checkpoint or from `step`, and where the torchrun job of this process began
    it. Raises ValueError where another process writes the directory, where it holds a run that is not to be continued
    or anything else than a run, and where the checkpoints of a run are gone.
    """
    if folder_kind(run) != "run":
        refuse_existing(run)  # before a file is written there
    run.mkdir(parents=True, exist_ok=True)
    with only_writer(run, processes):
        begun = begun_by_this_launch(run)
        resume = bool(processes.all_reduce_max(resume or begun))
        # Looked at under the lock: a run that another process has just finished must not be begun again.
        if resume:
            check_checkpoints(run, quiet=processes.rank > 0)
        else:
            refuse_existing(run)
        with processes.rank_zero_first():
            if not processes.rank:
                if step is not None and not begun:
                    go_back(run, step)
                note_launch(run)
        yield resume


@contextlib.contextmanager
def only_writer(run: Path, processes: Processes) -> Iterator[None]:
    """Refuse a second writer on a run directory; the lock goes with the process, also when it is killed.

    Of the processes of one run rank 0 holds it for all.
    """
    handle = os.open(run / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with processes.rank_zero_first():
            if not processes.rank:
                if not try_lock(handle):
                    process = os.read(handle, 32).decode(errors="replace").strip() or "unknown"
                    raise ValueError(
                        f"{run}: process {process} is writing this run: wait for it, stop it, or choose another out="
                    )
                with contextlib.suppress(OSError):  # a full disk costs the number in the message, not the lock
                    os.ftruncate(handle, 0)
                    os.write(handle, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(handle)


def note_launch(run: Path) -> None:
    """Record the torchrun job that writes the run, for `begun_by_this_launch`."""
    if launched():
        (run / ".launch").write_text(launched())


def begun_by_this_launch(run: Path) -> bool:
    """True if the torchrun job of this process began the run: a restart, with which the run continues.

    torchrun's count of restarts does not say so: a host that joins a job counts from 0, and a run that was there
    before is refused by every attempt. A job without a name of its own (`--rdzv-id`) is never the same.
    """
    noted = run / ".launch"
    return launched() not in ("", "none") and noted.is_file() and noted.read_text() == launched()


def is_evaluated(run: Path, step: int) -> bool:
    """True if the run's rows hold an evaluation after that step."""
    rows = run / "metrics.jsonl"
    return rows.exists() and any(row.get("step") == step and "valid_loss" in row for row in read_rows(rows))


class StopSignals:
    """Handler of the first Ctrl-C or SIGTERM: noted in `number`, so that the run saves before it ends.

    A second Ctrl-C interrupts at once.
    """

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.number = 0

    def __enter__(self) -> "StopSignals":
        self.before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # elsewhere whoever runs us there handles signals
            self.before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in self.before:
            signal.signal(number, self._note)
        return self

    def _note(self, number: int, _: Any) -> None:
        self.number = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if not self.quiet:  # not through a stream: it may be in the middle of a write
            os.write(2, b"\nneox: stopping after this step; Ctrl-C again stops at once, without saving\n")

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def discard(config: Config, run: Path) -> None:
    """Remove the tokens of a start that never reached a step: they may come from other text than this config's."""
    kept, given = run / "tokenizer.json", config.tokenizer.path
    sources = (Path(given), Path(given) / "tokenizer.json") if given else ()
    if kept.exists() and not any(source.exists() and kept.samefile(source) for source in sources):
        kept.unlink()
    for kind, names in (("train", config.data.train), ("valid", config.data.valid)):
        for number in range(len(names)):
            (run / "data" / f"{kind}-{number}.idx").unlink(missing_ok=True)  # without it the pair is not complete

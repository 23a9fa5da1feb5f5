"""Writer of a run's checkpoints, in the foreground or from a copy in CPU memory; steps.py has the format."""

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from neox.checkpoint import checksums
from neox.checkpoint.steps import (
    ALONE,
    FAILURES,
    FORMAT_VERSION,
    HAS_SAVED,
    find_cause,
    named_state,
    prune,
    reraise_interrupt,
    step_folder,
)
from neox.config import CheckpointConfig, Config
from neox.model.decoder import GPTNeoX
from neox.system.files import sync_folder, write_synced
from neox.system.processes import OtherProcessFailed, Processes

# One process saves without a process group on purpose. (Filtered for good: catch_warnings is not safe beside threads.)
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)


def save_step(
    run: Path,
    parts: Iterable[GPTNeoX],
    optimizers: Iterable[torch.optim.Optimizer],
    config: Config,
    state: dict[str, Any],
    processes: Processes = ALONE,
) -> Path:
    """Write the checkpoint of `state["step"]` and return its folder.

    It appears as complete only once it is whole. All processes of the run call this together, each with the parts
    of the model that it holds. Raises OSError (a full disk) and leaves nothing of the checkpoint behind.
    """
    return Saver(run, CheckpointConfig(), processes).save(parts, optimizers, config, state)


class Saver:
    """Writer of the checkpoints of a run, one at a time.

    Expired ones are removed when a newer one is whole. All processes of the run make the same calls. With
    `checkpoint.asynchronous` a call of `save` returns when the state has been copied to CPU memory, which stays
    reserved for the next copy. An error in the background is raised by the next `poll`, `save` or `wait`: OSError (a
    full disk) on one process, OtherProcessFailed on the others. As a context manager it waits for the write in flight,
    except when Ctrl-C ends the block.
    """

    def __init__(self, run: Path, config: CheckpointConfig, processes: Processes = ALONE) -> None:
        self.run, self.config, self.processes = run, config, processes
        self.timings: dict[str, float] = {}  # of the saves since `take_timings`, in seconds
        self.slowest = 0.0  # seconds of the longest write so far
        self._in_flight: _Write | None = None
        # A group of its own: the training's collective calls go on beside those of the write.
        separate = config.asynchronous and processes.world > 1
        self._group = dist.new_group(backend="gloo") if separate else None
        self._stager: DefaultStager | None = None

    def save(
        self,
        parts: Iterable[GPTNeoX],
        optimizers: Iterable[torch.optim.Optimizer],
        config: Config,
        state: dict[str, Any],
        prunes: bool = True,
    ) -> Path:
        """Write the checkpoint of `state["step"]`, or begin to, and return its folder.

        With `prunes` expired checkpoints are removed once it is whole.
        """
        started = time.perf_counter()
        self.wait()
        folder = step_folder(self.run, state["step"])
        if (folder / ".metadata").is_file():
            return folder
        tensors = named_state(parts, optimizers)
        state_json = json.dumps({"format_version": FORMAT_VERSION, **state}, indent=2) + "\n"
        files = {"config.toml": config.to_toml().encode(), "state.json": state_json.encode()}
        if self.config.asynchronous:
            tensors = self._staged(tensors)
        self._in_flight = _Write(lambda: self._write(folder, tensors, files, prunes))
        if self.config.asynchronous:
            self._in_flight.start()
        else:
            self._in_flight.run()
            self.wait()
        self._count("save_stall", time.perf_counter() - started)
        return folder

    def poll(self) -> None:
        """Finish the write in flight where all processes are done with it, without waiting."""
        if (
            self._in_flight
            and self.processes.all_reduce_sum(int(not self._in_flight.is_alive())) == self.processes.world
        ):
            self.wait()

    def wait(self) -> None:
        """Wait for the write in flight."""
        if not self._in_flight:
            return
        write = self._in_flight
        write.join()
        self._in_flight = None
        self._count("save_seconds", write.seconds)
        self.slowest = max(self.slowest, write.seconds)
        error = write.error
        if isinstance(error, KeyboardInterrupt):
            raise error
        if self.processes.world == 1:
            if error:
                raise error
            return
        failed: list[bool | None] = [None] * self.processes.world
        dist.all_gather_object(failed, error is not None)
        if any(failed):
            first = failed.index(True)
            if error and (self.processes.rank == first or not isinstance(error, OSError)):
                raise error
            raise OtherProcessFailed(f"rank {first} could not save")

    def take_timings(self) -> dict[str, float]:
        """Return the seconds since the last call: training waited (`save_stall`), writing took (`save_seconds`)."""
        taken, self.timings = self.timings, {}
        return taken

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        elif self._in_flight and not issubclass(kind, KeyboardInterrupt):
            self._in_flight.join()  # the error that ends the run is raised; the checkpoint before it is kept
        if self._stager:
            self._stager.close()

    def _staged(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        pinned = any(tensor.is_cuda for tensor in tensors.values())
        if self._stager is None:
            self._stager = DefaultStager(StagingOptions(pinned, False, False, False))
        return cast(dict[str, Tensor], self._stager.stage(tensors))

    def _write(self, folder: Path, tensors: dict[str, Tensor], files: dict[str, bytes], prunes: bool) -> None:
        try:
            writer = _Writer(folder, files)
            dcp.save(tensors, storage_writer=writer, process_group=self._group, no_dist=self.processes.world == 1)
            if not self.processes.rank:
                (self.run / HAS_SAVED).touch()
                sync_folder(folder)
                sync_folder(folder.parent)
        except BaseException as error:
            # Rank 0 alone knows that the checkpoint is whole: another rank may have been killed right after .metadata
            # was written, which shows only in the collective call after it.
            whole = (folder / ".metadata").is_file() and not find_cause(error, OSError)
            if not self.processes.rank and not whole:
                with suppress(OSError):
                    (folder / ".metadata").unlink()  # first: a folder that is half removed must not read as complete
                shutil.rmtree(folder, ignore_errors=True)
            reraise_interrupt(error)
            if isinstance(error, FAILURES) and (cause := find_cause(error, OSError)):
                reason = os.strerror(cause.errno) if cause.errno else cause
                raise OSError(
                    cause.errno or errno.EIO,
                    f"{reason}: nothing was kept of this checkpoint; free space, then resume the run",
                    str(folder),
                ) from None
            raise
        if prunes and not self.processes.rank:
            prune(self.run, self.config)

    def _count(self, name: str, seconds: float) -> None:
        self.timings[name] = self.timings.get(name, 0.0) + seconds


class _Write(threading.Thread):
    """One write, its error and its seconds. A daemon: a second Ctrl-C does not wait for it."""

    def __init__(self, write: Callable[[], None]) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self._write = write
        self.error: BaseException | None = None
        self.seconds = 0.0
        self._begun = False

    def start(self) -> None:
        self._begun = True
        super().start()

    def run(self) -> None:
        started = time.perf_counter()
        try:
            self._write()
        except BaseException as error:
            self.error = error
        self.seconds = time.perf_counter() - started

    def join(self, timeout: float | None = None) -> None:
        if self._begun:  # otherwise it ran in the caller's thread
            super().join(timeout)


@dataclasses.dataclass(frozen=True)
class _Digested(WriteResult):
    digest: str = ""


class _Writer(dcp.FileSystemWriter):
    """DCP writer into a fresh folder, with checksums.json written before .metadata."""

    def __init__(self, folder: Path, files: dict[str, bytes]) -> None:
        super().__init__(folder, sync_files=True, overwrite=True)
        self.folder, self.small = folder, files
        self.fs = self.files = _Files(self._before_metadata)
        self.pieces: dict[str, list[tuple[int, str]]] = {}

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan  # the folder is made below, by one process

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Make a fresh folder with the small files; called on one process, before any writes."""
        # Leftovers of a killed writer are never reused: an old .metadata over new data would read as complete.
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        for name, content in self.small.items():
            write_synced(self.folder / name, _write_bytes(content))
        sync_folder(self.folder)
        return super().prepare_global_plan(plans)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = super().write_data(plan, planner).value()
        done: Future[list[WriteResult]] = Future()
        done.set_result([self._digested(result) for result in results])
        return done

    def _digested(self, result: WriteResult) -> WriteResult:
        stored = result.storage_data
        digest = self.files.pieces[stored.relative_path, stored.offset, stored.length]
        return _Digested(result.index, result.size_in_bytes, stored, digest)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Collect the digests of all processes; called on one process, after all have written."""
        by_offset: dict[str, dict[int, tuple[int, str]]] = {}
        for result in (result for written in results for result in written):
            assert isinstance(result, _Digested)
            stored = result.storage_data
            by_offset.setdefault(stored.relative_path, {})[stored.offset] = stored.length, result.digest
        self.pieces = {file: [pieces[offset] for offset in sorted(pieces)] for file, pieces in by_offset.items()}
        super().finish(metadata, results)

    def _before_metadata(self, digest: str) -> None:
        files = {name: checksums.digest(content) for name, content in self.small.items()}
        content = checksums.render({".metadata": digest, **files}, self.pieces)
        write_synced(self.folder / checksums.NAME, _write_bytes(content))
        sync_folder(self.folder)


class _Files(FileSystem):
    """File system that digests each piece: torch asks for the position before and after it."""

    def __init__(self, before_metadata: Callable[[str], None]) -> None:
        self.before_metadata = before_metadata
        self.pieces: dict[tuple[str, int, int], str] = {}  # by file, offset and length

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[Any, None, None]:
        name = Path(path).name
        with super().create_stream(path, mode) as stream:
            digesting = _Digesting(cast(IO[bytes], stream))
            yield digesting
        digesting.tell()
        self.pieces |= {(name, *extent): digest for extent, digest in digesting.pieces.items()}

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        (digest,) = [digest for (file, *_), digest in self.pieces.items() if file == Path(path).name]
        self.before_metadata(digest)
        super().rename(path, new_path)


class _Digesting:
    """Stream that digests the bytes between two calls of `tell`."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.state = stream, hashlib.blake2b(digest_size=16)
        self.pieces: dict[tuple[int, int], str] = {}  # by offset and length
        self.begun = self.position = 0

    def write(self, content: bytes | memoryview) -> int:
        self.state.update(content)
        self.position += memoryview(content).nbytes
        return self.stream.write(content)

    def tell(self) -> int:
        if self.position > self.begun:
            self.pieces[self.begun, self.position - self.begun] = self.state.hexdigest()
            self.begun, self.state = self.position, hashlib.blake2b(digest_size=16)
        return self.position

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _write_bytes(content: bytes) -> Callable[[IO[bytes]], None]:
    def write(file: IO[bytes]) -> None:
        file.write(content)

    return write

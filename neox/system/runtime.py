"""The ground a run stands on: processes, device, dtype and memory. The only reader of the environment."""

import contextlib
import functools
import json
import os
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def cache_folder() -> Path:
    """Where what can be made again is kept between runs: ~/.cache/neox, or below XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "neox"


class OtherProcessFailed(RuntimeError):
    """Another process of the run has failed, and has said why."""


class OtherProcessLost(OtherProcessFailed):
    """Another process of the run has gone without a word: killed, or its host was lost."""


class Processes(NamedTuple):
    """This process among those of the run. Collective calls go over the CPU: no accelerator waits for them."""

    rank: int = 0
    world: int = 1

    def sum(self, value: int) -> int:
        """The sum over all processes."""
        return self._reduced(value, "SUM")

    def largest(self, value: int) -> int:
        """The largest of all processes."""
        return self._reduced(value, "MAX")

    def _reduced(self, value: int, operation: str) -> int:
        if self.world == 1:
            return value
        import torch.distributed as dist

        tensor = torch.tensor(int(value))  # a truth value would stay one
        dist.all_reduce(tensor, getattr(dist.ReduceOp, operation))
        return int(tensor)

    @contextlib.contextmanager
    def first_alone(self) -> Iterator[None]:
        """Rank 0 goes through the block, then all others: what it left on the disk, they find.

        Raises OtherProcessFailed on the others where it failed.
        """
        if self.rank and not self.largest(0):
            raise OtherProcessFailed("rank 0 failed")
        good = 0
        try:
            yield
            good = 1
        finally:
            if not self.rank:
                self.largest(good)


# A hang is found, and shown, by the run's own watch (train.timeout). Until then processes may wait for long: for rank 0
# that tokenizes the text, for a block that is compiled.
PATIENCE = timedelta(days=1)
JOINING = timedelta(minutes=10)  # from the first process of an attempt to the last


@contextlib.contextmanager
def joined_processes(device: str = "auto", doing: Callable[[], str] = lambda: "") -> Iterator[Processes]:
    """The processes that torchrun started, joined into a group while inside; one alone without torchrun.

    A group that the caller has made is used, and left as it is. Raises OtherProcessLost where a collective call fails
    because another process has gone; `doing` says what this one was at, for the message.
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        yield Processes(dist.get_rank(), dist.get_world_size())
        return
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield Processes()
        return
    from torch.distributed.rendezvous import rendezvous

    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # collectives that the flight recorder keeps
    backend = "cpu:gloo,cuda:nccl" if resolve_device(device).type == "cuda" else "gloo"
    processes = Processes(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    try:
        store, *_ = next(rendezvous("env://", timeout=JOINING))
        store = dist.PrefixStore(agreed_attempt(store, *processes), store)
        dist.init_process_group(backend, store=store, rank=processes.rank, world_size=processes.world, timeout=PATIENCE)
        yield processes
    except BaseException as error:
        # Destroying it below would wait for those that have gone, or that still wait for this process.
        if backend != "gloo" and dist.is_initialized():
            dist.distributed_c10d._abort_process_group()
        if not (reason := _lost(error)):
            raise
        where = f"rank {processes.rank}: another process of the run has gone{doing()}"
        raise OtherProcessLost(f"{where} ({reason})") from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def agreed_attempt(store: Any, rank: int, world: int, limit: timedelta = JOINING) -> str:
    """A name that the processes of this attempt agree on and that no earlier attempt used: a prefix for its keys.

    torchrun keeps one store over its restarts, in which a fast process would find the addresses of the dead, and each
    of its hosts counts restarts for itself. So each process leaves a name that is new in a place that may hold an old
    one; rank 0 sends its own to the names that it finds, until each rank has answered to it.
    Raises TimeoutError where one does not come.
    """
    mine = uuid.uuid4().hex
    if rank:
        store.set(f"neox/{rank}", mine)
        attempt = store.get(mine).decode()  # waits for it
        store.set(f"{attempt}/{rank}", "")
        return attempt
    missing = set(range(1, world))
    deadline = time.monotonic() + limit.total_seconds()
    while missing:
        for other in missing:
            if store.check([f"neox/{other}"]):
                store.set(store.get(f"neox/{other}").decode(), mine)
        time.sleep(0.02)
        missing = {other for other in missing if not store.check([f"{mine}/{other}"])}
        if time.monotonic() > deadline:
            raise TimeoutError(f"rank {min(missing)} did not join within {limit.total_seconds():.0f} s")
    return mine


def _lost(error: BaseException) -> str:
    """How torch says that another process has gone; empty where the error is another one."""
    text = str(error)  # that of a checkpoint's failure holds those of all ranks
    found = re.search(r"Connection (closed by peer|reset by peer|refused)[^.\n]*|Broken pipe|NCCL remote error", text)
    mine = isinstance(error, RuntimeError) or type(error).__name__ == "CheckpointException"
    if mine and not isinstance(error, OtherProcessFailed) and found:
        return found[0].strip()
    return ""


def launched() -> str:
    """What torchrun calls the job that it started this process in, the same over restarts; empty without torchrun."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "")


def is_launched() -> bool:
    """Whether torchrun, or what else sets its variables, started this process."""
    return "WORLD_SIZE" in os.environ


def is_first() -> bool:
    """Whether this is the first of all processes that torchrun started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def first_of_host() -> bool:
    """Whether this is the first of the processes that torchrun started on this host."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def flight_record() -> dict[str, Any]:
    """The last collective calls of this process, as torch's flight recorder has them; empty where it has none."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return {}
    from torch._C import _distributed_c10d as c10d

    # One is there in builds with NCCL, the other since gloo is recorded too.
    dump = getattr(c10d, "_dump_nccl_trace_json" if torch.cuda.is_available() else "_dump_fr_trace_json", None)
    return dict(json.loads(dump())) if dump else {}


def local_device(name: str = "auto") -> torch.device:
    """The device of this process: `resolve_device`, and where torchrun started several on a host, this one's own."""
    device = resolve_device(name)
    if device.type != "cuda" or device.index is not None:
        return device
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def resolve_device(name: str = "auto") -> torch.device:
    """The device of that name; `auto` takes cuda, then mps, then cpu. ValueError where it is not there."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in present.items() if there))
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or not present.get(device.type):
        found = ", ".join(kind for kind, there in present.items() if there)
        raise ValueError(f"device {name!r} is not available here: choose one of auto, {found}")
    return device


def readable(tensor: torch.Tensor) -> bool:
    """Whether the host can look at a value at no cost; an accelerator's queue would have to run empty first."""
    return tensor.device.type == "cpu"


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A torch dtype from its name (fp32, bf16, fp16 or torch's own); ValueError for another."""
    if isinstance(dtype, torch.dtype):
        return dtype
    found = DTYPES.get(dtype) or getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype {dtype!r} is unknown: choose one of {', '.join(DTYPES)}")
    return found


@functools.cache
def matmul_flops(device: torch.device, dtype: str = "fp32", seconds: float = 0.5) -> float:
    """Best FLOP/s of a square matrix product here: the limit that MFU is a share of. Takes about `seconds`."""
    kind = resolve_dtype(dtype)
    deadline = time.perf_counter() + seconds
    best = 0.0
    for n in (128, 512, 1024, 2048, 8192):
        # A larger product comes closer to the limit, where there is time for a few of them. The first only tells
        # whether there is: 16-bit products run 400 times slower than others on some CPUs.
        if n > 128 and 2 * n**3 / best > (deadline - time.perf_counter()) / 4:
            break
        a = torch.randn(n, n, device=device, dtype=kind)
        end = time.perf_counter() + (seconds / 4 if n > 128 else 0)
        calls = 0
        while calls < 2 or time.perf_counter() < end:
            started = time.perf_counter()
            (a @ a)[0, 0].item()
            best = max(best, 2 * n**3 / (time.perf_counter() - started))
            calls += 1
    return best


def asked_threads() -> str | None:
    """OMP_NUM_THREADS as it is set: the threads that torch takes on a CPU; None where it is not."""
    return os.environ.get("OMP_NUM_THREADS")


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak so far: what torch allocated on an accelerator, resident memory of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux; unlike getrusage's figure this one is not inherited from the caller.
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

"""The ground a run stands on: processes, device, dtype and memory. The only reader of the environment."""

import contextlib
import functools
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def cache_folder() -> Path:
    """Where what can be made again is kept between runs: ~/.cache/neox, or below XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "neox"


class OtherProcessFailed(RuntimeError):
    """Another process of the run has failed, and has said why."""


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


@contextlib.contextmanager
def joined_processes(device: str = "auto") -> Iterator[Processes]:
    """The processes that torchrun started, joined into a group while inside; one alone without torchrun.

    A group that the caller has made is used, and left as it is.
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        yield Processes(dist.get_rank(), dist.get_world_size())
        return
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield Processes()
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if resolve_device(device).type == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


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

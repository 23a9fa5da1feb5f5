"""The ground a run stands on: device, dtype and memory. The only reader of the environment."""

import functools
import os
import sys
import time

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

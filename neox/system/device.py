"""Devices and dtypes by name, the speed of a matrix product, and peak memory."""

import contextlib
import functools
import os
import sys
import time

import torch

from neox.system.console import human_bytes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def local_device(name: str = "auto") -> torch.device:
    """Resolve a device name for this process; with torchrun on CUDA, the device of its local rank."""
    device = resolve_device(name)
    if device.type != "cuda" or device.index is not None:
        return device
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def resolve_device(name: str = "auto") -> torch.device:
    """Resolve a device name; `auto` takes cuda, then mps, then cpu. Raises ValueError if it is not available."""
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
    """True if the host reads a value at no cost; an accelerator would have to finish its queue first."""
    return tensor.device.type == "cpu"


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Resolve a type of weights: fp32, bf16 or fp16, or torch's own names of these and of float64.

    Raises ValueError for any other: integers and booleans hold no weights, 8 bits none without scales.
    """
    found = DTYPES.get(dtype) or getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (*DTYPES.values(), torch.float64):
        raise ValueError(f"dtype {str(dtype)!r} holds no weights: choose one of {', '.join(DTYPES)}")
    assert isinstance(found, torch.dtype)
    return found


@functools.cache
def matmul_flops(device: torch.device, dtype: str = "fp32", seconds: float = 0.5) -> float:
    """Measure the best FLOP/s of a square matrix product, the peak that MFU refers to, in about `seconds`."""
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


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device; on a CPU the machine's available memory."""
    from neox.system import machine

    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else machine.available_ram()


def is_out_of_memory(error: BaseException) -> bool:
    """True for the out-of-memory errors of an accelerator, of Python and of torch's CPU allocator."""
    words = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(word in str(error) for word in words)


def check_fits(needed: float, device: torch.device, what: str) -> None:
    """Raise ValueError where `what` needs more bytes than the device has in all, before anything is allocated."""
    from neox.system import machine

    cuda = device.type == "cuda"
    total = torch.cuda.get_device_properties(device).total_memory if cuda else machine.available_ram()
    if needed > total:
        where = "this GPU" if cuda else "this machine"
        raise ValueError(f"{what} needs {human_bytes(needed)}, {where} has {human_bytes(total)}")


def peak_memory(device: torch.device) -> int:
    """Peak memory so far in bytes: allocated by torch on an accelerator, resident set size on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux; unlike getrusage's figure this one is not inherited from the caller.
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

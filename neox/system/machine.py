"""Probes of the machine: cores, memory, instruction sets, read and write speed. Imports no torch."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

# As the kernel spells it in /proc/cpuinfo, and as people do: what decides the speed of matrix products.
INSTRUCTION_SETS = {
    "avx2": "AVX2",
    "fma": "FMA",
    "f16c": "F16C",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512_bf16": "AVX-512 BF16",
    "avx512_fp16": "AVX-512 FP16",
    "amx_int8": "AMX INT8",
    "amx_bf16": "AMX BF16",
    "asimd": "NEON",
    "asimdhp": "NEON FP16",
    "i8mm": "INT8 matrix",
    "bf16": "BF16",
    "sve": "SVE",
}
BLOCK = 8 << 20  # bytes written between two fsyncs
MOST_WRITTEN = 512 << 20  # bytes


def asked_threads() -> str | None:
    """Value of OMP_NUM_THREADS, the number of threads that torch uses on a CPU; None if unset."""
    return os.environ.get("OMP_NUM_THREADS")


def available_cores() -> int:
    """Number of cores that this process may use, by its affinity and its control group's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _first_line("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit() and quota[1].isdigit() and int(quota[1]) > 0:
        cores = min(cores, max(1, math.ceil(int(quota[0]) / int(quota[1]))))
    return cores


def available_ram() -> int:
    """Bytes of memory that this process may use, by the machine and its control group's limit."""
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        line = _first_line(limit)
        if line.isdigit():
            ram = min(ram, int(line))
    return ram


def return_freed_memory() -> None:
    """Return freed memory to the system; glibc would keep it."""
    # Of tensors below 32 MB each may leave a hole that the next one does not fit into (docs/log.md).
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def processor() -> str:
    """Name of the processor, from the kernel or the platform."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def instruction_sets() -> list[str]:
    """List the INSTRUCTION_SETS that the kernel reports; empty if it reports none (not Linux)."""
    flags = set((_cpuinfo("flags") or _cpuinfo("Features")).split())
    return [name for flag, name in INSTRUCTION_SETS.items() if flag in flags]


def nvidia_driver() -> str | None:
    """Version of the loaded NVIDIA driver, or None."""
    found = re.search(r"\b\d+\.\d+(\.\d+)*\b", _first_line("/proc/driver/nvidia/version"))
    return found[0] if found else None


def read_speed(seconds: float) -> float:
    """Measure the best bytes/s at which all threads read memory, in about `seconds`.

    Takes the better of a matrix-vector product, which decoding resembles, and a sum: some libraries' products do not
    reach the speed of the memory.
    """
    import torch

    # A GiB, because servers have caches of half that; less where memory is short.
    rows = max(1, min(2**30, available_ram() // 8) // (4096 * 4))
    deadline = time.perf_counter() + seconds
    matrix, vector, out = torch.ones(rows, 4096), torch.ones(4096), torch.empty(rows)
    left = (deadline - time.perf_counter()) / 2
    best = min(_best_seconds(lambda: torch.mv(matrix, vector, out=out), left), _best_seconds(matrix.sum, left))
    return matrix.numel() * 4 / best


def write_speed(folder: Path, seconds: float) -> float:
    """Measure bytes/s written to a file in `folder` and synced, like a checkpoint. No file stays, even if killed.

    Takes about `seconds`, one block's time at least. Raises OSError naming the folder where it cannot be written.
    """
    block = os.urandom(BLOCK)  # what a compressing file system cannot make smaller
    written = 0
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            start = time.perf_counter()
            while written < MOST_WRITTEN:
                file.write(block)
                file.flush()
                os.fsync(file.fileno())
                written += len(block)
                if time.perf_counter() - start > seconds:
                    break
            return written / (time.perf_counter() - start)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from None


def _best_seconds(work: Callable[[], object], seconds: float) -> float:
    """Measure the shortest time of `work` in about `seconds`, over at least two calls; the first warms up."""
    end = time.perf_counter() + seconds
    best, calls = math.inf, 0
    while calls < 2 or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
        calls += 1
    return best


def _cpuinfo(key: str) -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    found = re.search(rf"^{key}\s*:\s*(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else ""


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii").split("\n", 1)[0].strip()
    except (OSError, UnicodeDecodeError):
        return ""

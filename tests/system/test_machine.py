"""The computer below: limits, names and speeds, from files as kernels write them."""

import os
import time
from pathlib import Path

import pytest

from neox.system import machine as module


def test_limits_of_a_control_group(monkeypatch):
    files = {"/sys/fs/cgroup/cpu.max": "150000 100000", "/sys/fs/cgroup/memory.max": str(2**28)}
    monkeypatch.setattr(module, "_first_line", lambda path: files.get(path, ""))
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert module.available_cores() == 2
    assert module.available_ram() == 2**28
    files.update({"/sys/fs/cgroup/cpu.max": "max 100000", "/sys/fs/cgroup/memory.max": "max"})
    assert module.available_cores() == 8
    assert module.available_ram() > 2**28


CPUINFO = {
    "x86": "processor\t: 0\nmodel name\t: A CPU @ 2 GHz\nflags\t\t: fpu avx2 fma f16c avx512f amx_bf16\nbugs\t: none\n",
    "arm": "processor\t: 0\nFeatures\t: fp asimd asimdhp bf16 i8mm\n",
}


@pytest.mark.parametrize(
    ("kind", "name", "sets"),
    [
        ("x86", "A CPU @ 2 GHz", ["AVX2", "FMA", "F16C", "AVX-512", "AMX BF16"]),
        ("arm", None, ["NEON", "NEON FP16", "INT8 matrix", "BF16"]),
        ("", None, []),
    ],
)
def test_what_the_kernel_says_of_the_processor(
    kind: str, name: str | None, sets: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(path: Path, **_: object) -> str:
        if not kind:
            raise FileNotFoundError(path)
        return CPUINFO[kind]

    monkeypatch.setattr(module.Path, "read_text", read)
    monkeypatch.setattr(module.platform, "processor", lambda: "")
    monkeypatch.setattr(module.platform, "machine", lambda: "aarch64")
    assert module.instruction_sets() == sets
    assert module.processor() == (name or "aarch64")


@pytest.mark.parametrize(
    ("line", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023", "535.104.05"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86  Release Build", "570.86"),
        ("", None),
    ],
)
def test_the_driver(line: str, version: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_first_line", lambda path: line)
    assert module.nvidia_driver() == version


def test_writing_is_synced_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 1 << 16)
    monkeypatch.setattr(module, "MOST_WRITTEN", 1 << 18)
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(module.os, "fsync", lambda handle: synced.append(os.fstat(handle).st_size) or fsync(handle))
    start = time.perf_counter()
    speed = module.write_speed(tmp_path, 60)
    assert speed >= (1 << 18) / (time.perf_counter() - start)
    assert synced == [1 << 16, 2 << 16, 3 << 16, 4 << 16]
    synced.clear()
    module.write_speed(tmp_path, 0)
    assert synced == [1 << 16]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=f"No such file or directory: '{tmp_path}/absent'"):
        module.write_speed(tmp_path / "absent", 0)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}'"):
        module.write_speed(tmp_path, 0)
    assert list(tmp_path.iterdir()) == []

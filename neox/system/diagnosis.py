"""The checks of `neox doctor`: versions, speeds, traps, and the command that repairs each fault.

A section yields checks; a check's probe returns a Finding. A probe that raises costs its own line and nothing else, and
whatever a probe needs it imports itself: the doctor is for installations that are broken.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from neox.system import machine
from neox.system.console import human_gib, one_line
from neox.system.optional import DISTRIBUTION, install_command

SECONDS = 0.6  # for each measurement
SMALL_SHM = 256 << 20  # bytes; a container gets 64 MiB unless it asks for more
SMALL_DISK = 4 << 30  # bytes; a checkpoint of pythia-160m with its moments is 2 GB


@dataclass(frozen=True)
class Finding:
    """Result of a probe."""

    text: str
    advice: str = ""
    """The fault, and how to repair it; empty if there is none."""
    broken: bool = False
    """True if neox does not work with this fault."""


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    label: str
    probe: Callable[[], Finding]
    needed: bool = False
    """True if neox does not work when the probe raises."""


Section = Callable[[Path], Iterable[Check]]


def examine(folder: Path, sections: dict[str, Section] | None = None) -> int:
    """Print each finding as it comes; runs are to be written to `folder`.

    Returns the exit status: 1 if something that neox needs is broken, else 0.
    """
    broken, advice = [], []
    for title, section in (SECTIONS if sections is None else sections).items():
        print(title)
        for check in _checks(section, folder):
            # The name first: it tells what is being waited for.
            print(f"  {check.label:<16}", end="", flush=True)
            try:
                finding = check.probe()
            except Exception as error:
                finding = Finding(f"cannot tell: {one_line(error, named=True)}", broken=check.needed)
            print(f"  {finding.text}".rstrip())
            if finding.broken:
                broken.append(f"{check.label}: {finding.advice or finding.text}")
            elif finding.advice:
                advice.append(f"{check.label}: {finding.advice}")
        print()
    for heading, lines in (("Broken", broken), ("Advice", advice)):
        if lines:
            print("\n".join([heading, *(f"  {line}" for line in lines)]), end="\n\n")
    print("neox does not work here as it is: see Broken." if broken else "All that neox needs works.")
    return 1 if broken else 0


def _checks(section: Section, folder: Path) -> Iterator[Check]:
    try:
        yield from section(folder)
    except Exception as error:
        failure = Finding(f"cannot tell: {one_line(error, named=True)}")
        yield Check("(the rest)", lambda: failure)


# --- software --------------------------------------------------------------------------------------------------------


def _software(folder: Path) -> Iterator[Check]:
    yield Check("python", _python)
    yield Check("neox", _owner)
    for name, needed in _requirements("").items():
        yield Check(name, partial(_package, name, needed), needed=True)


def _python() -> Finding:
    from packaging.specifiers import SpecifierSet

    found = platform.python_version()
    needed = importlib.metadata.metadata(DISTRIBUTION)["Requires-Python"]
    if SpecifierSet(needed).contains(found, prereleases=True):
        return Finding(f"{found} (needs {needed})")
    return Finding(f"{found} (needs {needed})", f"install Python {needed} and neox in it", broken=True)


def _owner() -> Finding:
    """Name the distributions that install a module `neox`: the index has another project of that name."""
    owners = sorted(set(importlib.metadata.packages_distributions().get("neox", ())))
    others = [name for name in owners if name != DISTRIBUTION]
    if others:
        return Finding(
            f"installed by {', '.join(owners)}",
            f"another distribution owns the module neox: pip uninstall {' '.join(others)}, then install {DISTRIBUTION} "
            "again",
        )
    return Finding(f"installed by {DISTRIBUTION}" if owners else "not installed, run from its source")


def _requirements(extra: str) -> dict[str, str]:
    """Required packages and their versions: of neox itself, or those that an extra adds."""
    from packaging.requirements import Requirement

    found = {}
    for text in importlib.metadata.requires(DISTRIBUTION) or []:
        requirement = Requirement(text)
        own = "extra" in str(requirement.marker or "")
        if own == bool(extra) and (not requirement.marker or requirement.marker.evaluate({"extra": extra})):
            found[requirement.name] = str(requirement.specifier)
    return found


def _version(name: str, needed: str) -> tuple[str, bool]:
    """Installed version (empty if missing), and True if it satisfies `needed`."""
    from packaging.specifiers import SpecifierSet

    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "", False
    return found, SpecifierSet(needed).contains(found, prereleases=True)


def _package(name: str, needed: str) -> Finding:
    found, good = _version(name, needed)
    mend = f"pip install '{name}{needed}'"
    if not good:
        return Finding(f"{found or 'missing'} (needs {needed})", mend, broken=True)
    try:
        importlib.import_module(name.replace("-", "_"))
    except Exception as error:
        text = f"{found} cannot be imported: {one_line(error, named=True)}"
        return Finding(text, f"{text}; pip install --force-reinstall '{name}{needed}'", broken=True)
    return Finding(f"{found} (needs {needed})" if needed else found)


def _extras(folder: Path) -> Iterator[Check]:
    for extra in importlib.metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or []:
        yield Check(extra, partial(_extra, extra))


def _extra(extra: str) -> Finding:
    there, wrong = [], []
    for name, needed in _requirements(extra).items():
        found, good = _version(name, needed)
        if good:
            there.append(f"{name} {found}")
        else:
            wrong.append(f"{name} {found} is not {needed}" if found else f"{name} is missing")
    if wrong:
        return Finding(f"{', '.join(wrong)}: {install_command(extra)}")
    return Finding(", ".join(there))


# --- processor and memory --------------------------------------------------------------------------------------------


def _processor(folder: Path) -> Iterator[Check]:
    yield Check("model", lambda: Finding(machine.processor()))
    yield Check("instructions", _instructions)
    yield Check("threads", _threads)
    yield from _matmuls("cpu")


def _instructions() -> Finding:
    import torch

    known = ", ".join(machine.instruction_sets()) or "not known"
    return Finding(f"{known}; torch uses {torch.backends.cpu.get_cpu_capability()}")


def _threads() -> Finding:
    import torch

    from neox.system.machine import asked_threads

    cores, threads, asked = machine.available_cores(), torch.get_num_threads(), asked_threads()
    text = f"{threads} on {cores} core{'s' * (cores != 1)}, OMP_NUM_THREADS {f'= {asked}' if asked else 'not set'}"
    if max(threads, int(asked) if asked and asked.isdigit() else 0) > cores:
        return Finding(text, f"more than there are cores, so they wait for each other: export OMP_NUM_THREADS={cores}")
    return Finding(text)


def _matmuls(device: str) -> Iterator[Check]:
    speeds: dict[str, float] = {}
    for dtype in ("fp32", "bf16", "fp16"):
        yield Check(f"matmul {dtype}", partial(_matmul, device, dtype, speeds), needed=dtype == "fp32")


def _matmul(device: str, dtype: str, speeds: dict[str, float]) -> Finding:
    import torch

    from neox.system.device import matmul_flops

    with torch.inference_mode():
        speeds[dtype] = matmul_flops(torch.device(device), dtype, SECONDS)
    text = f"{speeds[dtype] / 1e9:,.3g} GFLOP/s" if speeds[dtype] < 1e12 else f"{speeds[dtype] / 1e12:,.3g} TFLOP/s"
    slower = speeds.get("fp32", 0.0) / speeds[dtype]
    if slower > 1.2:
        return Finding(text, f"{slower:.1f} times slower than fp32 here; keep to dtype=fp32 on {device}")
    return Finding(text)


def _memory(folder: Path) -> Iterator[Check]:
    yield Check("size", lambda: Finding(human_gib(machine.available_ram())))
    yield Check("read", lambda: Finding(f"{machine.read_speed(SECONDS) / 1e9:,.1f} GB/s"))
    if Path("/dev/shm").is_dir():
        yield Check("/dev/shm", _shared_memory)


def _shared_memory() -> Finding:
    size = shutil.disk_usage("/dev/shm").total
    advice = "too little for several processes that share tensors; in a container: docker run --shm-size=1g"
    return Finding(human_gib(size), advice if size < SMALL_SHM else "")


# --- accelerators and processes --------------------------------------------------------------------------------------


def _accelerators(folder: Path) -> Iterator[Check]:
    yield Check("cuda", _cuda)
    yield Check("mps", _mps)
    import torch

    for number in range(torch.cuda.device_count()):
        yield Check(f"cuda:{number}", partial(_cuda_device, number), needed=True)
    if torch.cuda.is_available():
        yield from _matmuls("cuda")
    if torch.backends.mps.is_available():
        yield from _matmuls("mps")


def _cuda() -> Finding:
    import torch

    driver = machine.nvidia_driver()
    if torch.cuda.is_available():
        return Finding(f"{torch.version.cuda}, driver {driver or 'version not known'}")
    if driver is None:
        return Finding("none")
    if torch.version.cuda is None:
        return Finding(
            "none", f"there is an NVIDIA driver ({driver}), but this torch is built without CUDA: install one"
        )
    return Finding("none", f"torch is built for CUDA {torch.version.cuda}, driver {driver} shows it no device")


def _cuda_device(number: int) -> Finding:
    import torch

    found = torch.cuda.get_device_properties(number)
    return Finding(f"{found.name}, {human_gib(found.total_memory)}, capability {found.major}.{found.minor}")


def _mps() -> Finding:
    import torch

    return Finding("there" if torch.backends.mps.is_available() else "none")


def _processes(folder: Path) -> Iterator[Check]:
    yield Check("gloo", _gloo)
    yield Check("nccl", _nccl)


def _gloo() -> Finding:
    import torch.distributed as dist

    if dist.is_available() and dist.is_gloo_available():
        return Finding("there")
    return Finding("none", "several processes on CPUs cannot talk: install a torch that is built with gloo")


def _nccl() -> Finding:
    import torch
    import torch.distributed as dist

    if dist.is_available() and dist.is_nccl_available():
        return Finding(".".join(map(str, torch.cuda.nccl.version())))
    if torch.cuda.device_count() > 1:
        return Finding("none", "several GPUs cannot talk: install a torch that is built with NCCL")
    return Finding("none")


# --- disk ------------------------------------------------------------------------------------------------------------


def _disk(folder: Path) -> Iterator[Check]:
    # The folder need not exist yet; then it will be on the disk of the one above.
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    yield Check("runs go to", lambda: Finding(str(folder)))
    yield Check("free", partial(_free, there), needed=True)
    yield Check("write and sync", partial(_write, there), needed=True)


def _free(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    return Finding(
        human_gib(free), f"little for checkpoints: give out= on another disk than {folder}" * (free < SMALL_DISK)
    )


def _write(folder: Path) -> Finding:
    return Finding(f"{machine.write_speed(folder, SECONDS) / 1e6:,.0f} MB/s")


SECTIONS: dict[str, Section] = {
    "Software": _software,
    "Extras": _extras,
    "Processor": _processor,
    "Memory": _memory,
    "Accelerators": _accelerators,
    "Several processes": _processes,
    "Disk": _disk,
}

"""The doctor: one line a check whatever fails, the command that mends it, and the exit status."""

import importlib
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from neox import cli
from neox.system import device, machine
from neox.system import diagnosis as doctor
from neox.system.diagnosis import SECTIONS, Check, Finding, examine

BASE = ("torch", "numpy", "safetensors", "tokenizers", "pydantic", "tomli-w", "rich", "matplotlib")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements that take no time."""
    monkeypatch.setattr(device, "matmul_flops", lambda device, dtype, seconds: 5e10)
    monkeypatch.setattr(machine, "read_speed", lambda seconds: 1.25e10)
    monkeypatch.setattr(machine, "write_speed", lambda folder, seconds: 2.5e8)


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The metadata that pyproject.toml gives the installed distribution, whatever is installed here."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    rows = ["Metadata-Version: 2.1", f"Name: {project['name']}", f"Version: {project['version']}"]
    rows += [f"Requires-Python: {project['requires-python']}"]
    rows += [f"Requires-Dist: {text}" for text in project["dependencies"]]
    for extra, texts in project["optional-dependencies"].items():
        rows += [f"Provides-Extra: {extra}", *(f"Requires-Dist: {text}; extra == '{extra}'" for text in texts)]
    site = tmp_path_factory.mktemp("site")
    folder = site / f"neox_lm-{project['version']}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("\n".join(rows) + "\n\n")
    (folder / "top_level.txt").write_text("neox\n")
    monkeypatch.syspath_prepend(site)
    return site


Examine = Callable[..., tuple[int, dict[str, str], str]]


@pytest.fixture
def examined(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Examine:
    """Exit status, text by label, and what follows the sections."""

    def call(sections: dict | None = None, folder: Path = tmp_path) -> tuple[int, dict[str, str], str]:
        status = examine(folder, sections)
        out, err = capsys.readouterr()
        assert err == ""
        titles = SECTIONS if sections is None else sections
        blocks = out.split("\n\n")
        lines = [line for block in blocks[: len(titles)] for line in block.splitlines()]
        assert [line for line in lines if not line.startswith(" ")] == list(titles)
        rows = [line for line in lines if line.startswith(" ")]
        assert all(re.fullmatch(r"  \S.{15}  \S.*", row) for row in rows)
        return status, {row[2:18].strip(): row[20:] for row in rows}, "\n\n".join(blocks[len(titles) :])

    return call


def section(*checks: Check) -> dict:
    return {"Section": lambda folder: checks}


# --- a sound machine -------------------------------------------------------------------------------------------------


def test_a_sound_machine(examined: Examine, tmp_path: Path) -> None:
    status, lines, rest = examined()
    assert status == 0
    assert rest.endswith("All that neox needs works.\n")
    assert "Broken" not in rest
    for name in BASE:
        found = importlib.import_module(name.replace("-", "_"))
        version = getattr(found, "__version__", importlib.metadata.version(name))
        assert lines[name].startswith(f"{version} (needs >=")
    assert lines["python"].startswith("{}.{}.{}".format(*sys.version_info))
    assert lines["matmul fp32"] == lines["matmul fp16"] == "50 GFLOP/s"
    assert lines["read"] == "12.5 GB/s"
    assert lines["write and sync"] == "250 MB/s"
    assert lines["runs go to"] == str(tmp_path)
    for label in ("model", "instructions", "threads", "size", "cuda", "mps", "gloo", "nccl", "free", "hf"):
        assert lines[label]
        assert "cannot tell" not in lines[label]


@pytest.mark.alone
@pytest.mark.slow
def test_the_command_measures_in_fifteen_seconds(installed: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*filter(None, sys.path), str(installed)])}
    command = [sys.executable, "-m", "neox", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=environment)
    for label, unit in (("matmul fp32", "FLOP/s"), ("read", "GB/s"), ("write and sync", "MB/s")):
        assert re.search(rf"^  {label} +[\d.,]+ \w*{unit}$", done.stdout, re.MULTILINE)
    assert "cannot tell" not in done.stdout


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "SECTIONS", {"Disk": SECTIONS["Disk"]})
    monkeypatch.chdir(tmp_path)
    assert cli.main(["doctor"]) == 0
    assert "runs go to        runs\n" in capsys.readouterr().out
    assert cli.main(["doctor", f"out={tmp_path / 'a' / 'b'}"]) == 0
    assert f"runs go to        {tmp_path / 'a' / 'b'}\n" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    for wrong, said in (
        ("runs", "doctor takes out=RUN_DIR only"),
        ("steps=3", "doctor has no option steps; there are out"),
    ):
        assert cli.main(["doctor", wrong]) == 2
        assert capsys.readouterr().err == f"neox: error: {said}\n"


# --- a probe that fails ----------------------------------------------------------------------------------------------


def boom() -> Finding:
    raise RuntimeError("it\nbroke")


def test_each_probe_that_fails_costs_its_own_line(examined: Examine, tmp_path: Path) -> None:
    titles = {title: [check.label for check in made(tmp_path)] for title, made in SECTIONS.items()}
    labels = [label for checks in titles.values() for label in checks]
    for broken in labels:
        sections = {
            title: lambda folder, made=made, broken=broken: [
                Check(check.label, boom if check.label == broken else lambda: Finding("fine"), check.needed)
                for check in made(folder)
            ]
            for title, made in SECTIONS.items()
        }
        status, lines, rest = examined(sections)
        assert lines == dict.fromkeys(labels, "fine") | {broken: "cannot tell: RuntimeError: it broke"}
        needed = broken in (*BASE, "matmul fp32", "free", "write and sync") or broken.startswith("cuda:")
        assert status == needed
        assert ("neox does not work here" in rest) == needed
        assert (f"Broken\n  {broken}: cannot tell: RuntimeError: it broke\n" in rest) == needed


def test_a_section_that_fails_loses_its_rest_only(examined: Examine) -> None:
    def half(folder: Path):
        yield Check("one", lambda: Finding("fine"))
        raise OSError("no more")

    status, lines, _ = examined({"First": half, **section(Check("two", lambda: Finding("fine")))})
    assert status == 0
    assert lines == {"one": "fine", "(the rest)": "cannot tell: OSError: no more", "two": "fine"}


def test_ctrl_c_is_not_a_finding() -> None:
    def stop() -> Finding:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        examine(Path(), section(Check("one", stop)))


# --- what is missing, and what mends it ------------------------------------------------------------------------------


def versions(monkeypatch: pytest.MonkeyPatch, **changed: str | None) -> None:
    true = importlib.metadata.version

    def version(name: str) -> str:
        found = changed.get(name, true(name) if name not in changed else None)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_a_missing_extra_is_told_and_is_not_an_error(examined: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch, transformers=None, pytest="1.0")
    status, lines, _ = examined()
    assert status == 0
    assert lines["hf"] == "transformers is missing: pip install 'neox-lm[hf]'"
    assert lines["dev"].startswith("transformers is missing, pytest 1.0 is not >=")
    assert lines["dev"].endswith(": pip install 'neox-lm[dev]'")


def test_extras_are_read_from_the_package(examined: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["torch>=2.11", "numpy>=1; python_version < '3'", "absent>=2; extra == 'tool'", "rich>=1; extra == 'tool'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: asked)
    assert set(doctor._requirements("")) == {"torch"}
    assert doctor._requirements("tool") == {"absent": ">=2", "rich": ">=1"}
    assert doctor._extra("tool") == Finding("absent is missing: pip install 'neox-lm[tool]'")


def test_another_distribution_that_owns_the_module(monkeypatch: pytest.MonkeyPatch, examined: Examine) -> None:
    """The distribution `neox` of the package index is another project's, with a module of the same name."""
    for owners, text, other in (
        (["neox-lm"], "installed by neox-lm", ""),
        ([], "not installed, run from its source", ""),
        (["neox", "neox-lm"], "installed by neox, neox-lm", "neox"),
        (["neox"], "installed by neox", "neox"),
    ):
        monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda owners=owners: {"neox": owners})
        status, lines, rest = examined({"Software": SECTIONS["Software"]})
        assert (status, lines["neox"]) == (0, text), owners
        assert (f"neox: another distribution owns the module neox: pip uninstall {other}," in rest) == bool(other), (
            owners
        )


@pytest.mark.parametrize("found", [None, "0.1"])
def test_a_package_that_neox_needs(examined: Examine, monkeypatch: pytest.MonkeyPatch, found: str | None) -> None:
    needed = doctor._requirements("")["matplotlib"]
    versions(monkeypatch, matplotlib=found)
    status, lines, rest = examined()
    assert status == 1
    assert lines["matplotlib"] == f"{found or 'missing'} (needs {needed})"
    assert rest.startswith(f"Broken\n  matplotlib: pip install 'matplotlib{needed}'\n")
    assert rest.endswith("neox does not work here as it is: see Broken.\n")


def test_a_package_that_cannot_be_imported(examined: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    status, lines, rest = examined()
    assert status == 1
    assert "cannot be imported: ModuleNotFoundError" in lines["safetensors"]
    assert "pip install --force-reinstall 'safetensors>=" in rest


def test_an_old_python(examined: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.8.1")
    status, lines, rest = examined()
    assert status == 1
    assert lines["python"].startswith("3.8.1 (needs >=3.")
    assert "install Python >=3." in rest


def test_run_from_source_without_an_installation(examined: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    for function in ("metadata", "requires"):
        monkeypatch.setattr(importlib.metadata, function, absent)
    status, lines, _ = examined()
    assert status == 0
    assert lines["python"] == "cannot tell: PackageNotFoundError: No package metadata was found for neox-lm"
    assert "model" in lines


# --- traps -----------------------------------------------------------------------------------------------------------


def test_slow_16_bit_products(examined: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = {"fp32": 8e10, "bf16": 2e8, "fp16": 1.6e11}
    monkeypatch.setattr(device, "matmul_flops", lambda device, dtype, seconds: speeds[dtype])
    status, lines, rest = examined({"Processor": SECTIONS["Processor"]})
    assert (status, lines["matmul bf16"]) == (0, "0.2 GFLOP/s")
    assert "matmul bf16: 400.0 times slower than fp32 here; keep to dtype=fp32 on cpu" in rest
    assert "matmul fp16:" not in rest
    monkeypatch.setattr(device, "matmul_flops", lambda device, dtype, seconds: 7.9e14)
    assert examined({"Processor": SECTIONS["Processor"]})[1]["matmul fp16"] == "790 TFLOP/s"


@pytest.mark.parametrize(
    ("asked", "threads", "text", "trap"),
    [
        ("8", 8, "8 on 2 cores, OMP_NUM_THREADS = 8", True),
        ("8", 2, "2 on 2 cores, OMP_NUM_THREADS = 8", True),
        (None, 64, "64 on 2 cores, OMP_NUM_THREADS not set", True),
        ("2", 2, "2 on 2 cores, OMP_NUM_THREADS = 2", False),
        ("2,1", 2, "2 on 2 cores, OMP_NUM_THREADS = 2,1", False),
    ],
)
def test_threads(asked: str | None, threads: int, text: str, trap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_cores", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    if asked is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    found = doctor._threads()
    assert (found.text, found.broken) == (text, False)
    assert found.advice.endswith("export OMP_NUM_THREADS=2") == trap == bool(found.advice)


def test_little_shared_memory_and_little_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(total=64 << 20, free=2**30))
    assert doctor._shared_memory().text == "0.1 GiB"
    assert "docker run --shm-size=1g" in doctor._shared_memory().advice
    assert doctor._free(tmp_path).advice == f"little for checkpoints: give out= on another disk than {tmp_path}"
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(total=2**33, free=2**33))
    assert doctor._shared_memory() == doctor._free(tmp_path) == Finding("8.0 GiB")


def test_a_run_folder_that_cannot_be_written(
    examined: Examine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.undo()  # the disk is really tried
    (tmp_path / "file").write_text("")
    status, lines, rest = examined({"Disk": SECTIONS["Disk"]}, tmp_path / "file" / "run")
    assert status == 1
    assert lines["write and sync"] == f"cannot tell: NotADirectoryError: [Errno 20] Not a directory: '{tmp_path}/file'"
    assert rest.startswith("Broken\n  write and sync: cannot tell")


# --- accelerators ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("devices", "built", "driver", "text", "advice"),
    [
        (0, None, None, "none", ""),
        (0, None, "535.104.05", "none", "this torch is built without CUDA"),
        (0, "12.8", "535.104.05", "none", "torch is built for CUDA 12.8, driver 535.104.05 shows it no device"),
        (2, "12.8", "570.86", "12.8, driver 570.86", ""),
        (2, "12.8", None, "12.8, driver version not known", ""),
    ],
)
def test_cuda(
    devices: int,
    built: str | None,
    driver: str | None,
    text: str,
    advice: str,
    examined: Examine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(machine, "nvidia_driver", lambda: driver)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    card = SimpleNamespace(name="A GPU", total_memory=80 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: card)
    status, lines, rest = examined({"Accelerators": SECTIONS["Accelerators"]})
    assert (status, lines["cuda"]) == (0, text)
    assert advice in rest
    assert bool(advice) == ("Advice" in rest)
    cards = [line for label, line in lines.items() if label.startswith("cuda:")]
    assert cards == ["A GPU, 80.0 GiB, capability 9.0"] * devices
    assert ("matmul bf16" in lines) == bool(devices)


def test_processes_that_cannot_talk(examined: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_gloo_available", lambda: False)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    status, lines, rest = examined({"Several processes": SECTIONS["Several processes"]})
    assert (status, lines) == (0, {"gloo": "none", "nccl": "none"})
    assert "built with gloo" in rest
    assert "built with NCCL" in rest
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 5))
    assert examined({"Several processes": SECTIONS["Several processes"]})[1]["nccl"] == "2.27.5"

"""The C kernels, compiled on first use where there is a compiler, and kept in the cache folder."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from neox.quantization.kernels.layout import CANDIDATES, Packed
from neox.quantization.kinds import KINDS
from neox.system import files, machine

NAMES = ("panels.c", "decoder.c", "panels.h", "functions.h", "vectors.h")
SOURCES = tuple(Path(__file__).with_name(name) for name in NAMES)
FLAGS = ("-O3", "-std=gnu11", "-ffp-contract=off", "-fopenmp", "-fPIC", "-shared")
# The best first. Who has AVX-512 without VNNI is better off with AVX2: such processors slow down under AVX-512.
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni", "-mfma", "-mf16c")
TARGETS = {
    ("AVX-512", "AVX-512 VNNI", "AVX-512 BF16"): (*AVX512, "-mavx512bf16"),
    ("AVX-512", "AVX-512 VNNI"): AVX512,
    ("AVX2", "FMA", "F16C"): ("-mavx2", "-mfma", "-mf16c"),
}
DIGEST = hashlib.sha256().digest_size


class NoKernels(Exception):
    """The reason why the kernels cannot be compiled."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None; without a compiler one line on stderr says so."""
    flags = target()
    if flags is None:
        return None
    try:
        return load(flags)
    except (NoKernels, OSError) as error:
        print(f"neox: {error}; matrix products fall back to plain torch, slower", file=sys.stderr)
        return None


def target() -> tuple[str, ...] | None:
    """The compiler's flags for this processor; None where the kernels do not run."""
    if platform.machine() not in ("x86_64", "AMD64") or os.name != "posix":
        return None
    instructions = set(machine.instruction_sets())
    return next((flags for needed, flags in TARGETS.items() if instructions.issuperset(needed)), None)


def load(flags: tuple[str, ...], folder: Path | None = None) -> ctypes.CDLL:
    """Load the kernels for `flags` from `folder` (default: the cache folder), compiled first where absent.

    Raises NoKernels without a working compiler, OSError where the folder cannot be written.
    """
    compiler = next((program for name in ("cc", "gcc", "clang") if (program := shutil.which(name))), None)
    if compiler is None:
        raise NoKernels("no C compiler was found (cc, gcc or clang)")
    identity = [*(source.read_text() for source in SOURCES), _run([compiler, "--version"]), *FLAGS, *flags]
    name = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:24]
    path = (folder or files.cache_folder()) / f"kernels-{name}.so"
    if not _is_whole(path):
        _compile(compiler, flags, path)
    # torch has loaded an OpenMP runtime by now, and its symbols come first: its threads work here too.
    loaded = ctypes.CDLL(str(path))
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    loaded.neox_scratch.restype = loaded.neox_decoder_scratch.restype = count
    loaded.neox_scratch.argtypes = (ctypes.c_int, count, count)
    loaded.neox_decoder_scratch.argtypes = (pointer, count, count, ctypes.c_int)
    loaded.neox_linear.restype = loaded.neox_decode.restype = None
    loaded.neox_linear.argtypes = (pointer, pointer, pointer, pointer, count, ctypes.c_int)
    loaded.neox_decode.argtypes = (pointer, pointer, pointer, pointer, count, count, pointer, ctypes.c_int)
    loaded.neox_pack.restype = None
    loaded.neox_pack.argtypes = (
        ctypes.c_int,
        *[ctypes.c_void_p] * 3,
        *[ctypes.c_int64] * 2,
        ctypes.c_void_p,
        *[ctypes.c_int] * 2,
    )
    return loaded


def _compile(compiler: str, flags: tuple[str, ...], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # A folder of its own: two processes may be compiling, and each renames a whole file.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder, path.name)
        _run([compiler, *FLAGS, *flags, *(str(path) for path in SOURCES if path.suffix == ".c"), "-o", str(built)])
        # What follows an ELF file's sections is not read by the loader. It tells a damaged file from a whole one,
        # which the loader cannot: it would be killed by reading beyond the end.
        with open(built, "r+b") as file:
            file.write(hashlib.sha256(file.read()).digest())
            file.flush()
            os.fsync(file.fileno())
        os.replace(built, path)


def _is_whole(path: Path) -> bool:
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-DIGEST]).digest() == content[-DIGEST:]


def _run(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "error" in line] or [f"exit status {error.returncode}"]
        raise NoKernels(f"{command[0]} could not compile the kernels: {lines[0]}") from None
    except subprocess.TimeoutExpired:
        raise NoKernels(f"{command[0]} took longer than five minutes over the kernels") from None


class Matrix(ctypes.Structure):
    """A packed weight and its bias as the kernels take them; the caller keeps their memory alive."""

    _fields_ = (
        ("kind", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("weights", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )

    @classmethod
    def of(cls, packed: Packed, bias: Tensor | None) -> "Matrix":
        return cls(
            KINDS.index(packed.kind),
            packed.outputs,
            packed.inputs,
            packed.weights.data_ptr(),
            address(packed.scales),
            address(bias),
        )


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def linear(loaded: ctypes.CDLL, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """y [M, N] for x [M, K]; float32, contiguous and on the CPU, as is the bias."""
    rows, matrix = len(x), Matrix.of(packed, bias)
    y = torch.empty(rows, packed.outputs)
    if y.numel() == 0:
        return y
    scratch = torch.empty(loaded.neox_scratch(matrix.kind, rows, packed.inputs), dtype=torch.uint8)
    loaded.neox_linear(
        ctypes.byref(matrix), x.data_ptr(), y.data_ptr(), scratch.data_ptr(), rows, torch.get_num_threads()
    )
    return y


def pack_rows(loaded: ctypes.CDLL, rows: Tensor, into: Packed) -> None:
    """`layout.pack_rows` for contiguous rows on the CPU; sums of squares are added in another order."""
    shares = torch.tensor(CANDIDATES)
    loaded.neox_pack(
        KINDS.index(into.kind),
        rows.data_ptr(),
        into.weights.data_ptr(),
        None if into.scales is None else into.scales.data_ptr(),
        into.outputs,
        into.inputs,
        shares.data_ptr(),
        len(shares),
        torch.get_num_threads(),
    )

"""Functions of the C kernels against float64, in units of the last place, on each instruction set that runs here.

docs/weights.md has the table of these errors, which `python -m tests.quantization.test_kernel_accuracy` prints.
"""

import ctypes
import math
import shutil
import subprocess
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
import torch

from neox.quantization.kernels import native

pytestmark = pytest.mark.skipif(native.target() is None, reason="a processor that the kernels are not for")
HERE = {
    "AVX-512" if "-mavx512f" in flags else "AVX2": flags
    for needed, flags in native.TARGETS.items()
    if set(needed) <= set(native.machine.instruction_sets())
}
EXP, GELU, GELU_TANH = range(3)
# Where each function errs most, a number for each range of BOUNDS, found by trying every float32 of magnitude 2^-12 on.
WORST = [26.688920974731445, 0.0591854564845562, 1.1256029605865479, -3.835087299346924, -9.967575073242188]
WORST += [-0.7100847363471985, 1.1299810409545898, -3.5615477561950684, -9.602851867675781]
SOURCE = """
#include "functions.h"
void each(int what, const float *in, float *out, int64_t count) {
    for (int64_t k = 0; k < count; k += LANES) {
        floats v = load_some(in + k, count - k);
        store_some(out + k, what ? activated(what, v) : exponential(v), count - k);
    }
}
void widen(int fp16, const uint16_t *in, float *out, int64_t count) {
    for (int64_t k = 0; k < count; k += LANES) store(out + k, fp16 ? from_fp16(in + k) : from_bf16(in + k));
}
void halve(const float *in, float *out, int64_t count) {
    for (int64_t k = 0; k < count; k++) out[k] = as_float((int32_t)((uint32_t)to_bf16(in[k]) << 16));
}
void norm(const float *x, const float *weight, const float *bias, float eps, int64_t width, float *out) {
    normalize(x, weight, bias, eps, width, out);
}
float soft(float *scores, int64_t count, int64_t from, int64_t to) { return exponentials(scores, count, from, to); }
"""


@cache
def library(name: str) -> ctypes.CDLL:
    folder = Path(mkdtemp(prefix="neox-functions-"))
    (folder / "functions.c").write_text(SOURCE)
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))))
    flags = [*native.FLAGS, *HERE[name], f"-I{native.SOURCES[0].parent}"]
    built = folder / "functions.so"
    subprocess.run([compiler, *flags, str(folder / "functions.c"), "-o", str(built)], check=True)
    loaded = ctypes.CDLL(str(built))
    shutil.rmtree(folder)
    loaded.soft.restype = ctypes.c_float
    loaded.norm.argtypes = (*[ctypes.c_void_p] * 3, ctypes.c_float, ctypes.c_int64, ctypes.c_void_p)
    loaded.soft.argtypes = (ctypes.c_void_p, *[ctypes.c_int64] * 3)
    return loaded


def pointer(values: np.ndarray) -> ctypes.c_void_p:
    return values.ctypes.data_as(ctypes.c_void_p)


def each(name: str, what: int, x: np.ndarray) -> np.ndarray:
    x, out = np.ascontiguousarray(x, np.float32), np.empty(len(x), np.float32)
    library(name).each(what, pointer(x), pointer(out), ctypes.c_int64(len(x)))
    return out


def ulps(got: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Errors in units of the last place of the exact value, as a float32."""
    return np.abs(got.astype(np.float64) - exact) / np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)


def every(low: float, high: float, count: int = 200_001) -> np.ndarray:
    """Numbers of a range, evenly, around each power of two, and the worst of all float32s; with zero if inside."""
    even = np.linspace(low, high, count)
    powers = np.ldexp(1.0, np.arange(-40, 7))[:, None] * (1 + np.linspace(-1e-3, 1e-3, 21))
    near = np.concatenate([powers.ravel(), -powers.ravel(), WORST, [0.0]])
    return np.concatenate([even, near[(near >= low) & (near <= high)]]).astype(np.float32)


def gelu(x: np.ndarray) -> np.ndarray:
    """x Phi(x) in float64, by erfc: no digit is lost in the lower tail."""
    x = x.astype(np.float64)
    return x * 0.5 * torch.special.erfc(torch.from_numpy(-x / math.sqrt(2))).numpy()


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    """x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) in float64, as a logistic function."""
    x = x.astype(np.float64)
    with np.errstate(over="ignore"):
        return x / (1 + np.exp(-2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


FUNCTIONS = {
    "e^x": (EXP, lambda x: np.exp(x.astype(np.float64))),
    "GELU": (GELU, gelu),
    "GELU, tanh": (GELU_TANH, gelu_tanh),
}
# (function, range): worst error in units of the last place, rounded up from what the code reaches. In GELU's lower tail
# the exponent's rounding shows, in values below 1e-4.
BOUNDS = {
    ("e^x", -1.0, 1.0): 0.9,
    ("e^x", -10.0, 10.0): 0.9,
    ("e^x", -87.0, 88.0): 0.94,
    ("GELU", -1.0, 1.0): 7.1,
    ("GELU", 1.0, 100.0): 2.1,
    ("GELU", -4.0, -1.0): 23,
    ("GELU", -10.0, -4.0): 120,
    ("GELU, tanh", -1.0, 1.0): 2.6,
    ("GELU, tanh", 1.0, 100.0): 1.9,
    ("GELU, tanh", -4.0, -1.0): 21,
    ("GELU, tanh", -10.0, -4.0): 180,
}


def worst(name: str, function: str, low: float, high: float) -> float:
    what, exact = FUNCTIONS[function]
    x = every(low, high)
    expected = exact(x)
    normal = np.abs(expected) >= np.finfo(np.float32).tiny
    return float(ulps(each(name, what, x), expected)[normal].max())


@pytest.mark.parametrize("name", HERE)
def test_exponential_and_gelu_err_by_units_of_the_last_place(name: str) -> None:
    found = {key: worst(name, *key) for key in BOUNDS}
    assert {key: value for key, value in found.items() if value > BOUNDS[key]} == {}
    x = every(-100.0, 100.0)
    for what, exact in (FUNCTIONS["GELU"], FUNCTIONS["GELU, tanh"]):  # over the whole range, relative to |x|
        assert (np.abs(each(name, what, x) - exact(x)) <= 6 * 2.0**-24 * np.abs(x)).all()
    # What is cut off is below every float32 that counts in a sum with 1, or above the largest power that fits.
    assert each(name, EXP, np.float32([-1e9, -np.inf])).max() <= 2e-38
    assert np.isfinite(each(name, EXP, np.float32([1e9, np.inf]))).all()


@pytest.mark.parametrize("name", HERE)
def test_widening_and_rounding_of_16_bits_are_exact(name: str) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    for fp16, dtype in ((1, torch.float16), (0, torch.bfloat16)):
        out = np.empty(len(bits), np.float32)
        library(name).widen(fp16, pointer(bits), pointer(out), ctypes.c_int64(len(bits)))
        expected = torch.from_numpy(bits.view(np.int16)).view(dtype).float().numpy()
        np.testing.assert_array_equal(out, expected)  # nan is equal to nan
    numbers = np.random.default_rng(0).integers(0, 1 << 32, 300_000, dtype=np.uint32)
    numbers[: 1 << 16] = np.arange(1 << 16) << 16 | 0x8000  # half-way between two
    x, out = numbers.view(np.float32), np.empty(len(numbers), np.float32)
    library(name).halve(pointer(x), pointer(out), ctypes.c_int64(len(x)))
    np.testing.assert_array_equal(out, torch.from_numpy(x).bfloat16().float().numpy())


def softmax_error(name: str) -> float:
    """Worst error of a sum or an exponential, in units of 2^-24 of its value, beyond that of the differences."""
    found = 0.0
    generator = np.random.default_rng(1)
    for positions in (1, 15, 16, 17, 300, 2048):
        for std in (0.1, 3.0, 30.0):
            start = int(generator.integers(0, positions)) // 2
            whole = -(-positions // 16) * 16
            scores = np.full(whole, -np.inf, np.float32)
            scores[start:positions] = generator.normal(0, std, positions - start)
            off = scores[start:positions].astype(np.float64) - scores.max()
            exact = np.exp(off)
            total = library(name).soft(pointer(scores), whole, start, positions - 1)
            assert not scores[:start].any()
            assert not scores[positions:].any()
            error = np.abs(scores[start:positions] - exact)
            counts = exact > 1e-30
            found = max(found, float((error / exact / (1 + np.abs(off)))[counts].max()) * 2**24)
            found = max(found, abs(total - exact.sum()) / exact.sum() * 2**24)
    return found


def norm_error(name: str) -> float:
    """Worst error of layer norm, in units of 2^-24 of |x - mean| / deviation |weight| + |mean| / deviation + |bias|."""
    found = 0.0
    generator = np.random.default_rng(2)
    for width in (1, 5, 16, 36, 768, 6144):
        for mean, std in ((0.0, 1.0), (3.0, 1.0), (-0.5, 0.01)):
            x = generator.normal(mean, std, width).astype(np.float32)
            weight, bias = (generator.normal(1, 1, width).astype(np.float32) for _ in range(2))
            out = np.empty(width, np.float32)
            library(name).norm(pointer(x), pointer(weight), pointer(bias), 1e-5, width, pointer(out))
            wide = [one.astype(np.float64) for one in (x, weight, bias)]
            deviation = math.sqrt(wide[0].var() + float(np.float32(1e-5)))
            normal = (wide[0] - wide[0].mean()) / deviation
            scale = (np.abs(normal) + np.abs(wide[0]).mean() / deviation) * np.abs(wide[1]) + np.abs(wide[2])
            found = max(found, float((np.abs(out - (normal * wide[1] + wide[2])) / scale).max()) * 2**24)
    return found


@pytest.mark.parametrize("name", HERE)
def test_softmax_and_layer_norm_err_by_a_few_roundings(name: str) -> None:
    assert softmax_error(name) <= 1.5
    assert norm_error(name) <= 2.5


if __name__ == "__main__":
    for key in BOUNDS:
        print(key, {name: round(worst(name, *key), 2) for name in HERE})
    for title, error in {"softmax": softmax_error, "layer norm": norm_error}.items():
        print(title, {name: round(float(error(name)), 2) for name in HERE})

"""Products with stored weights, against float64 products of what is stored; compiled kernels on both instruction sets.

Bounds are those of the arithmetic: n additions of float32 err by at most n 2^-24 of the sum of magnitudes.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from neox.quantization import kernels
from neox.quantization.kernels import layout, native

ROOT = Path(__file__).resolve().parents[2]
HERE = [flags for wanted, flags in native.TARGETS.items() if set(wanted) <= set(native.machine.instruction_sets())]
compiled_only = pytest.mark.skipif(native.target() is None, reason="a processor that the kernels are not for")


def product(packed: kernels.Packed, x: Tensor, bias: Tensor | None = None, flags: tuple[str, ...] = ()) -> Tensor:
    """By the compiled kernels, for the instruction set of `flags` (this processor's best)."""
    return native.linear(native.load(flags or HERE[0]), x, packed, bias)


def random(*shape: int, seed: int = 0, std: float = 1.0) -> Tensor:
    return torch.empty(shape).normal_(std=std, generator=torch.Generator().manual_seed(seed))


def assert_close(y: Tensor, packed: kernels.Packed, x: Tensor, bias: Tensor) -> None:
    """y against the float64 product of the stored weight with x, as its kind sees it."""
    if packed.kind in kernels.FLOATS:
        roundings = min(packed.inputs, 256) + packed.inputs // 256 + 2
    else:  # exact inside a group; scales are rounded on both sides
        roundings = packed.inputs // 128 + 6
    seen = layout.round_activations(x, packed.kind)
    weight = kernels.unpack(packed)
    exact = torch.nn.functional.linear(seen.double(), weight.double(), bias.double())
    magnitudes = torch.nn.functional.linear(seen.double().abs(), weight.double().abs(), bias.double().abs())
    assert ((y - exact).abs() <= roundings * 2**-24 * magnitudes).all()


SHAPES = st.tuples(st.integers(1, 30), st.integers(1, 90), st.integers(1, 600))


@compiled_only
@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, kind=st.sampled_from(kernels.KINDS), seed=st.integers(0, 99), flags=st.sampled_from(HERE or [()]))
def test_the_product_is_that_of_the_stored_weight(shape, kind, seed, flags):
    rows, outputs, inputs = shape
    x, weight, bias = random(rows, inputs, seed=seed), random(outputs, inputs, seed=seed + 1), random(outputs)
    x[0, : inputs // 2] = 0.0
    weight[0] = 0.0
    packed = kernels.pack(weight, kind)
    y = product(packed, x, bias, flags)
    assert_close(y, packed, x, bias)
    assert torch.equal(product(packed, x, None, flags) + bias, y) or kind in ("int8",)  # int8 adds it in one rounding


@compiled_only
@settings(max_examples=40, deadline=None)
@given(shape=SHAPES, kind=st.sampled_from(kernels.KINDS), seed=st.integers(0, 99), flags=st.sampled_from(HERE or [()]))
def test_compiled_packing_stores_what_plain_torch_does(shape, kind, seed, flags):
    _, outputs, inputs = shape
    weight = random(outputs, inputs, seed=seed, std=10.0 ** (seed % 7 - 5))
    weight[0, : inputs // 2] = 0.0
    weight[outputs // 2] = 0.0
    plain, packed = (layout.allocate(kind, outputs, inputs) for _ in range(2))
    layout.pack_rows(weight, plain)
    native.pack_rows(native.load(flags), weight, packed)
    if kind == "int4":  # of two scales that err alike, either may be taken
        differ = (plain.scales != packed.scales).sum()
        assert differ <= 1 + plain.scales.numel() // 1000
        errors = [(kernels.unpack(one) - weight).norm() for one in (plain, packed)]
        assert abs(errors[0] - errors[1]) <= 1e-5 * errors[0]
    if kind != "int4" or not differ:
        assert torch.equal(plain.weights, packed.weights)
        assert plain.scales is None or torch.equal(plain.scales, packed.scales)


@settings(max_examples=25, deadline=None)
@given(shape=SHAPES, kind=st.sampled_from(kernels.KINDS), seed=st.integers(0, 99))
def test_plain_torch_gives_the_same(shape, kind, seed):
    rows, outputs, inputs = shape
    x, bias = random(rows, inputs, seed=seed), random(outputs)
    packed = kernels.pack(random(outputs, inputs, seed=seed + 1), kind)
    plain = kernels.plain_linear(x, packed, bias)
    weight, seen = kernels.unpack(packed), layout.round_activations(x, kind)
    exact = torch.nn.functional.linear(seen.double(), weight.double(), bias.double())
    magnitudes = torch.nn.functional.linear(seen.double().abs(), weight.double().abs(), bias.double().abs())
    assert ((plain - exact).abs() <= (inputs + 2) * 2**-24 * magnitudes).all()


@pytest.mark.parametrize(("kind", "most"), [("fp32", 0.0), ("fp16", 2**-11), ("bf16", 2**-8), ("w16a16", 2**-8)])
def test_a_float_is_rounded_to_the_nearest(kind, most):
    weight = random(70, 300)
    error = (kernels.unpack(kernels.pack(weight, kind)) - weight).abs()
    assert (error <= most * weight.abs() + 2**-25).all()  # float16's smallest step is 2^-24


def test_an_integer_is_within_half_a_step():
    weight = random(70, 300)
    error = (kernels.unpack(kernels.pack(weight, "int8")) - weight).abs()
    assert (error <= weight.abs().amax(1, keepdim=True) / 127 * 0.5001).all()


def test_four_bits_err_less_than_the_plain_rule():
    weight = random(70, 384)
    groups = weight.unflatten(1, (3, 128))
    step = groups.abs().amax(-1, keepdim=True) / 7
    plain = ((groups / step).round() * step).flatten(1) - weight
    error = kernels.unpack(kernels.pack(weight, "int4")) - weight
    assert error.norm() < 0.9 * plain.norm()
    assert (error.abs().unflatten(1, (3, 128)) <= 2 * step).all()


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_weights_of_that_type_are_kept_bit_for_bit(kind):
    native_weight = random(50, 77).to(kernels.FLOATS[kind])
    packed = kernels.pack(native_weight, kind)
    assert torch.equal(kernels.unpack(packed).to(kernels.FLOATS[kind]), native_weight)
    assert packed.weights.nbytes == 64 * (77 if kind == "fp16" else 78) * 2  # rows in panels of 16, bf16 in pairs


@compiled_only
@pytest.mark.parametrize("kind", kernels.KINDS)
def test_a_row_depends_on_no_other_row_nor_on_threads(kind):
    x, packed = random(70, 520), kernels.pack(random(200, 520, seed=1), kind)
    bias = random(200, seed=2)
    alone = torch.cat([product(packed, x[i : i + 1], bias) for i in range(70)])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for rows in range(1, 71) if threads == 1 else (1, 9, 70):
                assert torch.equal(product(packed, x[:rows].contiguous(), bias), alone[:rows]), (rows, threads)
                assert torch.equal(product(packed, x[70 - rows :].contiguous(), bias), alone[70 - rows :])
    finally:
        torch.set_num_threads(before)


@compiled_only
@pytest.mark.skipif(len(HERE) < 2, reason="one instruction set only")
@pytest.mark.parametrize("kind", kernels.KINDS)
def test_all_instruction_sets_give_the_same_bits(kind):
    x, packed = random(15, 701), kernels.pack(random(90, 701, seed=1), kind)
    first, *others = (product(packed, x, random(90), flags) for flags in HERE)
    assert all(torch.equal(first, other) for other in others)


@compiled_only
@pytest.mark.parametrize("kind", kernels.KINDS)
def test_unaligned_memory(kind):
    x, packed, bias = random(5, 300), kernels.pack(random(40, 300, seed=1), kind), random(40)
    aligned = product(packed, x, bias)

    def shifted(tensor: Tensor) -> Tensor:
        moved = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)
        return moved.copy_(tensor)

    scales = None if packed.scales is None else shifted(packed.scales)
    moved = packed._replace(weights=shifted(packed.weights), scales=scales)
    assert torch.equal(product(moved, shifted(x), shifted(bias)), aligned)


@pytest.mark.parametrize("kind", kernels.KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite(kind, bad):
    weight = random(20, 30)
    weight[3, 4] = bad
    with pytest.raises(ValueError, match=r"layers\.1\.weight holds values that are not finite"):
        kernels.pack(weight, kind, "layers.1.weight")
    x, packed = random(4, 30), kernels.pack(random(20, 30), kind)
    clean = kernels.linear(x, packed)
    x[2, 5] = bad
    y = kernels.linear(x, packed)
    assert not y[2].isfinite().any()  # it does not turn into a number
    assert torch.equal(y[[0, 1, 3]], clean[[0, 1, 3]]) or not kernels.compiled()


def test_float16_has_an_end():
    with pytest.raises(ValueError, match=r"w holds values beyond fp16's range: use bf16 or fp32"):
        kernels.pack(torch.full((2, 2), 7e4), "fp16", "w")


def test_types_and_shapes_of_linear():
    packed = kernels.pack(random(24, 40), "bf16")
    x = random(2, 3, 40)
    y = kernels.linear(x, packed)
    assert y.shape == (2, 3, 24)
    half = kernels.linear(x.bfloat16(), packed)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, kernels.linear(x.bfloat16().float(), packed).bfloat16())
    assert torch.equal(kernels.linear(x.transpose(0, 1), packed), y.transpose(0, 1))
    assert kernels.linear(x[:0], packed).shape == (0, 3, 24)


@pytest.fixture
def fresh_library():
    native.library.cache_clear()
    yield
    native.library.cache_clear()


@compiled_only
def test_without_a_compiler_plain_torch_says_so_once(fresh_library, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    x, packed = random(4, 30), kernels.pack(random(20, 30), "int8")
    for _ in range(2):
        assert torch.equal(kernels.linear(x, packed), kernels.plain_linear(x, packed))
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "neox: no C compiler was found (cc, gcc or clang); matrix products fall back to plain torch, slower"
    ]


@compiled_only
def test_a_compiler_that_fails_is_named(fresh_library, monkeypatch, capsys, tmp_path):
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\n[ $1 = --version ] && exit 0\necho 'x.c:1: error: no such thing' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not kernels.compiled()
    (line,) = capsys.readouterr().err.splitlines()
    assert "could not compile the kernels: x.c:1: error: no such thing" in line
    assert list((tmp_path / "cache" / "neox").iterdir()) == []


PRODUCT = """
import hashlib, torch
from neox.quantization import kernels
packed = kernels.pack(torch.arange(4000.0).view(40, 100).sin(), "int8")
assert kernels.compiled()
print(hashlib.sha256(kernels.linear(torch.arange(300.0).view(3, 100).cos(), packed).numpy().tobytes()).hexdigest())
"""


@compiled_only
@pytest.mark.slow
def test_two_processes_compile_at_once_and_a_damaged_file_is_made_again(tmp_path):
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PRODUCT]
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = {process.communicate(timeout=300)[0] for process in both}
    assert len(said) == 1
    (file,) = (tmp_path / "neox").iterdir()  # and no temporary one beside it
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:]):
        file.write_bytes(damaged)
        assert not native._is_whole(file)
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
    assert {again.stdout} == said
    assert native._is_whole(file)

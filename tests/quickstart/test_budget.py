"""The machine: the arithmetic from its published statement, and measurements that are about right."""

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neox.quickstart.budget import HOUR, NIGHT, SIZES, Machine, measure_machine

machines = st.builds(
    Machine,
    cores=st.integers(1, 512),
    ram_bytes=st.integers(2**24, 2**43),
    matmul_flops=st.floats(1e8, 1e15),
    read_bytes=st.floats(1e8, 1e13),
)

# (layers, hidden, padded vocabulary) of the published models
SHAPES = {
    "pythia-14m": (6, 128, 50304),
    "pythia-31m": (6, 256, 50304),
    "pythia-70m": (6, 512, 50304),
    "pythia-160m": (12, 768, 50304),
    "pythia-410m": (24, 1024, 50304),
    "pythia-1b": (16, 2048, 50304),
    "pythia-1.4b": (24, 2048, 50304),
    "pythia-2.8b": (32, 2560, 50304),
    "pythia-6.9b": (32, 4096, 50432),
    "pythia-12b": (36, 5120, 50688),
    "neox-20b": (44, 6144, 50432),
}


def test_sizes_are_the_closed_form():
    # Per block 12 h^2 weights, 9 h biases and two norms of 2 h; a last norm; an embedding and a head.
    assert {name: n * (12 * h * h + 13 * h) + 2 * h + 2 * v * h for name, (n, h, v) in SHAPES.items()} == SIZES


@given(machines, st.floats(60, 1e7))
def test_trainable_size_is_bound_by_time_or_memory(machine, seconds):
    n = machine.trainable(seconds)
    flops = 6 * n * (20 * n)
    by_time = flops / (0.5 * machine.matmul_flops)
    by_memory = 16 * n / (0.8 * machine.ram_bytes)
    assert by_time <= seconds * (1 + 1e-9)
    assert by_memory <= 1 + 1e-9
    one_more = 120 * (n + 1) ** 2 / (0.5 * machine.matmul_flops), 16 * (n + 1) / (0.8 * machine.ram_bytes)
    assert one_more[0] > seconds * (1 - 1e-9) or one_more[1] > 1 - 1e-9
    assert machine.training_seconds(n) == pytest.approx(by_time)


def test_machine_budget_worked_example():
    # 100 GFLOP/s, 12 GB/s, 16 GiB: sqrt(5e10 * 3600 / 120) = 1.22 M parameters in an hour.
    machine = Machine(2, 16 * 2**30, 1e11, 12e9)
    assert machine.trainable(HOUR) == int(math.sqrt(1.5e12)) == 1_224_744
    assert machine.largest(4) == "pythia-2.8b"
    assert machine.largest(1) == "pythia-12b"
    assert machine.tokens_per_second(3_000_000_000, 4) == 1.0
    lines = machine.lines()
    assert lines[0] == "This machine: 2 cores, 16.0 GiB of memory, 100 GFLOP/s (fp32 matmul), 12.0 GB/s read"
    assert "1.22M parameters in an hour, 3.46M in a night" in lines[1]
    assert "pythia-14m takes 5.5 days" in lines[1]  # 120 * 14.07e6^2 / 5e10 s
    assert "pythia-2.8b in fp32 (at most 1.1 tokens/s), pythia-12b in int8 (at most 1 tokens/s)" in lines[2]


def test_a_strong_and_a_tiny_machine():
    strong = Machine(64, 2**41, 1.5e15, 3e12).lines()
    assert "pythia-410m takes" in strong[1]
    assert strong[2].count("neox-20b") == 2
    assert 120 * SIZES["pythia-410m"] ** 2 / 7.5e14 < NIGHT < 120 * SIZES["pythia-1b"] ** 2 / 7.5e14
    assert "too little memory" in Machine(1, 2**23, 1e9, 1e9).lines()[2]


@given(machines)
def test_lines_are_short_and_plain(machine):
    lines = machine.lines()
    assert len(lines) == 3
    for line in lines:
        assert len(line) < 170
        assert not {"\n", "e+", "e-0", "nan", "inf"} & {
            part for part in ("\n", "e+", "e-0", "nan", "inf") if part in line
        }


def test_measurement_is_about_right_and_on_time():
    import numpy as np
    import torch

    torch.mm(torch.ones(64, 64), torch.ones(64, 64))
    start = time.perf_counter()
    machine = measure_machine(0.4)
    assert time.perf_counter() - start < 10
    a = np.ones((512, 512), np.float32)
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    peer = 2 * 512**3 / best
    # Another library, maybe on another number of threads, on a machine that others use: an order of magnitude.
    assert peer / 20 < machine.matmul_flops < peer * 20
    assert 1e8 < machine.read_bytes < 1e13
    assert machine.ram_bytes > 2**28
    assert machine.cores >= 1

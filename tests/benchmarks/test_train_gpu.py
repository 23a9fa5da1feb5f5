"""The benchmarks of one GPU run, at a size for any machine, and count as they say."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def benchmark(folder, *arguments, script="train_gpu.py"):
    environment = dict(os.environ, OUT=str(folder), OMP_NUM_THREADS="1")
    command = [sys.executable, str(BENCHMARKS / script), "device=cpu", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("variants", "turns"),
    [
        (["ours guard=true"], 1),
        (["ours", "peer params=bf16 micro_batch_size=1", "peer"], 2),
    ],
)
def test_it_runs_and_counts(tmp_path, variants, turns):
    done = benchmark(tmp_path, "sizes=tiny", f"turns={turns}", "steps=1", "peak=0.1", *variants)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "train_gpu.jsonl").read_text().splitlines()]
    assert [row["variant"] for row in rows] == variants
    L, C, T, V = 2, 64, 32, 256
    blocks = L * (12 * C * C + 13 * C) + 2 * C
    for row in rows:
        assert row["parameters"] == blocks + 2 * V * C
        assert row["turns"] == turns
        flops = 6 * (blocks + V * C) + 12 * L * C * T
        assert row["tflops"] * 1e12 == pytest.approx(row["tokens_per_second"] * flops)
        assert row["mfu"] == pytest.approx(row["tflops"] / 0.1)
        # Of T keys a token sees (T + 1) / 2 on average.
        causal = flops - 12 * L * C * T + 6 * L * C * (T + 1)
        assert row["mfu_causal"] / row["mfu"] == pytest.approx(causal / flops)
        start = f"| tiny | {row['variant']} | {row['micro_batch_size']} | {row['tokens_per_second']:,.0f} |"
        assert start in done.stdout


def test_an_option_that_is_none_is_refused(tmp_path):
    assert "train.compile: must be" in benchmark(tmp_path, "sizes=tiny", "ours train.compile=maybe").stderr
    assert "a variant is" in benchmark(tmp_path, "sizes=tiny", "theirs a=b").stderr


def test_what_is_late_is_left_out_and_said(tmp_path):
    done = benchmark(tmp_path, "sizes=tiny", "limit=0", "ours")
    assert done.returncode == 0, done.stderr
    assert "| tiny | ours | 2 | not measured in time |" in done.stdout


def test_attention_has_a_row_for_each_head_dimension_and_padding(tmp_path):
    done = benchmark(tmp_path, script="attention_gpu.py")
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if re.match(r"\| \d", line)]
    padded = [(64, 64), (80, 80), (80, 96), (80, 128), (96, 96), (96, 128), (128, 128), (256, 256)]
    assert [(int(row[0][2:]), int(row[1])) for row in rows] == padded
    for row in rows:
        assert row[3] == "none", "there is no cuDNN on a CPU"
        assert float(row[4]) > 0

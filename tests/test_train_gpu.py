"""The benchmark of training on one GPU runs, at a size for any machine, and counts as it says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "train_gpu.py"


def benchmark(folder, *arguments):
    environment = dict(os.environ, OUT=str(folder), OMP_NUM_THREADS="1")
    command = [sys.executable, str(SCRIPT), "device=cpu", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_it_runs_and_counts(tmp_path):
    variants = ("ours guard=true", "peer params=bf16 micro_batch_size=1", "ours train.compile=maybe")
    assert "train.compile: must be" in benchmark(tmp_path, "sizes=tiny", *variants).stderr
    done = benchmark(tmp_path, "sizes=attention,tiny", "turns=2", "steps=1", "peak=0.1", *variants[:2])
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "train_gpu.jsonl").read_text().splitlines()]
    rows = [line for line in lines if "variant" in line]
    assert {line["head_dim"] for line in lines if "head_dim" in line} == {64, 80, 96, 128, 256}
    assert [row["variant"] for row in rows] == list(variants[:2])
    L, C, T, V = 2, 64, 32, 256
    blocks = L * (12 * C * C + 13 * C) + 2 * C
    for row in rows:
        assert row["parameters"] == blocks + 2 * V * C
        assert row["turns"] == 2
        flops = 6 * (blocks + V * C) + 12 * L * C * T
        assert row["tflops"] * 1e12 == pytest.approx(row["tokens_per_second"] * flops)
        assert row["mfu"] == pytest.approx(row["tflops"] / 0.1)
        # Of T keys a token sees (T + 1) / 2 on average.
        causal = flops - 12 * L * C * T + 6 * L * C * (T + 1)
        assert row["mfu_causal"] / row["mfu"] == pytest.approx(causal / flops)
        start = f"| tiny | {row['variant']} | {row['micro_batch_size']} | {row['tokens_per_second']:,.0f} |"
        assert start in done.stdout


def test_what_is_late_is_left_out_and_said(tmp_path):
    done = benchmark(tmp_path, "sizes=tiny", "limit=0", "ours")
    assert done.returncode == 0, done.stderr
    assert "| tiny | ours | 2 | not measured in time |" in done.stdout

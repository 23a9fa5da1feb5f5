"""The benchmark of generation on one GPU runs, at a size for any machine, and counts as it says."""

import importlib.util
import json

import pytest

from tests.benchmarks.test_train_gpu import BENCHMARKS, benchmark

pytestmark = pytest.mark.slow

SETTINGS = {"device": "cpu", "tokens": 4}


def weights(kind: str) -> int:
    """Bytes of what a token reads of the tiny shape."""
    L, C, V = 2, 64, 256
    matrices, rows = L * 12 * C * C + V * C, L * 9 * C + V
    others = L * 13 * C + 2 * C
    # A float32 scale and a zero, an int8, a row; bfloat16 norms and biases.
    sizes = {"fp32": 4 * (matrices + others), "fp16": 2 * (matrices + others), "int8": matrices + 5 * rows + 2 * others}
    return sizes[kind]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("decode_gpu", BENCHMARKS / "decode_gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_measurement_and_its_row(script, capsys):
    job = script.job_of("tiny", "ours fp32", SETTINGS)
    row = script.row_of(job, [script.measure(job)], "")
    assert row["bytes"] == weights("fp32")
    assert row["roofline"] == pytest.approx(row["read"] / row["bytes"])
    assert row["share"] == pytest.approx(row["decode1"] / row["roofline"])
    script.show([row])
    assert f"| tiny | ours fp32 | {row['decode1']:,.1f} | {row['roofline']:,.1f} |" in capsys.readouterr().out


@pytest.mark.parametrize("variant", ["theirs bf16", "peer int4", "ours bf17", "ours bf16 static"])
def test_what_is_no_variant_is_refused(script, variant):
    with pytest.raises(SystemExit, match="a variant is"):
        script.job_of("tiny", variant, SETTINGS)


def test_all_in_turn(tmp_path):
    variants = ["ours fp32 static=false", "ours int8", "peer fp32", "peer fp16"]
    done = benchmark(tmp_path, "sizes=tiny", "turns=1", "tokens=4", *variants, script="decode_gpu.py")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "decode_gpu.jsonl").read_text().splitlines()]
    assert [row["variant"] for row in rows] == variants
    assert [row["bytes"] for row in rows] == [weights(row["variant"].split()[1]) for row in rows]
    for row in rows:
        assert f"| tiny | {row['variant']} | {row['decode1']:,.1f} | {row['roofline']:,.1f} |" in done.stdout

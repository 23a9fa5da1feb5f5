"""Reading runs: whatever state they are in, in comparable units; smoothing and thinning that lose no spike."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neox.analysis.runs import decimate, differences, read_runs, short_names, smooth, summary
from tests.analysis.helpers import rows, write_run


def test_curves_are_the_rows(tmp_path):
    content = list(rows(40, every=10, valid_every=15))
    (run,) = read_runs([write_run(tmp_path / "a", content, "steps=40")])
    train = [row for row in content if "loss" in row]
    for key in ("loss", "grad_norm", "lr", "tokens_per_second"):
        curve = run.curves[key]
        assert curve.step.tolist() == [1, 10, 20, 30, 40]
        assert curve.y.tolist() == [row[key] for row in train]
        assert curve.tokens.tolist() == [row["tokens"] for row in train]
        assert curve.hours.tolist() == pytest.approx([step * 0.5 / 3600 for step in curve.step])
    held = run.curves["valid_loss"]
    assert held.step.tolist() == [15, 30]  # between two rows, and on one
    assert held.tokens.tolist() == [15 * 128, 30 * 128]
    assert held.hours.tolist() == pytest.approx([15 * 0.5 / 3600, 30 * 0.5 / 3600])
    assert run.facts["best_step"] == 30
    assert (run.facts["step"], run.facts["steps"], run.facts["tokens"]) == (40, 40, 5120)
    assert summary(run).startswith("step 40 of 40, loss 2.2940, held-out 2.3903 (best 2.3903 at step 30), 256 tok/s")


def test_reading_a_run_that_is_still_writing(tmp_path):
    """The last line is half written; an evaluation has gone beyond the last logged step; there is no config yet."""
    folder = write_run(tmp_path / "a", [*rows(20, every=10), {"step": 25, "valid_loss": 2.5}], tail=b'{"step": 30, "lo')
    (folder / "config.toml").unlink()
    (run,) = read_runs([folder])
    assert run.curves["loss"].step.tolist() == [1, 10, 20]
    assert run.curves["valid_loss"].tokens.tolist() == [25 * 128]
    assert run.curves["valid_loss"].hours.tolist() == pytest.approx([25 * 0.5 / 3600])
    assert "steps" not in run.facts
    assert differences([run]) == ([], [])
    assert summary(run).startswith("step 20, loss")


def test_a_run_cut_at_any_byte_has_the_rows_before_it(tmp_path):
    folder = write_run(tmp_path / "a", rows(3))
    whole = (folder / "metrics.jsonl").read_bytes()
    for end in range(whole.index(b"\n"), len(whole) + 1):
        (folder / "metrics.jsonl").write_bytes(whole[:end])
        (run,) = read_runs([folder])
        assert run.curves["loss"].step.tolist() == list(range(1, 1 + max(1, whole[: end + 1].count(b"\n")))), end


def test_curves_with_missing_and_non_finite_values(tmp_path):
    content = list(rows(5))
    content[1]["loss"] = math.nan
    content[2]["loss"] = math.inf
    content[3]["grad_norm"] = None
    del content[4]["lr"], content[4]["seconds"], content[4]["tokens"]
    content += [{"step": "x", "loss": 1.0}, {"loss": 1.0}, {"step": 3, "valid_loss": math.nan}]
    (run,) = read_runs([write_run(tmp_path / "a", content)])
    assert np.isnan(run.curves["loss"].y[1])
    assert run.curves["loss"].y[2] == math.inf
    assert np.isnan(run.curves["grad_norm"].y[3])
    assert run.curves["lr"].step.tolist() == [1, 2, 3, 4]
    assert run.curves["loss"].tokens.tolist() == [128, 256, 384, 512, 640]
    assert run.facts["not_finite"] == 3
    assert "best_valid_loss" not in run.facts
    assert "held-out nan" in summary(run)
    assert summary(run).endswith("3 losses not finite")


def test_rows_written_twice_count_once(tmp_path):
    content = list(rows(3))
    (run,) = read_runs([write_run(tmp_path / "a", [*content, {**content[1], "loss": 7.0}])])
    assert run.curves["loss"].step.tolist() == [1, 2, 3]
    assert run.curves["loss"].y[1] == 7.0


def test_read_runs_errors_are_one_line(tmp_path):
    good = write_run(tmp_path / "good", rows(2))
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("absent", "no such run directory"),
        ("empty", r"no run that has begun \(no metrics.jsonl\)"),
        ("begun", "metrics.jsonl: holds no step yet"),
        ("config", r"config.toml:2: not valid TOML"),
    ):
        if name in ("begun", "config"):
            write_run(tmp_path / name, [] if name == "begun" else rows(2))
        if name == "config":
            (tmp_path / name / "config.toml").write_text("[train]\nsteps = \n")
        with pytest.raises(ValueError, match=message) as caught:
            read_runs([good, tmp_path / name])
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_run_names_are_the_shortest_unique_suffixes():
    paths = [Path("/r/a/run"), Path("/r/b/run"), Path("/r/b/other"), Path("/r/a/run")]
    assert short_names(paths) == ["a/run", "b/run", "other", "a/run (2)"]


def test_config_differences(tmp_path):
    runs = read_runs(
        [
            write_run(tmp_path / "a", rows(2), "optim.lr=0.01", "data.train=x"),
            write_run(tmp_path / "b", rows(2), "optim.lr=0.01", "optim.name=muon", 'data.train=["x", "y"]'),
        ]
    )
    assert differences(runs) == (
        ["a", "b"],
        [("data.train", ['["x"]', '["x", "y"]']), ("optim.name", ["adamw", "muon"])],
    )
    columns, table = differences(runs[:1])
    assert columns == ["a", "default"]
    assert dict(table) == {"data.train": ['["x"]', "[]"], "optim.lr": ["0.01", "0.001"]}


def test_an_option_that_one_run_does_not_know(tmp_path):
    folder = write_run(tmp_path / "a", rows(2))
    old = write_run(tmp_path / "b", rows(2))
    text = (old / "config.toml").read_text()
    (old / "config.toml").write_text(text.replace("[optim]", "[optim]\nabandoned = true"))
    assert differences(read_runs([folder, old]))[1] == [("optim.abandoned", ["—", "true"])]


# --- smoothing and thinning ------------------------------------------------------------------------------------------

values = st.floats(-1e6, 1e6) | st.sampled_from([math.nan, math.inf, -math.inf])
curves = st.lists(st.tuples(st.integers(1, 50), values), min_size=1, max_size=60)


@given(curves, st.floats(0, 1), st.booleans())
def test_smoothing_is_the_mean_of_the_window(points, share, log):
    x = np.cumsum([gap for gap, _ in points]).astype(float)
    y = np.array([value for _, value in points])
    found = smooth(x, y, share, log)
    good = [math.isfinite(v) and (v > 0 or not log) for v in y]
    usual = sorted(abs(math.log(v) if log else v) for v, g in zip(y, good, strict=True) if g)
    for i in range(len(x)):
        half = min(share / 2 * (x[-1] - x[0]), (x[i] - x[0]) / 4)
        window = [y[j] for j in range(len(x)) if good[j] and x[i] - half <= x[j] <= x[i] + half]
        if not good[i]:
            assert math.isnan(found[i])
        elif log:
            mean = math.fsum(map(math.log, window)) / len(window)
            assert math.log(found[i]) == pytest.approx(mean, abs=1e-6 * max(1, usual[-1]))
        elif usual[-1] <= 1e9 * usual[len(usual) // 2]:
            assert found[i] == pytest.approx(math.fsum(window) / len(window), abs=1e-9 * max(1, usual[-1]))


def test_smoothing_after_a_loss_spike_is_exact():
    x, y = np.arange(1000.0), np.full(1000, 3.0)
    y[500] = 1e30
    assert smooth(x, y, 0.02)[600:].tolist() == pytest.approx([3.0] * 400)
    assert smooth(x, y, 0.0).tolist()[:500] == [3.0] * 500


@given(st.lists(values, min_size=1, max_size=400), st.integers(1, 12))
def test_decimation_keeps_the_ends_and_extremes_of_every_span(heights, bins):
    x, y = np.arange(len(heights), dtype=float), np.array(heights)
    kept_x, kept_y = decimate(x, y, bins)
    assert len(kept_x) <= 5 * bins
    assert (np.diff(kept_x) > 0).all()
    kept = {int(i): v for i, v in zip(kept_x, kept_y, strict=True)}
    assert all(v == y[i] or (math.isnan(v) and math.isnan(y[i])) for i, v in kept.items())
    if len(x) <= 4 * bins:
        assert len(kept) == len(x)
        return
    for part in range(bins):
        inside = [i for i in range(len(x)) if min(int(x[i] / x[-1] * bins), bins - 1) == part]
        finite = [y[i] for i in inside if math.isfinite(y[i])]
        mine = [kept[i] for i in inside if i in kept]
        if finite:
            good = [v for v in mine if math.isfinite(v)]
            assert (good[0], min(good), max(good), good[-1]) == (finite[0], min(finite), max(finite), finite[-1])
        assert any(not math.isfinite(v) for v in mine) == (len(finite) < len(inside))


@pytest.mark.slow
def test_a_hundred_thousand_metric_rows(tmp_path):
    content = list(rows(100_000))
    content[70_000]["loss"] = 50.0
    (run,) = read_runs([write_run(tmp_path / "a", content)])
    assert len(run.curves["loss"].y) == 100_000
    x, y = decimate(run.curves["loss"].step, run.curves["loss"].y, 800)
    assert len(x) <= 3200
    assert y.max() == 50.0
    json.dumps(run.facts)

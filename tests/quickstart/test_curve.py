"""The loss curve: what is drawn, in which unit."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from neox.quickstart.curve import draw_loss_curve, loss_figure, smooth

ROWS = [{"step": step, "loss": 9 / (1 + step) + 2, "lr": 1.0} for step in range(200)]
VALID = [{"step": step, "valid_loss": 9 / (1 + step) + 2.1, "valid_bpb": 3 / (1 + step) + 1} for step in (0, 100, 199)]
BASELINES = {"gzip -9": 1.75, "xz -9": 1.54}


def lines_of(figure):
    return {line.get_label(): line.get_xydata() for line in figure.axes[0].get_lines()}


def test_a_picture_is_written(tmp_path):
    path = draw_loss_curve(tmp_path / "loss.png", ROWS + VALID, "A $run_{1", BASELINES, bytes_per_token=3.0)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.size == (1440, 800)
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 100


def test_bits_per_byte_is_nats_over_ln2_and_bytes():
    figure = loss_figure(ROWS + VALID, "title", BASELINES, bytes_per_token=3.0)
    axes = figure.axes[0]
    drawn = {round(x): y for x, y in axes.get_lines()[0].get_xydata()}
    assert drawn == pytest.approx({row["step"]: math.log2(math.exp(row["loss"])) / 3 for row in ROWS})
    assert lines_of(figure)["held-out"].tolist() == [[row["step"], row["valid_bpb"]] for row in VALID]
    assert axes.get_ylabel() == "loss (bits per byte)"
    assert axes.get_xlabel() == "training step"
    texts = {text.get_text() for text in axes.texts}
    assert texts == {"gzip -9 1.75", "xz -9 1.54", f"{VALID[-1]['valid_bpb']:.2f}"}
    levels = {line.get_ydata()[0] for line in axes.get_lines() if line.get_linestyle() == "--"}
    assert levels == set(BASELINES.values())
    figure.canvas.draw()
    (right,) = axes.child_axes
    assert right.get_ylabel() == "nats per token"
    assert right.get_ylim() == pytest.approx([y * math.log(2) * 3 for y in axes.get_ylim()])


def test_without_bytes_the_axis_is_nats():
    figure = loss_figure(ROWS + VALID, "title")
    assert figure.axes[0].get_ylabel() == "loss (nats per token)"
    assert lines_of(figure)["held-out"].tolist() == [[row["step"], row["valid_loss"]] for row in VALID]
    assert not figure.axes[0].child_axes


def test_rows_in_any_order_and_gaps_in_them():
    spoiled = [
        {"step": 500, "loss": math.nan},
        {"step": 501, "loss": None},
        {"step": 502, "loss": math.inf},
        {"step": 9},
    ]
    assert np.array_equal(
        loss_figure(ROWS[::-1] + spoiled, "t").axes[0].get_lines()[0].get_xydata(),
        loss_figure(ROWS, "t").axes[0].get_lines()[0].get_xydata(),
    )


def test_one_point_is_enough():
    assert loss_figure([{"step": 0, "valid_loss": 3.0}], "t").axes[0].texts[0].get_text() == "3.00"


def test_errors_are_one_line(tmp_path):
    with pytest.raises(ValueError, match="no finite loss to draw"):
        draw_loss_curve(tmp_path / "x.png", [{"step": 1, "loss": math.nan}], "t")
    with pytest.raises(ValueError, match="give bytes_per_token"):
        draw_loss_curve(tmp_path / "x.png", ROWS, "t", BASELINES)
    assert list(tmp_path.iterdir()) == []


def test_baseline_names_stand_on_the_left_away_from_where_the_run_ends():
    texts = loss_figure(ROWS, "t", {"above": 2.0, "below": 0.5}, bytes_per_token=3.0).axes[0].texts
    assert {text.get_text(): text.get_horizontalalignment() for text in texts} == {
        "above 2.00": "left",
        "below 0.50": "left",
    }


@given(st.lists(st.floats(0.1, 20), min_size=1, max_size=400))
def test_smooth_is_the_mean_of_the_neighbours(values):
    slow = []
    for i in range(len(values)):
        h = min(len(values) // 60, i // 4)
        slow.append(np.mean([values[j] for j in range(i - h, i + h + 1) if j < len(values)]))
    assert smooth(values) == pytest.approx(slow)

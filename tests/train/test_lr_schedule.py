"""Schedules: what gpt-neox's formulas gave in 20B's run, closed formulas, and the schedules of transformers."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neox.config import ScheduleConfig, load_config
from neox.train.lr_schedule import lr_factor

NAMES = ("cosine", "cosine_floored", "linear", "exponential", "constant", "inverse_sqrt", "wsd")


def rates(name: str, updates, steps: int, peak: float = 1e-3, low: float = 1e-4, **keys) -> list[float]:
    schedule = ScheduleConfig(name=name, min_lr=low, **keys)
    return [peak * lr_factor(schedule, peak, update, steps) for update in updates]


def of_20b(update: int, *overrides: str) -> float:
    config = load_config("neox-20b", overrides=overrides)
    return config.optim.lr * lr_factor(config.schedule, config.optim.lr, update, config.train.steps)


def test_20b_takes_the_rates_it_was_trained_with():
    """0.97e-4 to 0.97e-5 over 150,000 updates; figures worked out from the description of gpt-neox 1.0's formula."""
    assert of_20b(0) == 0  # Pythia's step 1 is its step 0 for this reason
    assert of_20b(1) == pytest.approx(0.97e-4 / 1500, rel=1e-12)
    assert of_20b(1500) == 0.97e-4
    assert of_20b(75_000) == pytest.approx(5.002e-5, abs=5e-9)
    assert of_20b(100_000) == pytest.approx(2.558e-5, abs=5e-9)
    assert of_20b(120_775) > 0.97e-5
    assert {of_20b(update) for update in (120_776, 148_500, 149_999, 200_000)} == {0.97e-5}


def test_20b_by_the_formula_of_today_would_have_differed():
    assert of_20b(0, "schedule.name=cosine") == pytest.approx(0.97e-4 / 1500, rel=1e-12)
    assert of_20b(75_000, "schedule.name=cosine") == pytest.approx(5.404e-5, abs=5e-9)
    assert of_20b(100_000, "schedule.name=cosine") == pytest.approx(3.193e-5, abs=5e-9)
    assert of_20b(150_000, "schedule.name=cosine") == pytest.approx(0.97e-5, rel=1e-9)


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    lr=st.floats(1e-6, 1),
    share=st.floats(0, 1),
    warmup=st.floats(1e-3, 0.5),
    decay=st.floats(1e-3, 0.5),
    steps=st.integers(1, 5000),
    data=st.data(),
)
def test_lr_factor_is_the_closed_formula(name, lr, share, warmup, decay, steps, data):
    """As shares of the way: done from 0 to 1 after the warmup, half a cosine wave as cos^2."""
    update = data.draw(st.integers(0, steps))
    low, ramp = lr * share, warmup * steps
    factor = lr_factor(ScheduleConfig(name=name, warmup=warmup, decay=decay, min_lr=low), lr, update, steps)
    done = (update - ramp) / max(1, steps - ramp)
    if name == "cosine_floored":
        late = min(update, steps - ramp)
        expected = (
            lr * late / ramp if update <= ramp else max(low, lr * math.cos(math.pi / 2 * (late - ramp) / steps) ** 2)
        )
    elif update < ramp:
        expected = lr * min(1, max(update, 1) / ramp)
    elif name == "cosine":
        expected = low + (lr - low) * math.cos(math.pi / 2 * done) ** 2
    elif name == "linear":
        expected = max(low, lr - lr * done)
    elif name == "exponential":  # half of the peak at the end, but for their rounding of ln 2
        expected = max(low, lr * 2 ** (-done * 0.693 / math.log(2)))
    elif name == "constant":
        expected = max(low, lr)
    elif name == "inverse_sqrt":  # Vaswani et al.: proportional to min(n^-0.5, n W^-1.5), one at n = W
        expected = max(low, lr * min(update**-0.5, update * ramp**-1.5) * ramp**0.5)
    else:
        left = (steps - update) / (decay * steps)
        expected = lr if left > 1 else low + (lr - low) * (1 - math.sqrt(1 - left))
    # A square root near zero doubles the digits that its argument lost.
    assert math.isclose(factor * lr, expected, rel_tol=1e-9, abs_tol=1e-7 * lr if name == "wsd" else 1e-12)
    assert 0 <= factor <= 1 + 1e-12


STEPS, WARMUP = 200, 20


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "inverse_sqrt", "wsd"])
def test_the_schedules_of_transformers(name):
    """From update 1 on: at 0 theirs is zero, ours that of update 1."""
    optimization = pytest.importorskip("transformers.optimization")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    theirs = {
        "cosine": lambda: optimization.get_cosine_with_min_lr_schedule_with_warmup(
            optimizer, WARMUP, STEPS, min_lr_rate=0.1
        ),
        "linear": lambda: optimization.get_linear_schedule_with_warmup(optimizer, WARMUP, STEPS),
        "constant": lambda: optimization.get_constant_schedule_with_warmup(optimizer, WARMUP),
        "inverse_sqrt": lambda: optimization.get_inverse_sqrt_schedule(optimizer, WARMUP, timescale=WARMUP),
        "wsd": lambda: optimization.get_wsd_schedule(
            optimizer, num_warmup_steps=WARMUP, num_decay_steps=50, num_training_steps=STEPS, decay_type="1-sqrt"
        ),
    }[name]()
    expected = []
    for _ in range(STEPS + 1):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    low = 1e-4 if name == "cosine" else 0.0
    found = rates(name, range(STEPS + 1), STEPS, low=low, warmup=WARMUP, decay=50)
    assert found[1:] == pytest.approx(expected[1:], rel=1e-12, abs=1e-18)
    assert found[0] == found[1]


def test_warmup_and_decay_below_one_are_fractions_and_from_one_on_updates():
    updates = range(201)
    assert rates("wsd", updates, 200, warmup=0.1, decay=0.25) == rates("wsd", updates, 200, warmup=20, decay=50)
    assert rates("constant", [0, 5], 200, warmup=1) == [1e-3, 1e-3]


@pytest.mark.parametrize("name", NAMES)
def test_the_horizon_ends_the_schedule_and_the_rate_stays_from_there(name):
    short = rates(name, range(100), 1000, horizon=100, warmup=0.1)
    assert short == rates(name, range(100), 100, warmup=0.1)
    beyond = rates(name, (100, 101, 500, 999), 1000, horizon=100, warmup=0.1)
    assert len(set(beyond)) == 1
    assert beyond[0] >= 1e-4 * (1 - 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_it_peaks_after_the_warmup_and_never_rises_again(name):
    found = rates(name, range(151), 100, warmup=0.1)
    assert found[10] == max(found) == 1e-3
    assert all(a <= b for a, b in itertools.pairwise(found[:11]))
    assert all(a >= b for a, b in itertools.pairwise(found[10:]))


@pytest.mark.parametrize("name", NAMES)
def test_a_warmup_of_less_than_an_update_does_not_start_above_the_peak(name):
    """The default of 1 % of 50 steps is half an update."""
    assert ScheduleConfig().warmup == 0.01
    for steps in (1, 5, 50, 99, 100, 1000):
        assert max(rates(name, range(steps), steps)) <= 1e-3 * (1 + 1e-12)

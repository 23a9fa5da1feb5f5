"""The loss scaler against a table worked by hand, against torch's, and what holds whatever happens."""

import json
import math
from contextlib import suppress

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neox.train.scaler import LossScaler

TABLE = [  # initial 8, window 3, hysteresis 2, minimum 2: overflow?, scale after it, overflows tolerated, why
    (False, 8, 2, "step 0 is 1 after the overflow that is taken to have been at -1"),
    (False, 8, 2, "2 after"),
    (False, 16, 2, "3 after: doubled"),
    (True, 16, 1, "the first of two overflows is tolerated"),
    (True, 8, 1, "the second is not: halved"),
    (False, 8, 1, "1 after; tolerance does not come back by itself"),
    (False, 8, 1, "2 after"),
    (True, 4, 1, "no tolerance since: halved at once"),
    (False, 4, 1, "1 after"),
    (False, 4, 1, "2 after"),
    (False, 8, 2, "3 after: doubled, and two overflows are granted again"),
    (False, 8, 2, "4 after"),
    (False, 8, 2, "5 after"),
    (False, 16, 2, "6 after: doubled again"),
    (True, 16, 1, "tolerated"),
    (False, 16, 1, "1 after: a tolerated overflow also restarts the count"),
    (False, 16, 1, "2 after"),
    (False, 32, 2, "3 after: doubled"),
    (True, 32, 1, "tolerated"),
    (True, 16, 1, "halved"),
    (True, 8, 1, "halved"),
    (True, 4, 1, "halved"),
    (True, 2, 1, "halved, to the minimum"),
    (False, 2, 1, "1 after"),
]


def test_loss_scale_by_hand():
    scaler = LossScaler(initial=8, window=3, hysteresis=2, minimum=2)
    for overflow, scale, tolerated, why in TABLE:
        scaler.update(overflow)
        assert (scaler.scale, scaler.tolerated) == (scale, tolerated), why
    with pytest.raises(ValueError, match="overflow at the smallest loss scale, 2: train.dtype=bf16"):
        scaler.update(True)


def test_the_defaults_are_those_of_20b():
    """4096 is doubled by the 1000th step without overflow; one overflow is tolerated."""
    scaler = LossScaler()
    for _ in range(999):
        scaler.update(False)
    assert scaler.scale == 4096
    scaler.update(False)
    assert scaler.scale == 8192
    scaler.update(True)
    assert scaler.scale == 8192
    for halvings in range(1, 14):
        scaler.update(True)
        assert scaler.scale == 8192 / 2**halvings
    with pytest.raises(ValueError):
        scaler.update(True)


def test_a_minimum_that_is_no_halving_of_the_scale_is_kept():
    scaler = LossScaler(initial=8, hysteresis=1, minimum=3)
    scaler.update(True)
    scaler.update(True)
    assert scaler.scale == 3


def test_fifty_overflows_in_a_row_are_enough():
    scaler = LossScaler(initial=2.0**100)
    for _ in range(3):  # 49 and one step that is applied, over and over: no reason to give up
        for _ in range(49):
            scaler.update(True)
        scaler.scale = 2.0**100
        scaler.update(False)
    for _ in range(49):
        scaler.update(True)
    with pytest.raises(ValueError, match="overflowed in 50 steps in a row: lower optim.loss_scale") as caught:
        scaler.update(True)
    assert "\n" not in str(caught.value)


@given(overflows=st.lists(st.booleans(), max_size=40), window=st.integers(1, 5))
def test_without_hysteresis_it_is_torchs_grad_scaler(overflows, window):
    parameter = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=window)
    mine = LossScaler(initial=2.0**20, window=window, hysteresis=1, minimum=2.0**-40)
    for overflow in overflows:
        parameter.grad = torch.tensor([math.inf if overflow else 1.0])
        theirs.scale(torch.ones(()))
        theirs.step(optimizer)
        theirs.update()
        mine.update(overflow)
        assert mine.scale == theirs.get_scale()


SETTINGS = st.fixed_dictionaries(
    {
        "initial": st.sampled_from((1.0, 2.0**12, 2.0**24)),
        "window": st.integers(1, 6),
        "hysteresis": st.integers(1, 4),
        "minimum": st.sampled_from((0.25, 1.0)),
    }
)


@given(settings=SETTINGS, overflows=st.lists(st.booleans(), max_size=60))
def test_invariants_of_the_loss_scaler(settings, overflows):
    scaler = LossScaler(**settings)
    with suppress(ValueError):
        for overflow in overflows:
            before = scaler.scale
            scaler.update(overflow)
            assert scaler.scale / before in ((1, 0.5) if overflow else (1, 2))
            assert scaler.scale >= settings["minimum"]
            assert 1 <= scaler.tolerated <= settings["hysteresis"]
            assert (scaler.skipped > 0) == overflow


@given(settings=SETTINGS, overflows=st.lists(st.booleans(), max_size=30), cut=st.integers(0, 30))
def test_a_scaler_goes_on_from_its_state_through_json(settings, overflows, cut):
    whole, first = LossScaler(**settings), LossScaler(**settings)
    with suppress(ValueError):
        for overflow in overflows[:cut]:
            whole.update(overflow)
            first.update(overflow)
        second = LossScaler(**settings)
        second.load(json.loads(json.dumps(first.state())))
        for overflow in overflows[cut:]:
            whole.update(overflow)
            second.update(overflow)
            assert vars(second) == vars(whole)


@pytest.mark.parametrize("state", [{}, {**LossScaler().state(), "scale": "1"}, {**LossScaler().state(), "more": 1}])
def test_a_state_of_something_else_is_refused(state):
    with pytest.raises(ValueError, match="not the state of a loss scaler"):
        LossScaler().load(state)

"""Where the time went, by a clock that the test moves."""

import pytest

from neox.train.goodput import Goodput


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_run_that_went_back_once():
    clock = Clock()
    goodput = Goodput(before=50.0, clock=clock)
    goodput.move({"training": 30.0, "starting": 5.0})  # 15 s of the first call were lost with what it did not save
    with goodput.spending("starting"):
        clock.now += 10
    kept = dict(goodput.seconds)
    clock.now += 20
    goodput.seconds["training"] += 20
    goodput.move(kept)  # a rewind
    clock.now += 40
    goodput.seconds["training"] += 40
    with goodput.spending("saving"):
        clock.now += 2
    assert goodput.elapsed == 50 + 72
    assert goodput.line() == (
        "goodput 57.4%: 70.0 of 122.0 s; starting 15.0 s, waiting for checkpoints 2.0 s, "
        "lost to restarts, rewinds and skipped updates 35.0 s"
    )


def test_a_checkpoint_that_is_later_than_the_last_row():
    clock = Clock()
    first = Goodput(clock=clock)
    clock.now += 30
    first.seconds["training"] += 25
    kept = first.state()
    clock = Clock()
    second = Goodput(before=4.0, clock=clock)  # what the last row says
    second.move(kept)
    second.resume(kept)
    clock.now += 10
    assert (second.elapsed, second.seconds["training"]) == (40, 25)
    second.move(kept)  # a rewind does not set the clock back
    assert second.elapsed == 40


def test_what_fails_is_lost():
    clock = Clock()
    goodput = Goodput(clock=clock)
    with pytest.raises(KeyError), goodput.spending("evaluating"):
        clock.now += {}[5]
    assert goodput.seconds["evaluating"] == 0

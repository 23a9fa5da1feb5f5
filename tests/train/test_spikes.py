"""Bad steps change nothing, and where they do not end the run goes back and past their data: against slow rules."""

import json
import math
import random
import re
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neox.checkpoint import read_step
from neox.config import TrainConfig
from neox.train import Trainer
from neox.train.spikes import SpikeDetector
from tests.train.helpers import Forked, assert_same_step, complete, rows
from tests.train.poison import Without, poisoned, settings

# --- the rule -------------------------------------------------------------------------------------------------------

values = st.floats(0.01, 100.0) | st.sampled_from([math.inf, math.nan])


@given(st.lists(st.tuples(values, values), max_size=60), st.sampled_from([0.0, 1.0, 3.0]), st.integers(1, 9))
def test_spikes_are_those_that_numpy_finds(steps, sigma, window):
    detector = SpikeDetector(TrainConfig(spike_sigma=sigma, spike_window=window, rewind_after=4))
    good: list[tuple[float, float]] = []
    in_a_row = 0
    for step in steps:
        expected = not np.isfinite(step).all()
        past = np.array(good[-window:])
        if not expected and sigma and len(past) >= window / 2:
            limits = past.mean(axis=0) + sigma * past.std(axis=0)
            near = np.isclose(step, limits, rtol=1e-12)  # where rounding decides
            if near.any():
                return
            expected = bool((np.array(step) > limits).any())
        found = detector.check(*step)
        assert (found is not None) == expected, found
        detector = SpikeDetector(
            TrainConfig(spike_sigma=sigma, spike_window=window, rewind_after=4), _through_json(detector)
        )
        detector.record(*step, skipped=expected)
        in_a_row = in_a_row + 1 if expected else 0
        good += [] if expected else [step]
        assert detector.should_rewind == (in_a_row >= 4)


def _through_json(detector):
    return json.loads(json.dumps(detector.state(), allow_nan=False))


def test_an_fp16_overflow_is_left_to_the_loss_scaler():
    detector = SpikeDetector(TrainConfig())
    assert detector.check(1.0, math.inf, scaled=True) is None
    assert detector.check(math.nan, math.inf, scaled=True) == "loss is not finite"


@pytest.mark.parametrize(
    ("bad", "rewinds", "step", "expected"),
    [
        (3, [], 23, (20, 20)),  # the newest before the bad ones; as many steps before them are past the checkpoint
        (3, [], 28, (25, 25)),
        (3, [], 29, (25, 25)),
        (3, [], 24, (20, 20)),
        (3, [], 32, (25, 26)),  # steps 27 to 29 did harm, or 30 to 32 are bad: counted from 0, 26 to 31
        (3, [(28, 25)], 28, (20, 20)),  # not come past step 28: an older one, and all since
        (3, [(28, 25)], 29, (20, 20)),
        (3, [(28, 25)], 31, (25, 25)),  # this is news
        (3, [(28, 25), (28, 20)], 27, (10, 10)),
    ],
)
def test_rewind_target_by_hand(bad, rewinds, step, expected):
    state = {"losses": [], "norms": [], "skipped_in_a_row": bad, "rewinds": rewinds}
    detector = SpikeDetector(TrainConfig(rewind_after=3, max_rewinds=5), state)
    assert detector.rewind_target(step, [10, 20, 25, 40]) == expected


@pytest.mark.parametrize(
    ("rewinds", "most", "kept", "words"),
    [
        ([], 3, [25], "no checkpoint from before"),
        ([], 0, [10], r"train\.max_rewinds=0"),
        ([[18, 10], [30, 20], [31, 10]], 3, [5], "after 3 rewinds"),
        ([[28, 10]], 3, [10], "after 1 rewinds"),
    ],
)
def test_no_rewind_target(rewinds, most, kept, words):
    state = {"losses": [], "norms": [], "skipped_in_a_row": 3, "rewinds": rewinds}
    detector = SpikeDetector(TrainConfig(rewind_after=3, max_rewinds=most), state)
    with pytest.raises(ValueError, match=words):
        detector.rewind_target(23, kept)


# --- runs -----------------------------------------------------------------------------------------------------------


def test_the_update_of_a_loss_spike_is_skipped(tmp_path, capfd):
    """The step's batch is the same with and without it; the weights are those of before, the schedule waits."""
    poisoned(tmp_path / "train", range(14, 15))
    config = settings(tmp_path, "run", "steps=18", "spike_sigma=5", "checkpoint.every=1", "schedule.name=linear")
    Trainer(config).fit()
    found = rows(tmp_path / "run")
    assert [row["step"] for row in found if "skip_reason" in row] == [15]
    assert re.fullmatch(r"loss 5\.\d+ is above 4\.\d+, 5 standard deviations", found[14]["skip_reason"])
    assert "step 15: update skipped: loss 5." in capfd.readouterr().err
    assert [row.get("skipped") for row in found] == [None] * 14 + [1] * 4
    before, after, next_one = complete(tmp_path / "run")[14 - 1 : 14 + 2]
    assert_same_step(before, after, tmp_path)
    with pytest.raises(AssertionError):
        assert_same_step(after, next_one, tmp_path)
    assert found[14]["lr"] == found[15]["lr"] > found[16]["lr"]
    # Without a detector it is learned from.
    options = ("steps=18", "checkpoint.every=1", "schedule.name=linear")
    Trainer(settings(tmp_path, "unguarded", *options), quiet=True).fit()
    assert rows(tmp_path / "unguarded")[:14] == found[:14]
    assert rows(tmp_path / "unguarded")[14]["loss"] == found[14]["loss"]
    with pytest.raises(AssertionError):
        assert_same_step(*complete(tmp_path / "unguarded")[13:15], tmp_path)


def reference(tmp_path, steps: int, *ranges: tuple[int, int], options: tuple[str, ...] = ()):
    """An undisturbed run that never reads these samples: its last checkpoint."""

    def strike_out(trainer, step):
        if not step:
            trainer.state.loader = Without(trainer.state.loader, *ranges)

    Trainer(settings(tmp_path, "reference", f"steps={steps}", *options), hooks=(strike_out,), quiet=True).fit()
    return complete(tmp_path / "reference")[-1]


def test_a_long_spike_rewinds_the_run_and_skips_its_data(tmp_path, capfd):
    poisoned(tmp_path / "train", range(14, 18))
    watched = ("spike_sigma=5", "rewind_after=3")
    result = Trainer(settings(tmp_path, "run", "steps=24", *watched)).fit()
    assert result.finished
    # 3 bad steps in a row, 15 to 17: back to 10, and past the data of steps 12 to 17. The one that is left is bad too.
    over = (11 * 4, 17 * 4)
    found = rows(tmp_path / "run")
    err = capfd.readouterr().err
    assert (
        "3 consecutive updates skipped (last: step 17); rewinding to step 10 and skipping the data of steps 12-17"
        in err
    )
    assert [(row["step"], row["rewound_from"], row["stepped_over"]) for row in found if "rewound_from" in row] == [
        (11, 17, [list(over)])
    ]
    assert [row["step"] for row in found] == list(range(1, 25))
    assert [row["step"] for row in found if "skip_reason" in row] == [12]
    assert [row["samples"] for row in found[9:13]] == [40, 68, 72, 76]
    # No run without a detector on would leave out step 12: it has the same, and steps over nothing by itself.
    last = reference(tmp_path, 24, over, options=watched)
    assert_same_step(complete(tmp_path / "run")[-1], last, tmp_path)
    assert "rewound_from" not in json.dumps(rows(tmp_path / "reference"))
    goodput = re.search(r"goodput (\d+\.\d)%: ([\d.]+) of ([\d.]+) s; .*skipped updates [\d.]+ s", err)
    assert goodput, err
    assert 0 < float(goodput[2]) < float(goodput[3])


def flip(step: int, again: bool = False):
    """From outside: one weight becomes NaN after that step, the first time or each time."""
    done = []

    def hook(trainer, now):
        if now == step and (again or not done):
            done.append(now)
            with torch.no_grad():
                trainer.model_parts[-1].layers[0].mlp.dense_4h_to_h.weight.view(-1)[7] = math.nan

    return hook


def test_a_weight_that_turns_nan_rewinds_the_run(tmp_path):
    """Hooks come before the save: the checkpoint of step 10 has the NaN too, and the one before it is used."""
    poisoned(tmp_path / "train")
    superseded = tmp_path / "run" / "step_00000010" / ".metadata.superseded"
    seen = set()

    def look(trainer, now):
        if superseded.exists():
            seen.add(now)

    Trainer(settings(tmp_path, "run", "steps=20", "rewind_after=3"), hooks=(flip(10), look), quiet=True).fit()
    assert seen == {6, 7, 8, 9, 10}, "a valid checkpoint that the rewind passed over, until it is written again"
    found = [row for row in rows(tmp_path / "run") if "rewound_from" in row]
    # Steps 11 to 13 are bad at first; from step 10 on again; so back to 5, and past all that was read.
    assert [(row["step"], row["rewound_from"]) for row in found] == [(6, 13)]
    assert found[0]["stepped_over"] == [[5 * 4, 13 * 4 + 3 * 4]]
    last = reference(tmp_path, 20, (20, 64))
    assert_same_step(complete(tmp_path / "run")[-1], last, tmp_path)
    assert (tmp_path / "run" / "step_00000010" / ".metadata").exists(), "written again"


def test_a_weight_that_turns_nan_each_time_ends_the_run_with_one_line(tmp_path):
    poisoned(tmp_path / "train")
    config = settings(tmp_path, "run", "steps=20", "rewind_after=2", "max_rewinds=9")
    with pytest.raises(ValueError, match=r"run: no update was possible in the 2 steps up to step \d+, after 2 rewinds"):
        Trainer(config, hooks=(flip(12, again=True),), quiet=True).fit()
    assert complete(tmp_path / "run"), "there is something left to look at"


def test_a_learning_rate_that_is_far_too_high_is_stopped(tmp_path):
    """Real gradients: each update is finite, and the losses after it are far above what they were."""
    poisoned(tmp_path / "train")
    Trainer(settings(tmp_path, "run", "steps=15", "spike_sigma=6"), quiet=True).fit()
    config = settings(tmp_path, "run", "steps=40", "spike_sigma=6", "rewind_after=3", "optim.lr=30", "max_rewinds=2")
    with pytest.raises(ValueError, match=r"no update was possible in the 3 steps up to step \d+, after 2 rewinds"):
        Trainer(config, resume=True, quiet=True).fit()
    sound = Trainer(settings(tmp_path, "run", "steps=40", "spike_sigma=6"), resume=True, quiet=True).fit()
    assert sound.finished
    assert sound.loss < 3.6


def test_a_run_resumed_within_a_spike_rewinds_alike(tmp_path):
    poisoned(tmp_path / "train", range(14, 18))
    options = ("spike_sigma=5", "rewind_after=3", "checkpoint.early=20")  # at 16, among the bad ones
    Trainer(settings(tmp_path, "whole", "steps=22", *options), quiet=True).fit()
    for steps in (16, 22):
        Trainer(settings(tmp_path, "parts", f"steps={steps}", *options), resume=steps == 22, quiet=True).fit()
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    last = [complete(tmp_path / name)[-1] for name in ("whole", "parts")]
    assert_same_step(*last, tmp_path)
    states = [{**read_step(step)[1], "seconds": None} for step in last]
    assert states[0]["stepped_over"] == [[11 * 4, 17 * 4]]
    assert states[0] == states[1]


def test_a_save_within_a_spike_keeps_the_rewind_target(tmp_path):
    """The checkpoint of step 15 is among them: with keep_last=1 it would leave none to go back to."""
    poisoned(tmp_path / "train", range(14, 18))
    options = ("spike_sigma=5", "rewind_after=3", "keep_last=1", "steps=22")
    Trainer(settings(tmp_path, "run", *options), quiet=True).fit()
    (row,) = [row for row in rows(tmp_path / "run") if "rewound_from" in row]
    assert (row["step"], row["rewound_from"]) == (11, 17)
    assert "standard deviations" in row["rewind_reason"]
    assert [step.name for step in complete(tmp_path / "run")] == ["step_00000022"]


def test_without_the_spike_detector_nothing_is_skipped(tmp_path):
    """A run that is stopped among bad steps and goes on without one does not go back either."""
    poisoned(tmp_path / "train", range(14, 18))
    options = ("spike_sigma=5", "rewind_after=3")
    Trainer(settings(tmp_path, "run", "steps=16", *options), quiet=True).fit()
    alone = settings(tmp_path, "run", "steps=20", *options, "rewind_after=1", "train.guard=false")
    Trainer(alone, resume=True, quiet=True).fit()
    found = rows(tmp_path / "run")
    assert [row["step"] for row in found if "skip_reason" in row] == [15, 16]
    assert not any("rewound_from" in row for row in found)


def slowed() -> None:
    plain = Trainer.train_step

    def train_step(self):
        time.sleep(0.05)
        return plain(self)

    Trainer.train_step = train_step


def lines(run) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow
def test_a_rewind_killed_at_any_moment_comes_to_the_same(tmp_path):
    poisoned(tmp_path / "train", range(14, 18))
    options = ("spike_sigma=5", "rewind_after=3", "steps=34")
    Trainer(settings(tmp_path, "whole", *options), quiet=True).fit()
    draw, run, kills = random.Random(7), tmp_path / "killed", 0
    (tmp_path / "killed.toml").write_text(settings(tmp_path, "killed", *options).to_toml())
    command = [str(tmp_path / "killed.toml")]
    while True:
        process = Forked(tmp_path / "log", *command, setup=slowed)
        # After so many steps of its own, at a random moment of the next one; a checkpoint is 5 steps further,
        # so that it takes seven of them and more to come to the end.
        steps, before, done = draw.randint(1, 7), lines(run), 0
        while process.poll() is None and (done < steps or kills >= 8):
            time.sleep(0.002)
            now = lines(run)
            before, done = now, done + max(0, now - before)
        time.sleep(draw.uniform(0, 0.06))
        if process.poll() is not None:
            assert process.finish()[0] == 0, process.finish()
            break
        process.send(9)
        process.finish()
        kills += 1
        command = [f"resume={run}"] if (run / "config.toml").exists() else command
    assert kills >= 5
    assert rows(run) == rows(tmp_path / "whole")
    assert_same_step(complete(run)[-1], complete(tmp_path / "whole")[-1], tmp_path)

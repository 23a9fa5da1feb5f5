"""The learning rate over a run, as a fraction of its peak.

n counts the applied updates before this one: a step that is skipped does not move the schedule. W is the warmup, H the
horizon, both in updates; lr the peak and low `schedule.min_lr`.
"""

import math

from neox.config import ScheduleConfig


def lr_factor(config: ScheduleConfig, lr: float, update: int, steps: int) -> float:
    """Learning rate of update n = `update` (from 0) as a fraction of the peak; H is `schedule.horizon`, or `steps`.

    Every schedule but cosine_floored begins with lr max(1, n) / W. With m = n - W and E = H - W, all of them floored
    at low and constant beyond H, gpt-neox's formulas of today:

        cosine        low + (lr - low) / 2 (1 + cos(pi m / E))
        linear        lr (E - m) / E
        exponential   lr exp(-0.693 m / E)
        constant      lr

    and those of papers:

        inverse_sqrt  lr sqrt(W / n)                       Vaswani et al. 2017 (1706.03762), section 5.3
        wsd           lr, and over the last D = `schedule.decay` updates
                      low + (lr - low) (1 - sqrt((n - H + D) / D))      Hägele et al. 2024 (2405.18392)

    cosine_floored is that of gpt-neox 1.0, which trained GPT-NeoX-20B and Pythia: lr n / W, so that the first update
    changes nothing, then max(low, lr / 2 (1 + cos(pi m / H))). With its 1 % of warmup and low = lr / 10 the
    floor is reached after four fifths of the run.
    """
    horizon = config.horizon or steps
    warmup = config.warmup_updates(horizon)
    floor = config.min_lr / lr
    if config.name == "cosine_floored":
        n = min(update, horizon - warmup)
        if warmup > 0 and update <= warmup:
            return n / warmup
        return max(floor, (1 + math.cos(math.pi * (n - warmup) / horizon)) / 2)
    n = min(update, horizon)
    if n < warmup:
        return min(1.0, max(1, n) / warmup)  # a warmup shorter than one update has no ramp
    if config.name == "inverse_sqrt":
        return max(floor, math.sqrt(warmup / max(n, warmup)))
    if config.name == "wsd":
        decay = config.decay_updates(horizon)
        done = max(0.0, 1 - (horizon - n) / decay) if decay else 0.0
        return floor + (1 - floor) * (1 - math.sqrt(done))
    done = (n - warmup) / max(1.0, horizon - warmup)
    if config.name == "cosine":
        return floor + (1 - floor) / 2 * (1 + math.cos(math.pi * done))
    return max(floor, {"linear": 1 - done, "exponential": math.exp(-0.693 * done), "constant": 1.0}[config.name])

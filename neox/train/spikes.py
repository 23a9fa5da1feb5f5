"""The spike detector: updates to skip because of a loss spike, and the checkpoint to rewind to when skipping fails."""

import math
from collections import deque
from statistics import fmean, pstdev
from typing import Any

from neox.config import TrainConfig


class SpikeDetector:
    """Checks each step's loss and gradient norm before its update. A state machine without tensors.

    A step is bad if its loss or norm is not finite or, with `train.spike_sigma` = s, above mean + s standard deviations
    of the last `train.spike_window` updates, of which there must be half as many. (Both as in OLMo-core's
    SkipStepOptimizer.) The update of a bad step is skipped, and its figures do not count for later steps.
    """

    def __init__(self, config: TrainConfig, state: dict[str, Any] | None = None) -> None:
        """Continue from `state()`. Raises KeyError, TypeError or ValueError where it is no such state."""
        self.sigma, self.limit, self.max_rewinds = config.spike_sigma, config.rewind_after, config.max_rewinds
        self.least = -(-config.spike_window // 2)
        state = state or {"losses": [], "norms": [], "skipped_in_a_row": 0, "rewinds": []}
        self.losses = deque(map(float, state["losses"]), config.spike_window)
        self.norms = deque(map(float, state["norms"]), config.spike_window)
        self.skipped_in_a_row = int(state["skipped_in_a_row"])
        # (step after which the run was rewound, step of the checkpoint it went to), in order.
        self.rewinds: list[tuple[int, int]] = [(int(left), int(to)) for left, to in state["rewinds"]]

    def check(self, loss: float, norm: float, scaled: bool = False) -> str | None:
        """Reason to skip the update of a step, None where there is none.

        With loss scaling (`scaled`) a norm that is not finite is an overflow, which the loss scaler handles.
        """
        figures = (("loss", loss, self.losses, False), ("gradient norm", norm, self.norms, scaled))
        for name, value, past, excused in figures:
            if not math.isfinite(value):
                if not excused:
                    return f"{name} is not finite"
            elif self.sigma and len(past) >= self.least and value > (limit := fmean(past) + self.sigma * pstdev(past)):
                return f"{name} {value:.4g} is above {limit:.4g}, {self.sigma:g} standard deviations"
        return None

    def record(self, loss: float, norm: float, skipped: bool) -> None:
        """Take a step into account."""
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if self.sigma and not skipped and math.isfinite(norm):
            self.losses.append(loss)
            self.norms.append(norm)

    @property
    def should_rewind(self) -> bool:
        """True once `train.rewind_after` updates in a row were skipped."""
        return self.skipped_in_a_row >= self.limit

    def rewind_target(self, step: int, checkpoints: list[int]) -> tuple[int, int]:
        """(step of the checkpoint to rewind to, first step whose data is skipped), after `step` steps.

        The first time: the newest checkpoint before the bad steps. Their data is skipped, and that of as many steps
        before them, since a harmful update shows in the steps after it. If the run has not passed the point of its
        last rewind since: an older checkpoint, and all data read since then.
        Raises ValueError where there is no such checkpoint, and after `train.max_rewinds` rewinds.
        """
        begin = step - self.skipped_in_a_row
        again = bool(self.rewinds) and begin < self.rewinds[-1][0]
        usable = [done for done in checkpoints if done <= begin and not (again and done >= self.rewinds[-1][1])]
        if len(self.rewinds) >= self.max_rewinds or not usable:
            why = f"after {len(self.rewinds)} rewinds" if self.rewinds else "and there is no checkpoint from before"
            why = "and train.max_rewinds=0" if not self.max_rewinds else why
            raise ValueError(
                f"no update was possible in the {self.skipped_in_a_row} steps up to step {step}, {why}: look at the "
                "data, lower optim.lr, or see to a checkpoint before them (checkpoint.every)"
            )
        to = max(usable)
        return to, to if again else max(to, begin - self.limit)

    def state(self) -> dict[str, Any]:
        """State for a resumed run; settings are the config's."""
        return {
            "losses": list(self.losses),
            "norms": list(self.norms),
            "skipped_in_a_row": self.skipped_in_a_row,
            "rewinds": self.rewinds,
        }

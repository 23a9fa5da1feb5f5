"""Which updates are left out because their step is not to be trusted, and when the run has to go back."""

import math
from collections import deque
from statistics import fmean, pstdev
from typing import Any

from neox.config import TrainConfig


class Guard:
    """Looks at each step's loss and gradient norm before its update. A state machine without tensors.

    A step is bad whose loss or norm is not finite, or, with `train.spike_sigma` = s, above mean + s standard deviations
    of those of the last `train.spike_window` updates, of which there must be half as many. (Both as in OLMo-core's
    SkipStepOptimizer.) A bad step's update is left out, and its figures do not count among the later ones' past.
    """

    def __init__(self, config: TrainConfig, state: dict[str, Any] | None = None) -> None:
        """Goes on from `state()`. Raises KeyError, TypeError or ValueError where it is no such state."""
        self.sigma, self.limit, self.most = config.spike_sigma, config.rewind_after, config.max_rewinds
        self.least = -(-config.spike_window // 2)
        state = state or {"losses": [], "norms": [], "bad_in_a_row": 0, "rewinds": []}
        self.losses = deque(map(float, state["losses"]), config.spike_window)
        self.norms = deque(map(float, state["norms"]), config.spike_window)
        self.bad_in_a_row = int(state["bad_in_a_row"])
        # From which step, the bad ones done, to which checkpoint's.
        self.rewinds: list[tuple[int, int]] = [(int(left), int(to)) for left, to in state["rewinds"]]

    def judge(self, loss: float, norm: float, scaled: bool = False) -> str | None:
        """What is wrong with a step, None where nothing is. With loss scaling (`scaled`) a norm that is not finite is
        the scaler's business."""
        looked_at = (("loss", loss, self.losses, False), ("gradient norm", norm, self.norms, scaled))
        for name, value, past, excused in looked_at:
            if not math.isfinite(value):
                if not excused:
                    return f"{name} is not finite"
            elif self.sigma and len(past) >= self.least and value > (limit := fmean(past) + self.sigma * pstdev(past)):
                return f"{name} {value:.4g} is above {limit:.4g}, {self.sigma:g} standard deviations"
        return None

    def count(self, loss: float, norm: float, bad: bool) -> None:
        """Take the step into account."""
        self.bad_in_a_row = self.bad_in_a_row + 1 if bad else 0
        if self.sigma and not bad and math.isfinite(norm):
            self.losses.append(loss)
            self.norms.append(norm)

    @property
    def gives_up(self) -> bool:
        """Whether leaving out more updates will not help."""
        return self.bad_in_a_row >= self.limit

    def way_back(self, step: int, checkpoints: list[int]) -> tuple[int, int]:
        """The checkpoint to go back to after `step` steps, and from which step on data is to be stepped over.

        The first time: the newest checkpoint from before the bad steps; their data, and that of as many steps before
        them, since an update that does harm shows in the steps after it. Where the run has since not come past the
        point of its last rewind, that was not enough: an older checkpoint, and all that was read since.
        Raises ValueError where there is no such checkpoint, and after `train.max_rewinds` of them.
        """
        begin = step - self.bad_in_a_row
        again = bool(self.rewinds) and begin < self.rewinds[-1][0]
        sound = [done for done in checkpoints if done <= begin and not (again and done >= self.rewinds[-1][1])]
        if len(self.rewinds) >= self.most or not sound:
            why = f"after {len(self.rewinds)} rewinds" if self.rewinds else "and there is no checkpoint from before"
            why = "and train.max_rewinds=0" if not self.most else why
            raise ValueError(
                f"no update was possible in the {self.bad_in_a_row} steps up to step {step}, {why}: look at the data, "
                "lower optim.lr, or see to a checkpoint before them (checkpoint.every)"
            )
        to = max(sound)
        return to, to if again else max(to, begin - self.limit)

    def state(self) -> dict[str, Any]:
        """What a resumed run needs; settings are the config's."""
        return {
            "losses": list(self.losses),
            "norms": list(self.norms),
            "bad_in_a_row": self.bad_in_a_row,
            "rewinds": self.rewinds,
        }

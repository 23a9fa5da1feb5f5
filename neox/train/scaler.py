"""Dynamic loss scaling for fp16: the loss is multiplied so that small gradients do not vanish in 16 bits."""

from typing import Any

from neox.config import OptimConfig

FACTOR = 2.0
LONGEST = 50
"""Skipped updates in a row after which gpt-neox, and so we, give up."""
ADVICE = "train.dtype=bf16 has the range of fp32; else lower optim.lr, or look at the data of this step"


class LossScaler:
    """gpt-neox's dynamic scaler (DeepSpeed's), a state machine without tensors.

    An overflow, that is a gradient norm that is not finite, skips the update. It uses up one of `hysteresis` overflows;
    the last of them, and each one after it, halves the scale. An update whose distance from the last overflow is a
    multiple of `window` doubles the scale and grants all of `hysteresis` again.
    """

    def __init__(self, initial: float = 2.0**12, window: int = 1000, hysteresis: int = 2, minimum: float = 1.0) -> None:
        self.scale, self.window, self.hysteresis, self.minimum = float(initial), window, hysteresis, minimum
        self.tolerated = hysteresis  # overflows that are left before the scale is halved, that one included
        self.step = 0
        self.last_overflow = -1
        self.skipped = 0  # in a row

    def update(self, overflow: bool, where: str = "") -> None:
        """Take a step into account, whose gradients overflowed or not.

        Raises ValueError, led by `where`, at an overflow with the scale at its minimum, and after 50 in a row.
        """
        if overflow:
            self.skipped += 1
            if self.skipped == LONGEST:
                raise ValueError(
                    f"{where}fp16 gradients overflowed in {LONGEST} steps in a row: lower optim.loss_scale; {ADVICE}"
                )
            if self.tolerated > 1:
                self.tolerated -= 1
            elif self.scale <= self.minimum:
                raise ValueError(
                    f"{where}fp16 gradients overflow at the smallest loss scale, {self.minimum:g}: {ADVICE}"
                )
            else:
                self.scale = max(self.scale / FACTOR, self.minimum)
            self.last_overflow = self.step
        else:
            self.skipped = 0
            if (self.step - self.last_overflow) % self.window == 0:
                self.tolerated = self.hysteresis
                self.scale *= FACTOR
        self.step += 1

    def state(self) -> dict[str, Any]:
        """State for a resumed run; settings are the config's."""
        return {name: getattr(self, name) for name in _STATE}

    def load(self, state: dict[str, Any]) -> None:
        """Continue from `state()`. Raises ValueError where it is no such state."""
        if set(state) != set(_STATE) or not all(isinstance(state[name], kind) for name, kind in _STATE.items()):
            raise ValueError(f"not the state of a loss scaler: {state}")
        for name in _STATE:
            setattr(self, name, state[name])


_STATE: dict[str, type] = {"scale": float, "tolerated": int, "step": int, "last_overflow": int, "skipped": int}


def build_scaler(optim: OptimConfig, state: dict[str, Any]) -> LossScaler:
    """Scaler with the config's settings; it continues from `state`, where there is any."""
    scaler = LossScaler(optim.loss_scale, optim.loss_scale_window, optim.loss_scale_hysteresis, optim.loss_scale_min)
    if state:
        scaler.load(state)
    return scaler

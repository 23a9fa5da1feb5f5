"""Rows of metrics.jsonl: the figures of a logged step, and the clock behind its speed."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from neox.config import Config
from neox.data.loader import Loader
from neox.model.flops import recomputed_share, train_flops_per_token
from neox.system.files import read_rows

__all__ = ["Meter", "make_row", "read_rows"]


class Meter:
    """Clock of the steps of one call of `Trainer.fit`.

    Between two rows it counts training alone: evaluations, checkpoints and hooks run inside `paused`. On an accelerator
    steps are queued, so `take` is to be called after the loss has been read, and a pause in which something happens
    waits for the queue first.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self.device, self.clock = device, clock
        self.began = self.since = clock()
        self.steps = self.steps_since = 0
        self.away = 0.0  # seconds since the last row that were not training

    def step(self) -> None:
        """Count a step as done."""
        self.steps += 1
        self.steps_since += 1

    @contextmanager
    def paused(self, wait: bool = True) -> Iterator[None]:
        """Leave the time inside out of training's; without `wait` the device's queue is not waited for first."""
        if wait and self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        started = self.clock()
        try:
            yield
        finally:
            self.away += self.clock() - started

    def take(self) -> tuple[float, float]:
        """Seconds of training per step since the last call; seconds per step, pauses included, since the beginning."""
        now = self.clock()
        seconds = (now - self.since - self.away) / max(1, self.steps_since)
        self.since, self.steps_since, self.away = now, 0, 0.0
        return seconds, (now - self.began) / max(1, self.steps)


def make_row(
    config: Config,
    *,
    step: int,
    loss: float,
    norm: float,
    lr: float,
    seconds: float,
    elapsed: float,
    loader: Loader,
    spent: float,
    memory: int,
    peak_flops: float,
    now: float,
    world_size: int = 1,
    epochs: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Build the row of a logged step.

    Args:
        step: optimizer steps done.
        loss, norm, lr: of that step: nats per token, global gradient norm before clipping, learning rate.
        seconds, elapsed: from `Meter.take`: training time per step, and time per step with all that lies between.
        loader: batches of the run: position in the data, tokens read, size of the step.
        spent: seconds that the run has taken so far, over all calls, starts and evaluations included.
        memory: bytes at the peak, on this rank.
        peak_flops: FLOP/s that one device can reach; world_size: how many there are.
        now: seconds since the epoch.
        epochs: how often each entry of data.train has been read, by its name.

    `mfu` counts the FLOPs that the model needs, recomputation left out, with every query meeting every key (6N + 12LCT,
    the convention of most published figures); `mfu_causal` counts half of that attention term, what the mask keeps.
    `hfu` is `mfu` with the recomputation of activation checkpointing counted; without any the row has none.
    `tokens_per_second` is over all ranks; `eta` is in seconds.
    """
    length = config.data.seq_length
    tokens = loader.size(step - 1) * length
    recomputed = recomputed_share(config.model, length, config.train.activation_checkpointing)

    def utilisation(causal: bool = False, recomputed: float = 0.0) -> float:
        flops = tokens * train_flops_per_token(config.model, length, causal, recomputed)
        return flops / seconds / (peak_flops * world_size)

    row = {
        "step": step,
        "loss": loss,
        "lr": lr,
        "grad_norm": norm,
        "tokens": loader.read(step) * length,
        "samples": loader.position(step),
        "tokens_per_second": tokens / seconds,
        "mfu": utilisation(),
        "mfu_causal": utilisation(causal=True),
        "memory": memory,
        "seconds": seconds,
        "eta": elapsed * (config.train.steps - step),
        "spent": spent,
        "time": now,
    }
    if recomputed:
        row["hfu"] = utilisation(recomputed=recomputed)
    return row | {f"epochs/{name}": times for name, times in (epochs or {}).items()}

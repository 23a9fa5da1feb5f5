"""Estimate of the models that this computer can train and run, from two measurements of a second each.

Training. A step costs 6 FLOPs per parameter and token (2 forward, 4 backward; Kaplan et al. 2020, arXiv 2001.08361),
and 20 tokens per parameter use compute well (Hoffmann et al. 2022, arXiv 2203.15556). N parameters then cost
6 N * 20 N = 120 N^2 FLOPs, so in T seconds at half the measured matmul rate R

    N = sqrt(R / 2 * T / 120)

and never more than memory holds at 16 bytes per parameter (fp32 weight, gradient and two moments).

Running. Each token of one sequence reads every weight once, so B bytes/s of memory give at most B / (N * bytes per
weight) tokens/s, 4 bytes in fp32 and 1 in int8. A model fits where its weights take at most four fifths of memory.
"""

import math
from dataclasses import dataclass

from neox.config import load_config
from neox.config.presets import names
from neox.model.flops import parameters
from neox.model.training_memory import GRADIENT, MOMENTS, WEIGHT
from neox.system.console import human_count, human_duration, human_gib
from neox.system.machine import available_cores, available_ram, read_speed

_COUNTED = {n: parameters(load_config(n).model).total for n in names() if n.startswith("pythia-") or n == "neox-20b"}
SIZES = dict(sorted(_COUNTED.items(), key=lambda size: size[1]))  # parameters, embedding and head included
HOUR = 3600.0
NIGHT = 8 * HOUR
TOKENS_PER_PARAMETER = 20
MFU = 0.5
MEMORY_SHARE = 0.8  # of RAM; the rest is for activations, the cache and everybody else
WEIGHT_BYTES = {"fp32": 4, "int8": 1}


@dataclass(frozen=True)
class Machine:
    """Figures of a computer that limit a language model."""

    cores: int  # that this process may use
    ram_bytes: int  # that this process may use
    matmul_flops: float  # FLOP/s of a float32 matrix product, all threads
    read_bytes: float  # bytes/s read from memory, all threads

    def trainable(self, seconds: float) -> int:
        """Parameters that can be trained on 20 tokens each in `seconds`, by the formula above."""
        by_time = math.sqrt(self.matmul_flops * MFU * seconds / (6 * TOKENS_PER_PARAMETER))
        return int(min(by_time, self.ram_bytes * MEMORY_SHARE / (WEIGHT + GRADIENT + MOMENTS)))

    def training_seconds(self, parameters: int) -> float:
        """Seconds to train `parameters` on 20 tokens each: 120 N^2 / (R / 2)."""
        return 6 * TOKENS_PER_PARAMETER * parameters**2 / (self.matmul_flops * MFU)

    def tokens_per_second(self, parameters: int, weight_bytes: float) -> float:
        """Upper bound on the tokens/s of one sequence, by memory bandwidth."""
        return self.read_bytes / (parameters * weight_bytes)

    def largest(self, weight_bytes: float) -> str | None:
        """Name of the largest known size whose weights fit, None where even the smallest does not."""
        fitting = [name for name, n in SIZES.items() if n * weight_bytes <= MEMORY_SHARE * self.ram_bytes]
        return fitting[-1] if fitting else None

    def lines(self) -> list[str]:
        """Describe the machine, the models it can train and those it can run, in three lines."""
        found = (
            f"This machine: {self.cores} core{'s' * (self.cores != 1)}, {human_gib(self.ram_bytes)} of memory, "
            f"{self.matmul_flops / 1e9:,.0f} GFLOP/s (fp32 matmul), {self.read_bytes / 1e9:,.1f} GB/s read"
        )
        smallest = next(iter(SIZES))
        known = [n for n in SIZES if self.training_seconds(SIZES[n]) <= NIGHT and self.trainable(NIGHT) >= SIZES[n]]
        name = known[-1] if known else smallest
        train = (
            f"Trains here: {human_count(self.trainable(HOUR))} parameters in an hour, "
            f"{human_count(self.trainable(NIGHT))} in a night "
            f"({TOKENS_PER_PARAMETER} tokens a parameter at {MFU:.0%} MFU; "
            f"{name} takes {human_duration(self.training_seconds(SIZES[name]))})"
        )
        parts = []
        for dtype, size in WEIGHT_BYTES.items():
            name_ = self.largest(size)
            if name_ is not None:
                parts.append(f"{name_} in {dtype} ({_rate(self.tokens_per_second(SIZES[name_], size))})")
        run = f"Runs here: up to {', '.join(parts)}" if parts else f"Runs here: not even {smallest}, too little memory"
        return [found, train, run]


def measure_machine(seconds: float = 3.0) -> Machine:
    """Measure for about `seconds`."""
    import torch

    from neox.system.device import matmul_flops

    with torch.inference_mode():
        flops = matmul_flops(torch.device("cpu"), "fp32", seconds / 2)
        read = read_speed(seconds / 2)
    return Machine(available_cores(), available_ram(), flops, read)


def _rate(tokens: float) -> str:
    """12.3 -> "at most 12 tokens/s"."""
    return f"at most {tokens:.2g} tokens/s" if tokens < 9.95 else f"at most {tokens:,.0f} tokens/s"

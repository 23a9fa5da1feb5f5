"""Tokens per second, and the share of the memory's read speed: the limit, since each token reads all weights."""

import time

from torch import nn

from neox.generate.engine import Engine
from neox.generate.requests import Event
from neox.system.fingerprint import inner_tensors
from neox.system.machine import read_speed

LEAST = 50_000_000  # bytes of weights from which their reading, from memory and not from a cache, is the limit


class Rate:
    """Count the events of one engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.began = self.first = self.last = time.perf_counter()
        self.tokens = 0

    def count(self, event: Event) -> None:
        self.last = time.perf_counter()
        self.first = self.first if self.tokens else self.last
        self.tokens += event.token is not None

    @property
    def per_second(self) -> float:
        """Tokens per second after the first one, which waits for the prompt; 0 without a second token."""
        return (self.tokens - 1) / (self.last - self.first) if self.tokens > 1 and self.last > self.first else 0.0

    def line(self) -> str:
        """One line for people; for large weights it measures the memory's read speed for a moment."""
        line = f"{self.tokens} tokens, the first after {self.first - self.began:.2f} s"
        if self.per_second:
            line += f", {self.per_second:.1f} tokens/s"
        read = bytes_read(self.engine.model)
        if not self.per_second or read < LEAST or self.engine.drafter:
            return line
        used = read * self.per_second
        if self.engine.weight.device.type != "cpu":
            return f"{line}, {used / 1e9:.1f} GB/s of weights"
        best = read_speed(0.5)
        return f"{line}, {used / 1e9:.1f} of {best / 1e9:.1f} GB/s that this machine reads, {used / best:.0%}"


def bytes_read(model: nn.Module) -> int:
    """Bytes of weights read for each token: all but the embeddings, of which a token reads one row."""
    tensors = [
        tensor
        for name, module in model.named_modules()
        if not name.startswith("embed_") or name == "embed_out"
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None
    ]
    return sum(part.nbytes for tensor in tensors for part in inner_tensors(tensor))

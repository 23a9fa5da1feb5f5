"""Run directories as a run would have left them."""

import json
import math
import struct
from pathlib import Path

from neox.config import load_config


def rows(steps: int, every: int = 1, valid_every: int = 0, tokens: int = 128, seconds: float = 0.5):
    """Rows of a run that learns; loss and norm are single precision, as a run's are."""
    for step in range(1, steps + 1):
        if step in (1, steps) or step % every == 0:
            yield {
                "step": step,
                "loss": single(9 / (1 + step) + 2 + 0.1 * math.sin(step)),
                "lr": 1e-3 / step,
                "grad_norm": single(1 / step),
                "tokens": step * tokens,
                "tokens_per_second": tokens / seconds,
                "mfu": 0.4,
                "memory": 1 << 30,
                "seconds": seconds,
                "time": 1.7e9 + step,
            }
        if valid_every and step % valid_every == 0:
            yield {"step": step, "valid_loss": single(9 / (1 + step) + 2.1)}


def single(value: float) -> float:
    return struct.unpack("<f", struct.pack("<f", value))[0]


def write_run(folder: Path, content, *options: str, tail: bytes = b"") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = load_config(overrides=[f"out={folder}", *options])
    (folder / "config.toml").write_text(config.to_toml())
    (folder / "metrics.jsonl").write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in content) + tail)
    return folder

"""Speed and memory of a model on this CPU for each kind of weights."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from neox.checkpoint import weights_dtype
from neox.generate.loading import load_engine
from neox.generate.rate import bytes_read
from neox.generate.sampling import Sampling
from neox.quantization.packed import lossless
from neox.system.machine import read_speed


@dataclass(frozen=True)
class Speed:
    """The speed of one kind of weights."""

    weights: str
    bytes_read: int  # by each token
    prefill: float  # prompt tokens a second
    decode: float  # tokens a second, one sequence
    share: float  # of the machine's read speed that decoding uses


def measure(source: str | Path, kinds: Sequence[str], prompt: int = 128, tokens: int = 32) -> list[Speed]:
    """Measure a model on this CPU for each of `kinds` (`loading.WEIGHTS`), loaded one after the other.

    A prompt of `prompt` tokens, then greedy decoding; decoding speed is the median of the steps.
    """
    speeds, best = [], read_speed(1.0)
    for kind in kinds:
        engine = load_engine(source, "cpu", weights=kind, slots=1)
        room = engine.model.config.max_position_embeddings
        length = max(1, min(prompt, room - tokens - 1))
        ids = [number % engine.num_real_tokens for number in range(1, length + 1)]
        sampling = Sampling(max_tokens=min(tokens, room - length), temperature=0, stop_at_eod=False)
        engine.generate(
            [ids[:1]], Sampling(max_tokens=2, temperature=0, stop_at_eod=False)
        )  # kernels are compiled here
        times = [time.perf_counter()]
        times += [time.perf_counter() for _ in engine.events([ids], [sampling], stream=False)]
        steps = [after - before for before, after in pairwise(times[1:])]
        decode = 1 / statistics.median(steps)
        read = bytes_read(engine.model)
        speeds.append(Speed(kind, read, length / (times[1] - times[0]), decode, read * decode / best))
    return speeds


def report(source: str | Path, kinds: Sequence[str]) -> str:
    """The table of `measure`, and the choice of weights=auto with its reason."""
    lines = [f"{'weights':<8}{'GB a token':>12}{'prompt tokens/s':>18}{'tokens/s':>11}{'of read speed':>15}"]
    for row in measure(source, kinds):
        lines.append(
            f"{row.weights:<8}{row.bytes_read / 1e9:>12.3f}{row.prefill:>18,.0f}{row.decode:>11.1f}{row.share:>15.0%}"
        )
    stored = weights_dtype(source)
    taken = lossless(stored) or "torch"
    why = f"loses nothing of {str(stored).removeprefix('torch.')} weights"
    if taken == "torch":
        why += "; there are no compiled kernels for this machine"
    return "\n".join([*lines, "", f"weights=auto takes {taken}: {why}"])

"""What it costs on a CPU that a request's bits do not depend on what runs beside it: one set of weights, three ways.

    python benchmarks/invariance.py [shape=pythia-160m] [turns=7] [tokens=32]

`torch` leaves the layers to torch with `Engine(invariant=False)`; `torch, invariant` fills its passes up, the default
for such a model; `packed` (weights=fp32) is so by construction. In turn, in one process, random float32 weights,
greedy: tokens/s of `tokens` new ones after a prompt of 16, for 1 and for 8 sequences, and of a prompt of 256. Medians
over the turns.
"""

import copy
import statistics
import sys
import time

import torch

from neox.config import load_config
from neox.generate import Engine, Sampling
from neox.model.decoder import GPTNeoX
from neox.quantization.packed import quantize

PROMPT, PREFILL, BATCHES = 16, 256, (1, 8)


def main(shape, turns, tokens):
    model = GPTNeoX(load_config(shape).model).initialize(1).requires_grad_(False).eval()
    packed = quantize(copy.deepcopy(model), "fp32")
    ways = {"torch": (model, False), "torch, invariant": (model, True), "packed": (packed, None)}
    found = {way: [] for way in ways}
    for turn in range(turns + 1):
        for way, (own, invariant) in ways.items():
            rates = measure(own, invariant, tokens)
            if turn:  # the first warms up
                found[way].append(rates)
    print(f"{shape}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| | tokens/s, batch 1 | batch 8 | prefill |\n|---|---|---|---|")
    for way, rows in found.items():
        middle = (f"{statistics.median(column):.1f}" for column in zip(*rows, strict=True))
        print(f"| {way} | {' | '.join(middle)} |")


def measure(model, invariant, tokens):
    """Tokens/s for each batch, and of the prompt alone."""
    rates = []
    for batch in BATCHES:
        engine = Engine(model, slots=batch, invariant=invariant)
        prompts = [[1 + batch + row + place for place in range(PROMPT)] for row in range(batch)]
        asked = Sampling(max_tokens=1 + tokens, temperature=0, stop_at_eod=False)
        times = [time.perf_counter() for _ in engine.events(prompts, asked, stream=False)]
        rates.append(batch * tokens / (times[-1] - times[batch - 1]))
    engine = Engine(model, slots=1, invariant=invariant)
    engine.generate([[1]], Sampling(max_tokens=1))  # how rows are rounded is tried here
    started = time.perf_counter()
    engine.generate([list(range(2, 2 + PREFILL))], Sampling(max_tokens=1, temperature=0))
    return [*rates, PREFILL / (time.perf_counter() - started)]


if __name__ == "__main__":
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    main(given.get("shape", "pythia-160m"), int(given.get("turns", 7)), int(given.get("tokens", 32)))

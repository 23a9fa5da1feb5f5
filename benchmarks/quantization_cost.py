"""Cost of quantized weights on a trained model: bits a byte and perplexity.

    python benchmarks/quantization_cost.py [folder=runs/trained] [steps=1500] [limit=BYTES]

Trains the pythia-14m shape (4096 tokens) on the standard library's source for that many steps of 16 x 256 tokens, once,
and scores the files held out (one in ten) with its weights as `neox generate weights=` holds them on a CPU: every token
given up to a context of 256, an end-of-document token first. `against fp16` is the change of the bits, with its
standard error over the files (the same files, so chance moves both alike). `limit` reads so much of the library, for a
trial.
"""

import math
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import trained

KINDS = ("fp32", "fp16", "bf16", "w16a16", "int8", "int4")
SHAPE = ("pythia-14m", "seq_length=256", "micro_batch_size=16", "global_batch_size=16", "checkpoint.every=0")


def main(folder, steps, limit):
    prefix, held_out = trained.text(folder, limit)
    source = trained.run(prefix, f"14m-{steps}", *SHAPE, f"steps={steps}")
    found = {kind: score(source, kind, held_out) for kind in KINDS}
    size = sum(len(text.encode()) for text in held_out)
    print(f"\npythia-14m shape, {steps} steps; {len(held_out)} files held out, {size:,} bytes\n")
    print("| weights | bits a byte | perplexity of a token | bits, against fp16 |\n|---|---|---|---|")
    for kind in KINDS:
        nats = sum(nats for nats, _ in found[kind])
        tokens = sum(tokens for _, tokens in found[kind])
        change, error = against(found[kind], found["fp16"])
        print(
            f"| {kind} | {nats / math.log(2) / size:.5f} | {math.exp(nats / tokens):.4f} | "
            f"{change:+.3%} ± {error:.3%} |",
            flush=True,
        )


def score(source, kind, texts):
    """(nats, tokens) of each text."""
    from neox.generate import token_logprobs
    from neox.generate.loading import load_engine

    engine = load_engine(source, "cpu", weights=kind)
    model, tokenizer = engine.model, engine.tokenizer
    found = []
    for text in texts:
        logprobs = token_logprobs(model, tokenizer.encode(text), 256, first=tokenizer.eod_id)
        found.append((-logprobs.double().sum().item(), len(logprobs)))
    return found


def against(these, those):
    """The relative change of all nats, and its standard error (a ratio's, over the texts)."""
    base = sum(nats for nats, _ in those)
    change = sum(nats for nats, _ in these) / base - 1
    residues = [a - (1 + change) * b for (a, _), (b, _) in zip(these, those, strict=True)]
    error = statistics.stdev(residues) * math.sqrt(len(residues)) / base if len(residues) > 1 else math.nan
    return change, error


if __name__ == "__main__":
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    if unknown := set(given) - {"folder", "steps", "limit"}:
        raise SystemExit(f"{unknown.pop()}: no such option; there are folder, steps and limit")
    most = int(given["limit"]) if "limit" in given else None
    main(Path(given.get("folder", "runs/trained")).resolve(), int(given.get("steps", 1500)), most)

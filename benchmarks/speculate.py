"""Speculative decoding: tokens/s with and without, on text that a trained model continues.

    python benchmarks/speculate.py [folder=runs/trained] [width=256] [steps=800] [turns=3] [tokens=256] [prompts=8]

Trains, once, a model (4 blocks of `width`, 4096 tokens) and a draft model (1 block of 64, the same tokenizer) on the
standard library's source, `steps` steps of 8 x 512 tokens (`limit` reads only so many bytes of it, for a trial). Each
way of drafting then continues the beginnings (128 tokens) of held-out files, one at a time, on a CPU with weights as
they are stored, greedy and at temperature 0.7: none, `speculate=prompt`, `draft=`. They take turns on each prompt.
Accepted: share of draft tokens that were sampled. `same`: the tokens are those without drafts.
Rates are all tokens over all seconds, prompts included; the median over the turns.
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import trained

PROMPT = 128
COMMON = ("seq_length=512", "micro_batch_size=8", "global_batch_size=8", "checkpoint.every=0", "num_attention_heads=4")
CONTEXT = "model.max_position_embeddings=1024"


def main(folder, width, steps, turns, tokens, prompts, limit):
    from neox.generate import Sampling
    from neox.generate.loading import load_engine

    prefix, held_out = trained.text(folder, limit)
    large, small = (
        trained.run(
            prefix,
            f"{layers}x{size}-{steps}",
            *(*COMMON, CONTEXT, f"hidden_size={size}", f"num_hidden_layers={layers}", f"steps={steps}"),
        )
        for layers, size in ((4, width), (1, 64))
    )
    ways = {"none": {}, "prompt": {"speculate": "prompt"}, "draft": {"draft": str(small)}}
    print(
        "| temperature | drafts from | tokens/s | times | accepted | tokens a step | same |\n"
        "|---|---|---|---|---|---|---|"
    )
    for temperature in (0.0, 0.7):
        sampling = Sampling(max_tokens=tokens, temperature=temperature, stop_at_eod=False)
        rates = {way: [] for way in ways}
        for _ in range(turns):
            # Made anew, so that no prompt is in the cache.
            engines = {way: load_engine(large, "cpu", slots=1, **options) for way, options in ways.items()}
            for engine in engines.values():
                engine.generate([[1, 2]], Sampling(max_tokens=2))  # kernels are compiled here
            starts = [engines["none"].tokenizer.encode(text)[:PROMPT] for text in held_out]
            chosen = [ids for ids in starts if len(ids) == PROMPT][:prompts]
            spent, sampled, steps_taken = dict.fromkeys(ways, 0.0), {way: [] for way in ways}, dict.fromkeys(ways, 0)
            for ids in chosen:
                for way, engine in engines.items():
                    started = time.perf_counter()
                    number = engine.submit(ids, sampling, stream=False)
                    while engine.busy:
                        events = engine.step()
                        steps_taken[way] += bool(events)
                        sampled[way] += [event.token for event in events if event.number == number]
                    spent[way] += time.perf_counter() - started
            for way in ways:
                rates[way].append(len(sampled[way]) / spent[way])
        for way, engine in engines.items():
            stats, rate = engine.stats, statistics.median(rates[way])
            accepted = f"{stats.accepted / stats.drafted:.0%}" if stats.drafted else ""
            print(
                f"| {temperature} | {way} | {rate:.1f} | {rate / statistics.median(rates['none']):.2f} | {accepted} | "
                f"{len(sampled[way]) / steps_taken[way]:.2f} | {'yes' if sampled[way] == sampled['none'] else 'no'} |",
                flush=True,
            )


if __name__ == "__main__":
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    numbers = {"width": 256, "steps": 800, "turns": 3, "tokens": 256, "prompts": 8, "limit": None}
    if unknown := set(given) - numbers.keys() - {"folder"}:
        raise SystemExit(f"{unknown.pop()}: no such option; there are folder, {', '.join(numbers)}")
    numbers |= {name: int(value) for name, value in given.items() if name in numbers}
    main(Path(given.get("folder", "runs/trained")).resolve(), **numbers)

"""Generating on one GPU: neox and transformers in turn, beside what the card's memory allows.

    python benchmarks/decode_gpu.py [sizes=1.4b,20b] [turns=3] [tokens=128] [limit=1700] VARIANTS

A VARIANT is one argument, "ours KIND [KEY=VALUE]" or "peer KIND [KEY=VALUE]"; without any they are VARIANTS below.
    ours: KIND bf16, fp16, int8, int4, float8 (torchao); static=false: without recorded passes; compile=true:
          the products of 16-bit weights compiled too, as those of fewer bits always are
    peer: KIND bf16 or fp16; cache=static: its static cache, with the forward pass that it compiles for it

Published shapes, random weights made on the card layer by layer, greedy, no end-of-document token. Each measurement is
a process of its own, which runs everything once before it measures, so that kernels are compiled and passes recorded.
Decoding: a prompt of 128, then `tokens` new ones, for 1 and 8 sequences at once, without the time of the first token.
Prefill: one prompt of 512 with one new token. Before it, how fast the card reads 1 GiB (the better of a sum and a copy,
which reads and writes). The roofline is that over the bytes of the weights that a token reads, at batch 1; keys and
values are not counted. Memory is what torch had from the card at most. Medians over the turns; rows go to
$OUT/decode_gpu.jsonl too, where OUT is set. `device=cpu sizes=tiny` shows that the script runs, nothing else.
"""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import peers

SIZES = {"160m": "pythia-160m", "1.4b": "pythia-1.4b", "6.9b": "pythia-6.9b", "20b": "neox-20b", "tiny": "pythia-14m"}
TINY = ("model.vocab_size=256", "model.hidden_size=64", "model.num_hidden_layers=2", "model.num_attention_heads=2")
VARIANTS = ("ours bf16", "ours bf16 static=false", "ours int8", "ours int4", "peer bf16", "peer bf16 cache=static")
BATCHES = (1, 8)


# --- a measurement, in its own process -------------------------------------------------------------------------------


def measure(job):
    """One variant on one shape: rates, bytes, and the card's own speed."""
    import torch

    from neox.system.device import peak_memory

    device = torch.device(job["device"])
    read = read_speed(device)
    prompt, long = (8, 16) if job["size"] == "tiny" else (128, 512)
    # Two rows more, for the prefill alone: what was read before is in our cache of prefixes.
    size = (max(BATCHES) + 2, long)
    ids = torch.randint(1, shape(job).vocab_size, size, generator=torch.Generator().manual_seed(0)).tolist()
    run, size = (ours if job["who"] == "ours" else peer)(job, device)
    found = {"read": read, "bytes": size}
    for batch in BATCHES:
        prompts = [row[:prompt] for row in ids[:batch]]
        run(prompts, job["tokens"])
        first, last = run(prompts, job["tokens"])
        found[f"decode{batch}"] = batch * (job["tokens"] - 1) / (last - first)
    run([ids[-1]], 1)
    first, _ = run([ids[-2]], 1)
    memory = torch.cuda.max_memory_reserved() if device.type == "cuda" else peak_memory(device)
    return found | {"prefill": long / first, "memory": memory}


def shape(job):
    from neox.config import load_config

    return load_config(SIZES[job["size"]], overrides=TINY if job["size"] == "tiny" else ()).model


def ours(job, device):
    """(prompts, tokens) -> seconds until all have a token, and until all are done; and the bytes that a token reads."""
    import torch
    from torch import nn

    from neox.generate import Engine, Sampling
    from neox.generate.rate import bytes_read
    from neox.model.decoder import GPTNeoX
    from neox.quantization import torchao_weights
    from neox.system.device import resolve_dtype

    kind, options = job["kind"], job["options"]
    fewer = kind in torchao_weights.KINDS
    pack = torchao_weights.packing(kind, device) if fewer else None
    with torch.device("meta"):
        model = GPTNeoX(shape(job))
    for name, module in list(model.named_modules()):
        if not module._parameters:
            continue
        module.to_empty(device=device).to(resolve_dtype("bf16" if fewer else kind))
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.02)
        if pack:
            model.set_submodule(name, pack(name, module))
    model.requires_grad_(False)
    if fewer or options.get("compile") == "true":
        torchao_weights.compile_products(model)
    engine = Engine(model, slots=max(BATCHES), budget=512, static=options.get("static", "true") == "true")

    def run(prompts, tokens):
        sampling = Sampling(max_tokens=tokens, temperature=0, stop_at_eod=False)
        waiting = set(range(len(prompts)))
        started, first = time.perf_counter(), None
        for event in engine.events(prompts, sampling, stream=False):
            waiting.discard(event.number)
            if first is None and not waiting:
                first = time.perf_counter() - started
        return first, time.perf_counter() - started

    return run, bytes_read(model)


def peer(job, device):
    """The same measurement of transformers."""
    import torch

    from neox.system.device import resolve_dtype

    torch.set_default_dtype(resolve_dtype(job["kind"]))
    with torch.device(device):
        model = peers.gpt_neox(shape(job)).eval()
    cache = {"cache_implementation": job["options"]["cache"]} if "cache" in job["options"] else {}

    def timed(prompts, tokens):
        ids = torch.tensor(prompts, device=device)
        started = time.perf_counter()
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            **cache,
        )
        assert out.shape[1] == len(prompts[0]) + tokens
        out.tolist()  # waits for the device
        return time.perf_counter() - started

    def run(prompts, tokens):
        return timed(prompts, 1), timed(prompts, tokens)

    read = sum(p.nbytes for name, p in model.named_parameters() if "embed_in" not in name)
    return run, read


def read_speed(device):
    """Bytes a second: the better of a sum and of a copy, which moves twice as many, of 1 GiB (on a CPU 64 MiB)."""
    import torch

    count = 2**30 if device.type == "cuda" else 2**26
    x = torch.ones(count // 2, dtype=torch.bfloat16, device=device)
    y = torch.empty_like(x)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    best = 0.0
    for operation, moved in ((lambda: x.view(torch.int32).sum(), count), (lambda: y.copy_(x), 2 * count)):
        for _ in range(5):
            wait()
            started = time.perf_counter()
            operation()
            wait()
            best = max(best, moved / (time.perf_counter() - started))
    return best


# --- the parent ------------------------------------------------------------------------------------------------------


def job_of(size, variant, settings):
    who, kind, *words = variant.split()
    kinds = ("bf16", "fp16", "fp32") + (("int8", "int4", "float8") if who == "ours" else ())
    if who not in ("ours", "peer") or kind not in kinds or not all("=" in word for word in words):
        raise SystemExit(f'{variant!r}: a variant is "ours KIND KEY=VALUE ..." or "peer KIND KEY=VALUE ..."')
    options = dict(word.split("=") for word in words)
    return settings | {"size": size, "variant": variant, "who": who, "kind": kind, "options": options}


def row_of(job, turns, wrong):
    row = {"size": job["size"], "variant": job["variant"], "turns": len(turns), "wrong": wrong}
    if not turns:
        return row
    middle = {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
    roofline = statistics.median(turn["read"] / turn["bytes"] for turn in turns)
    share = statistics.median(turn["decode1"] * turn["bytes"] / turn["read"] for turn in turns)
    return row | middle | {"roofline": roofline, "share": share, "all": turns}


def show(rows):
    print("\n| model | variant | tokens/s, batch 1 | roofline | share | batch 8 | prefill tokens/s | read GB/s | GiB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        start = f"| {row['size']} | {row['variant']} |"
        if row["turns"]:
            print(
                f"{start} {row['decode1']:,.1f} | {row['roofline']:,.1f} | {row['share']:.0%} | "
                f"{row['decode8']:,.1f} | {row['prefill']:,.0f} | {row['read'] / 1e9:,.0f} | "
                f"{row['memory'] / 2**30:.2f} |"
            )
        else:
            print(f"{start} {row['wrong']} | | | | | | |")


def main(arguments):
    import torch

    variants = [word for word in arguments if " " in word] or list(VARIANTS)
    options = dict(word.split("=", 1) for word in arguments if " " not in word)
    if unknown := set(options) - {"sizes", "turns", "tokens", "limit", "device"}:
        raise SystemExit(f"{unknown.pop()}: no such option; there are sizes, turns, tokens, limit and device")
    deadline = time.monotonic() + float(options.get("limit", 1700))
    device, sizes = options.get("device", "cuda"), options.get("sizes", "1.4b,20b").split(",")
    if set(sizes) - set(SIZES):
        raise SystemExit(f"sizes: are of {', '.join(SIZES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device: `device=cpu sizes=tiny` tries the script without one")
    if importlib.util.find_spec("transformers") is None:
        print("transformers is not installed: the peer is left out")
        variants = [variant for variant in variants if not variant.startswith("peer")]
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}", flush=True)
    settings = {"device": device, "tokens": int(options.get("tokens", 128))}
    rows = []
    for size in sizes:
        found = [(job_of(size, variant, settings), [], []) for variant in variants]
        for turn in range(int(options.get("turns", 3))):
            for job, turns, wrong in found if turn % 2 == 0 else found[::-1]:
                if wrong:
                    continue
                said = child(job, deadline - time.monotonic())
                if isinstance(said, str):
                    wrong += [] if turns else [said]
                    continue
                turns.append(said)
                print(f"{size} turn {turn}: {job['variant']}: {said['decode1']:,.1f} tokens/s at batch 1", flush=True)
        measured = [row_of(job, turns, "".join(wrong)) for job, turns, wrong in found]
        if "OUT" in os.environ:
            with open(Path(os.environ["OUT"], "decode_gpu.jsonl"), "a") as file:
                file.writelines(json.dumps(row | {"device": name}) + "\n" for row in measured)
        rows += measured
    show(rows)


def child(job, seconds):
    """The result of a measurement, or the reason why there is none; its stderr is shown."""
    environment = dict(os.environ, PYTORCH_ALLOC_CONF="expandable_segments:True", TOKENIZERS_PARALLELISM="false")
    command = [sys.executable, __file__, "measure=" + json.dumps(job)]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, timeout=max(1, seconds))
    except subprocess.TimeoutExpired:
        return "not measured in time"
    found = [line[1:] for line in done.stdout.splitlines() if line.startswith("@")]
    return json.loads(found[0]) if found else "failed, see above"


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1].startswith("measure="):
        print("@" + json.dumps(measure(json.loads(sys.argv[1].partition("=")[2]))), flush=True)
    else:
        main(sys.argv[1:])

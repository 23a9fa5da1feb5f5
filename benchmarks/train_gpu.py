"""Training on one GPU: neox and transformers' GPTNeoXForCausalLM in turn, beside the machine's own limit.

    python benchmarks/train_gpu.py [sizes=410m,1.4b,6.9b] [turns=3] [steps=2] [limit=570] [peak=989] VARIANTS

A VARIANT is one argument, "ours KEY=VALUE ..." or "peer KEY=VALUE ..."; without any they are "ours" and "peer".
    ours: any option of neox (train.compile=false, loss_chunk=8192, activation_checkpointing=full, train.float8=rowwise)
    peer: compile=model (default), blocks or none; params=fp32 (default: bf16 autocast, as ours) or bf16 (weights,
          gradients and moments in bf16: half the memory, other numerics)
    both: micro_batch_size=N, guard=true (loss and norm are read on the host before each update)

Pythia's shapes at 2048 tokens, random weights, random tokens, 32 sequences an optimizer step in as many microbatches as
it takes, bf16 products, fused AdamW, gradients clipped at norm 1. ours is what `neox train` runs: `parallel.build`'s
forward and backward pass, `clip_gradients`, the optimizers. The peer: sdpa attention, its own loss (labels=).

Each variant is a process of its own. Where all fit the card's memory together they stay and take turns; else each turn
starts them anew. Without micro_batch_size the largest power of two is taken that an estimate lets fit, at most 8, and
halved where memory runs out after all; a variant that runs out even so has a row that says it. A turn times `steps`
optimizer steps between two synchronizations, and a bf16 product of 8192 cubed before and after; medians over the turns.

MFU is of `peak` TFLOP/s (989: H100 and H200, dense bf16): 6 (N + head) + 12 L C T FLOPs a token, and `causal` with half
of the attention term; recomputation is never counted. `limit` are seconds for all: what is not measured by then is left
out. Rows go to $OUT/train_gpu.jsonl too, where OUT is set. `device=cpu sizes=tiny` is the same at a size for any
machine: it shows that the script runs, nothing else.
"""

import contextlib
import importlib.util
import json
import os
import queue
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import peers

SIZES = {"410m": "pythia-410m", "1.4b": "pythia-1.4b", "6.9b": "pythia-6.9b", "tiny": "pythia-14m"}
TINY = ("model.vocab_size=256", "model.hidden_size=64", "model.num_hidden_layers=2", "model.num_attention_heads=2")
MOST_ROWS = 8


# --- a variant, in its own process -----------------------------------------------------------------------------------


def config_of(job):
    """neox's config of the model and of one microbatch; the peer takes its shape from there."""
    from neox.config import load_config

    tiny = job["size"] == "tiny"
    own = job["options"] if job["kind"] == "ours" else {}
    length, sequences = (32, 4) if tiny else (2048, 32)
    settings = {
        "preset": SIZES[job["size"]],
        "train.dtype": "fp32" if job["device"] == "cpu" else "bf16",
        "train.device": job["device"],
        "train.loss_chunk": 4096,
        "data.seq_length": length,
        "train.global_batch_size": sequences,
    } | {key: value for key, value in own.items() if key != "guard"}
    settings["train.micro_batch_size"] = job["micro"]
    return load_config(overrides=[*(TINY if tiny else ()), *(f"{key}={value}" for key, value in settings.items())])


def ours(config, job, device):
    """(parameters, one step over microbatches that gives loss and norm before the update)."""
    import torch

    from neox.parallel import ParallelDims, build
    from neox.system.processes import Processes
    from neox.train import build_optimizers, clip_gradients

    dims = ParallelDims(Processes(), device, None)
    parts, forward_backward = build(config, dims)
    optimizers = build_optimizers(parts, config.optim)
    guard = job["options"].get("guard") == "true"

    def step(batches):
        loss = forward_backward(batches, 1 / sum(batch.tokens.numel() for batch in batches))
        norm = clip_gradients(parts, config.optim.clip, 1.0, dims)
        if guard:
            torch.stack((loss, norm)).tolist()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return sum(p.numel() for p in parts[0].parameters()), step


def peer(config, job, device):
    """The same of transformers."""
    import torch

    options = job["options"]
    half = options.get("params") == "bf16"
    with torch.device(device):
        model = peers.gpt_neox(config.model, use_cache=False)
    model.to(torch.bfloat16 if half else torch.float32).train()
    run = model
    compiled = options.get("compile", "none" if job["device"] == "cpu" else "model")
    if compiled == "model":
        run = torch.compile(model)
    elif compiled == "blocks":
        for layer in model.gpt_neox.layers:
            layer.compile()
    decay = config.optim.weight_decay
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=decay, fused=True)
    autocast = device.type != "cpu" and not half
    guard = options.get("guard") == "true"

    def step(batches):
        total = 0
        for batch in batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                loss = run(input_ids=batch.tokens, labels=batch.tokens).loss / len(batches)
            loss.backward()
            total = total + loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if guard:
            torch.stack((total, norm.float())).tolist()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return sum(p.numel() for p in model.parameters()), step


def work(job):
    """Build and warm up, say so, then time a turn for each line on stdin. Says `memory` where there is not enough."""
    import torch

    from neox.data import Batch

    device = torch.device(job["device"])
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    try:
        config = config_of(job)
        rows, length = config.train.micro_batch_size, config.data.seq_length
        count = config.train.global_batch_size // rows
        generator = torch.Generator(device).manual_seed(0)

        def batch():
            ids = torch.randint(config.model.vocab_size, (rows, length + 1), device=device, generator=generator)
            positions = torch.arange(length, device=device).repeat(rows, 1)
            return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), positions)

        parameters, step = (ours if job["kind"] == "ours" else peer)(config, job, device)
        batches = [batch() for _ in range(count)]
        for _ in range(2):
            step(batches)
        synchronize()
        say(ready=parameters)
        tokens = count * rows * length
        while sys.stdin.readline():
            limits = [matmul_rate(device)]
            synchronize()
            started = time.perf_counter()
            for _ in range(job["steps"]):
                step(batches)
            synchronize()
            rate = tokens * job["steps"] / (time.perf_counter() - started)
            limits.append(matmul_rate(device))
            say(rate=rate, matmul=max(limits), memory=used(device))
    except torch.OutOfMemoryError:
        say(short=True)


def matmul_rate(device):
    """FLOP/s of a bf16 product of 8192 cubed (on a CPU: of a small fp32 one) on random values."""
    import torch

    n, kind = (8192, torch.bfloat16) if device.type == "cuda" else (256, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=kind) for _ in range(2))
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(3):
        a @ b
    synchronize()
    started = time.perf_counter()
    for _ in range(20):
        a @ b
    synchronize()
    return 20 * 2 * n**3 / (time.perf_counter() - started)


def used(device):
    """Bytes at the peak that torch had from the card, reserved included; of a CPU the process's resident memory."""
    from neox.system.device import peak_memory

    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_reserved()
    return peak_memory(device)


def say(**found):
    print("@" + json.dumps(found), flush=True)


# --- the parent ------------------------------------------------------------------------------------------------------


class Worker:
    """A process that works on a job; what it says comes line by line."""

    def __init__(self, job):
        self.job = job
        environment = dict(os.environ, PYTORCH_ALLOC_CONF="expandable_segments:True", TOKENIZERS_PARALLELISM="false")
        self.process = subprocess.Popen(
            [sys.executable, __file__, "worker=" + json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.said = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.process.stdout:
            if line.startswith("@"):
                self.said.put(json.loads(line[1:]))
        self.said.put({"failed": True})

    def answer(self, deadline):
        """What it says next: {"late": true} after the deadline, {"failed": true} where it ended, its stderr shown."""
        try:
            return self.said.get(timeout=max(0, deadline - time.monotonic()))
        except queue.Empty:
            return {"late": True}

    def turn(self, deadline):
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        return self.answer(deadline)

    def stop(self):
        self.process.kill()
        self.process.wait()


def estimate(job):
    """Bytes that a variant takes: neox's own estimate, with half as many activations again."""
    from neox.model.flops import parameters
    from neox.model.training_memory import one_device

    config = config_of(job)
    memory, count = one_device(config), parameters(config.model).total
    total = sum(memory.values()) + memory["activations"] // 2 + 2**30
    if job["kind"] == "peer":  # the whole logits, twice in fp32 and twice in bf16
        total += 12 * job["micro"] * config.data.seq_length * config.model.vocab_size
        total -= 8 * count if job["options"].get("params") == "bf16" else 0
    return total


def jobs(size, variants, settings, card):
    """A job a variant, with the microbatch that should fit."""
    found = []
    for variant in variants:
        kind, *words = variant.split()
        if kind not in ("ours", "peer") or not all("=" in word for word in words):
            raise SystemExit(f'{variant!r}: a variant is "ours KEY=VALUE ..." or "peer KEY=VALUE ..."')
        options = dict(word.split("=", 1) for word in words)
        fixed = options.pop("micro_batch_size", options.pop("train.micro_batch_size", None))
        job = {"size": size, "kind": kind, "options": options, "variant": variant, **settings}
        job |= {"micro": int(fixed) if fixed else 2 if size == "tiny" else MOST_ROWS, "fixed": bool(fixed)}
        try:
            config_of(job)
        except ValueError as error:
            raise SystemExit(f"{variant!r}: {error}") from None
        while not fixed and card and job["micro"] > 1 and estimate(job) > 0.95 * card:
            job["micro"] //= 2
        found.append(job)
    return found


def measure(size, variants, settings, turns, card, deadline):
    """[(job, parameters, turns' answers, what went wrong)] of one model."""
    found = [[job, 0, [], ""] for job in jobs(size, variants, settings, card)]
    together = not card or sum(estimate(entry[0]) for entry in found) < 0.95 * card
    workers = {}

    def ready(entry):
        """The variant's process, warmed up; None where there is none to be had."""
        while True:
            job = entry[0]
            worker = workers.pop(id(entry), None) or Worker(job)
            said = worker.answer(deadline)
            if "ready" in said:
                entry[1] = said["ready"]
                return worker
            worker.stop()
            if "short" in said and not job["fixed"] and job["micro"] > 1:
                job["micro"] //= 2
                continue
            entry[3] = trouble(said)
            return None

    def trouble(said):
        return "out of memory" if "short" in said else "not measured in time" if "late" in said else "failed, see above"

    try:
        if together:  # they compile side by side
            workers |= {id(entry): Worker(entry[0]) for entry in found}
            for entry in found:
                worker = ready(entry)
                if worker:
                    workers[id(entry)] = worker
        for turn in range(turns):
            for entry in found if turn % 2 == 0 else found[::-1]:
                if entry[3] or time.monotonic() > deadline:
                    continue
                worker = workers[id(entry)] if together else ready(entry)
                if not worker:
                    continue
                said = worker.turn(deadline)
                if "rate" in said:
                    entry[2].append(said)
                    print(
                        f"{size} turn {turn}: {entry[0]['variant']}: {said['rate']:,.0f} tokens/s beside "
                        f"{said['matmul'] / 1e12:,.1f} TFLOP/s of matmul",
                        flush=True,
                    )
                elif "late" not in said or not entry[2]:
                    entry[3] = trouble(said)
                if not together:
                    worker.stop()
    finally:
        for worker in workers.values():
            worker.stop()
    return found


def row_of(entry, peak):
    """The row of a variant: medians over its turns."""
    from neox.model.flops import train_flops_per_token

    job, parameters, turns, wrong = entry
    config = config_of(job)
    row = {"size": job["size"], "variant": job["variant"], "micro_batch_size": job["micro"], "turns": len(turns)}
    if not turns:
        return row | {"wrong": wrong or "not measured in time"}
    full, causal = (train_flops_per_token(config.model, config.data.seq_length, causal=kind) for kind in (False, True))
    rate = statistics.median(turn["rate"] for turn in turns)
    return row | {
        "parameters": parameters,
        "tokens_per_second": rate,
        "tflops": rate * full / 1e12,
        "mfu": rate * full / peak,
        "mfu_causal": rate * causal / peak,
        "of_matmul": statistics.median(turn["rate"] * full / turn["matmul"] for turn in turns),
        "matmul_tflops": statistics.median(turn["matmul"] for turn in turns) / 1e12,
        "peak_gib": max(turn["memory"] for turn in turns) / 2**30,
        "all_rates": [turn["rate"] for turn in turns],
        "wrong": wrong,
    }


def show(rows):
    print("\n| model | variant | micro batch | tokens/s | TFLOP/s | MFU | causal | of matmul | matmul | peak GiB |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        start = f"| {row['size']} | {row['variant']} | {row['micro_batch_size']} |"
        if row["turns"]:
            print(
                f"{start} {row['tokens_per_second']:,.0f} | {row['tflops']:.1f} | {row['mfu']:.1%} | "
                f"{row['mfu_causal']:.1%} | {row['of_matmul']:.1%} | {row['matmul_tflops']:.1f} | "
                f"{row['peak_gib']:.2f} |"
            )
        else:
            print(f"{start} {row['wrong']} | | | | | | |")


def main(arguments):
    import torch

    options = dict(word.split("=", 1) for word in arguments if " " not in word and word not in ("ours", "peer"))
    variants = [word for word in arguments if " " in word or word in ("ours", "peer")] or ["ours", "peer"]
    unknown = set(options) - {"sizes", "turns", "steps", "limit", "peak", "device"}
    if unknown:
        raise SystemExit(f"{unknown.pop()}: no such option; there are sizes, turns, steps, limit, peak and device")
    deadline = time.monotonic() + float(options.get("limit", 570))
    device = options.get("device", "cuda")
    sizes = options.get("sizes", "410m,1.4b,6.9b").split(",")
    if set(sizes) - set(SIZES):
        raise SystemExit(f"sizes: are of {', '.join(SIZES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device: `device=cpu sizes=tiny` tries the script without one")
    if importlib.util.find_spec("transformers") is None:
        print("transformers is not installed: the peer is left out")
        variants = [variant for variant in variants if not variant.startswith("peer")]
    card, name = 0, "CPU"
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        card, name = properties.total_memory, properties.name
    print(f"{name}, torch {torch.__version__}, peak taken as {float(options.get('peak', 989)):.0f} TFLOP/s", flush=True)
    rows = []
    for size in sizes:
        settings = {"device": device, "steps": int(options.get("steps", 2))}
        measured = measure(size, variants, settings, int(options.get("turns", 3)), card, deadline)
        found = [row_of(entry, 1e12 * float(options.get("peak", 989))) for entry in measured]
        record([row | {"device": name, "torch": torch.__version__} for row in found])
        rows += found
    show(rows)


def record(rows):
    if "OUT" in os.environ:
        with open(Path(os.environ["OUT"], "train_gpu.jsonl"), "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1].startswith("worker="):
        work(json.loads(sys.argv[1].partition("=")[2]))
    else:
        main(sys.argv[1:])

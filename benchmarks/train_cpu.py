"""Training on CPU: neox and transformers' GPTNeoXForCausalLM in turn, in one process, beside the machine's own limit.

    python benchmarks/train_cpu.py [turns=5]

One optimizer step of batch 4 x 512, 6 layers, hidden 512, 8 heads, vocabulary 50304, float32, fused AdamW, all cores.
The peer: sdpa attention, its own loss (labels=). Each turn measures, back to back, a 2048-cubed float32 matmul, then
the one, then the other, and MFU is taken against that turn's matmul, because machines drift; medians over the turns.
FLOPs a token: 6 (non-embedding + head) + 12 L C T (no causal discount), the same for both.
Peak memory is VmHWM of a fresh process for each (Linux), less what it held after its imports and less 16 bytes a
parameter (weights, gradients, two moments).
"""

import json
import statistics
import subprocess
import sys
import time

LAYERS, HIDDEN, HEADS, VOCAB, BATCH, LENGTH = 6, 512, 8, 50304, 4, 512
MATMUL = 2048


def build(which):
    """(one optimizer step, number of parameters, a call that marks the end of imports) for `ours` or `peer`."""
    import torch

    if which == "ours":
        from neox.config import ModelConfig, OptimConfig, TrainConfig
        from neox.model.decoder import GPTNeoX
        from neox.train import build_optimizers, clip_gradients, cross_entropy

        base = resident("VmRSS")
        config = ModelConfig(vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS)
        model = GPTNeoX(config).initialize()
        (optimizer,) = build_optimizers([model], OptimConfig())

        def clip():
            clip_gradients([model], 1.0)

        def loss(tokens, labels):
            return cross_entropy(
                model(tokens, head=False),
                model.embed_out,
                labels,
                chunk=TrainConfig().loss_chunk,
                scale=1 / labels.numel(),
            )

    else:
        from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

        base = resident("VmRSS")
        config = GPTNeoXConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=4 * HIDDEN,
            attn_implementation="sdpa",
        )
        model = GPTNeoXForCausalLM(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

        def clip():
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)

        def loss(tokens, labels):
            return model(input_ids=tokens, labels=tokens).loss

    rows = torch.randint(VOCAB, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    tokens, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def step():
        loss(tokens, labels).backward()
        clip()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, sum(p.numel() for p in model.parameters()), base


def resident(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


def peak(which):
    """Peak bytes of three steps in this fresh process, less imports and 16 bytes a parameter."""
    step, parameters, base = build(which)
    for _ in range(3):
        step()
    print(json.dumps({"peak": resident("VmHWM"), "over": resident("VmHWM") - base - 16 * parameters}))


def seconds(work):
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main(turns):
    import torch

    peer, parameters, _ = build("peer")
    ours, _, _ = build("ours")
    a = torch.randn(MATMUL, MATMUL)
    flops = 6 * (parameters - VOCAB * HIDDEN) + 12 * LAYERS * HIDDEN * LENGTH
    tokens = BATCH * LENGTH
    for work in (lambda: a @ a, peer, ours):
        work()
    found = {"peer": [], "ours": []}
    print(
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{parameters:,} parameters, batch {BATCH} x {LENGTH}"
    )
    print(f"{'turn':>4} {'matmul':>12} {'peer':>12} {'ours':>12} {'ours/peer':>10}")
    for turn in range(turns):
        limit = max(2 * MATMUL**3 / seconds(lambda: a @ a) for _ in range(8))
        rates = {}
        for name, step in (("peer", peer), ("ours", ours)) if turn % 2 else (("ours", ours), ("peer", peer)):
            rates[name] = max(tokens / seconds(step) for _ in range(2))
        limit = max(limit, *(2 * MATMUL**3 / seconds(lambda: a @ a) for _ in range(8)))
        for name, rate in rates.items():
            found[name].append((rate, rate * flops / limit))
        ratio = rates["ours"] / rates["peer"]
        print(
            f"{turn:>4} {limit / 1e9:>7.0f} GF/s {rates['peer']:>6.0f} tok/s {rates['ours']:>6.0f} tok/s {ratio:>10.2f}"
        )
    memory = {}
    for name in found:
        out = subprocess.run([sys.executable, __file__, f"peak={name}"], capture_output=True, text=True, check=True)
        memory[name] = json.loads(out.stdout.splitlines()[-1])
    print(f"\n{'':14} {'tokens/s':>9} {'MFU':>6} {'peak':>9} {'less imports and 16 B/parameter':>32}")
    for name, title in (("peer", "transformers"), ("ours", "neox")):
        rate, mfu = (statistics.median(column) for column in zip(*found[name], strict=True))
        print(
            f"{title:14} {rate:>9.0f} {mfu:>6.2f} {memory[name]['peak'] / 1e9:>6.2f} GB "
            f"{memory[name]['over'] / 1e6:>29.0f} MB"
        )
    ratio = statistics.median(o[0] / p[0] for o, p in zip(found["ours"], found["peer"], strict=True))
    print(f"\nmedian ratio of tokens/s {ratio:.2f}, of memory {memory['ours']['over'] / memory['peer']['over']:.2f}")


if __name__ == "__main__":
    options = dict(argument.split("=", 1) for argument in sys.argv[1:])
    if "peak" in options:
        peak(options["peak"])
    else:
        main(int(options.get("turns", 5)))

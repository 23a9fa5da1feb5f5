"""Causal attention on one GPU, forward and backward, in bf16: by head dimension, kernel and padding.

    python benchmarks/attention_gpu.py [device=cuda]

8 sequences of 2048 tokens, heads that make up a width of 5120 (or just below), random values; the median of 5 rounds of
20 calls. TFLOP/s count two products forward and five backward (the scores are computed again) over the pairs that the
mask keeps, of the head dimension without its padding. `none`: the kernel does not take this dimension here. With
`device=cpu` it is the same at a size for any machine: it shows that the script runs, nothing else.
"""

import contextlib
import statistics
import sys
import time

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

WIDTH = 5120
PADDINGS = {64: (64,), 80: (80, 96, 128), 96: (96, 128), 128: (128,), 256: (256,)}
KERNELS = {
    "torch's choice": None,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def rate(kernel, B, T, dim, padded, device, calls):
    """FLOP/s, or None where the kernel does not take these tensors."""
    shape = B, WIDTH // dim, T, dim
    qkv = [torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(3)]
    qkv = [F.pad(x, (0, padded - dim)).requires_grad_() for x in qkv]
    gradient = torch.randn_like(qkv[0])
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None

    def seconds():
        synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            out = F.scaled_dot_product_attention(*qkv, is_causal=True, scale=dim**-0.5)
            torch.autograd.grad(out, qkv, gradient)
        synchronize()
        return (time.perf_counter() - started) / calls

    try:
        with sdpa_kernel(kernel) if kernel else contextlib.nullcontext():
            seconds()
            found = statistics.median(seconds() for _ in range(5))
    except RuntimeError:
        return None
    return 7 * B * (WIDTH // dim) * T * (T + 1) * dim / found


def main(device):
    B, T, calls = (8, 2048, 20) if device == "cuda" else (1, 32, 1)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, TFLOP/s of causal attention, forward and backward\n", flush=True)
    print(f"| head dim | padded to | {' | '.join(KERNELS)} |\n|{'---|' * (2 + len(KERNELS))}")
    for dim, paddings in PADDINGS.items():
        for padded in paddings:
            rates = [rate(kernel, B, T, dim, padded, device, calls) for kernel in KERNELS.values()]
            cells = " | ".join("none" if found is None else f"{found / 1e12:.4g}" for found in rates)
            print(f"| {dim} | {padded} | {cells} |", flush=True)


if __name__ == "__main__":
    main(dict(argument.split("=", 1) for argument in sys.argv[1:]).get("device", "cuda"))

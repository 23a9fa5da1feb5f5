"""Bytes that a process sends in a step, by mesh axis and collective: counted on real gloo runs, beside the formula.

    python benchmarks/communication.py

Nothing is timed. A message of S bytes over n processes counts as a ring sends it: (n-1)/n S for a gather or a
reduce-scatter (S: the whole), twice that for an all-reduce; a send as S. Counted on rank 0 is one step of forward and
backward passes of MICROBATCHES microbatches; sums for log lines and clipping, a few bytes, come on top.

B sequences a microbatch, T tokens, C hidden, L blocks, V vocabulary, P parameters, m microbatches; bytes of fp32.
"""

import multiprocessing
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from neox.config import Config, load_config
from neox.data import Batch
from neox.model.decoder import GPTNeoX
from neox.parallel import build, parallel_dims
from neox.planning.traffic import Traffic, TrafficCounter
from neox.system.processes import Processes

B, T, C, L, V, MICROBATCHES = 2, 64, 64, 4, 256, 3
SHAPE = (
    f"model.vocab_size={V}",
    f"hidden_size={C}",
    f"num_hidden_layers={L}",
    "num_attention_heads=4",
    f"seq_length={T}",
    f"micro_batch_size={B}",
    "loss_chunk=32",
    "device=cpu",
)


def run(options: tuple[str, ...]) -> Traffic:
    """One step on this rank."""
    config = load_config(overrides=(*SHAPE, *options))
    place = parallel_dims(config.parallel, Processes(dist.get_rank(), dist.get_world_size()), torch.device("cpu"))

    _, forward_backward = build(config, place)
    tokens = torch.arange(B * T).view(B, T) % V
    batches = [Batch(tokens, tokens, torch.arange(T).expand(B, -1))] * MICROBATCHES
    with TrafficCounter(place) as counter:
        forward_backward(batches, 1.0)
    return counter.traffic()


def tensor_parallel(config: Config) -> Traffic:
    """Embedding, blocks, final norm; three numbers a token for the loss; the norms' gradients."""
    n, m, x = config.parallel.tp, MICROBATCHES, 4 * B * T * C
    share = (n - 1) / n
    norms = m * (2 * L + 1) * 2 * C * 4
    loss = m * 3 * B * T * 4 * n
    if not config.parallel.sequence_parallel:
        wide = m * ((L + 1) + (L + 1)) * x  # forward; backward
        return Counter({("tp", "all-reduce"): int(2 * share * (wide + norms)), ("tp", "all-gather"): int(share * loss)})
    gathers = m * (2 * L + 1 + (L + 1) + 2 * L) * x  # forward; backward; norms made again
    sums = m * ((L + 1) + (2 * L + 1)) * x
    biases = m * L * 2 * C * 4
    return Counter(
        {
            ("tp", "all-gather"): int(share * (gathers + loss)),
            ("tp", "reduce-scatter"): int(share * sums),
            ("tp", "all-reduce"): int(2 * share * (norms + biases)),
        }
    )


def data_parallel(config: Config, axis: str = "dp_shard", n: int = 2) -> Traffic:
    """Parameters gathered, gradients reduced: once a step, with ZeRO-2 and 3 once a microbatch."""
    with torch.device("meta"):
        model = GPTNeoX(config.model)
    size = {name: 4 * sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    whole = sum(size.values())
    zero, m = config.parallel.zero, MICROBATCHES
    # ZeRO-3 gathers a block and the head once more for the backward pass: the last block of it stays.
    gathered = {1: whole, 2: m * whole, 3: m * (whole + size["layers"] + size["embed_out"])}[zero]
    reduced = whole if zero == 1 else m * whole
    share = (n - 1) / n
    return Counter({(axis, "all-gather"): int(share * gathered), (axis, "reduce-scatter"): int(share * reduced)})


def context_parallel(config: Config) -> Traffic:
    """Keys and values of each block, and their gradients. Where dp_shard is 1 ZeRO is over the same processes."""
    n = config.parallel.cp
    moved = int((n - 1) / n * MICROBATCHES * L * 2 * 4 * B * T * C)
    return Counter({("cp", "all-gather"): moved, ("cp", "reduce-scatter"): moved})


def pipeline(config: Config) -> Traffic:
    """The first stage sends each microbatch's hidden states on once; as many gradients come back."""
    return Counter({("pp", "send"): MICROBATCHES * 4 * B * T * C})


def stage_parallel(config: Config) -> Traffic:
    """Tensor parallelism of the first stage: the embedding and half of the blocks, no head."""
    n, m, x = config.parallel.tp, MICROBATCHES, 4 * B * T * C
    wide, norms = m * ((L // 2 + 1) + L // 2) * x, m * (2 * (L // 2)) * 2 * C * 4
    return Counter({("tp", "all-reduce"): int(2 * (n - 1) / n * (wide + norms))})


Formula = Callable[[Config], Traffic]
MESHES: list[tuple[str, int, tuple[str, ...], list[Formula]]] = [
    ("TP2", 2, ("parallel.tp=2",), [tensor_parallel]),
    ("TP2 + SP", 2, ("parallel.tp=2", "parallel.sequence_parallel=true"), [tensor_parallel]),
    ("FSDP2, zero=1", 2, ("parallel.zero=1",), [data_parallel]),
    ("FSDP2, zero=2", 2, ("parallel.zero=2",), [data_parallel]),
    ("FSDP2, zero=3", 2, ("parallel.zero=3",), [data_parallel]),
    ("CP2, zero=1", 2, ("parallel.cp=2",), [context_parallel, partial(data_parallel, axis="cp")]),
    ("PP2", 2, ("parallel.pp=2",), [pipeline]),
    ("PP2 x TP2", 4, ("parallel.pp=2", "parallel.tp=2"), [pipeline, stage_parallel]),
]
"""Name, processes, options, and what its traffic is the sum of."""


def expected(options: tuple[str, ...], formulas: list[Formula]) -> Traffic:
    config = load_config(overrides=(*SHAPE, *options))
    return sum((formula(config) for formula in formulas), Counter())


def _rank(rank: int, world: int, store: str, options: tuple[str, ...], found: Any) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    traffic = run(options)
    if not rank:
        found.put(traffic)
    dist.destroy_process_group()


def main() -> int:
    forks = multiprocessing.get_context("fork")
    wrong = 0
    print(f"{'mesh':<16}{'axis':<16}{'collective':<16}{'counted':>12}{'formula':>12}")
    for name, world, options, formulas in MESHES:
        with tempfile.TemporaryDirectory() as folder:
            queue = forks.Queue()
            ranks = [
                forks.Process(target=_rank, args=(rank, world, str(Path(folder) / "store"), options, queue))
                for rank in range(world)
            ]
            for process in ranks:
                process.start()
            counted = queue.get(timeout=120)
            for process in ranks:
                process.join()
        formula = expected(options, formulas)
        for axis, kind in sorted(counted | formula):
            wrong += counted[axis, kind] != formula[axis, kind]
            print(f"{name:<16}{axis:<16}{kind:<16}{counted[axis, kind]:>12,}{formula[axis, kind]:>12,}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

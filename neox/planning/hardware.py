"""GPUs by name, and the step time estimated from their peak figures."""

from dataclasses import dataclass, replace

from neox.config import Config
from neox.model.flops import forward_flops, recomputed_share
from neox.parallel.mesh import AXES

COMPUTE = 0.6
"""Share of the peak FLOP/s that a process reaches while it computes. Assumed: the best published figures for dense
models of these shapes are 0.5 to 0.64 (MPT-7B on A100, llm-foundry's benchmarking README)."""
LINK = 0.75
"""Share of a link's peak that a collective reaches. Assumed, as is that nothing overlaps communication with compute but
the messages between pipeline stages, which overlap with other microbatches."""
USABLE = 0.92
"""Share of a GPU's memory that tensors may take. Assumed: the rest is the context, NCCL's buffers, fragmentation."""
HOST = 8
"""GPUs of a host, joined by NVLink."""


@dataclass(frozen=True)
class GPU:
    """Peak figures of one GPU; bytes a second go one way."""

    flops: float  # of dense 16-bit products
    flops_fp32: float
    memory: float  # bytes
    bandwidth: float  # of its memory
    nvlink: float
    network: float  # of a GPU's share of its host's adapters


# From pages that quote the vendor's datasheets, read in November 2026; products without sparsity, SXM boards.
#   A100  https://glennklockwood.com/garden/processors/A100. The memory of the smaller one is what CUDA reports of it:
#         https://upb-pc2.atlassian.net/wiki/spaces/PC2DOK/pages/1900609/NVIDIA+A100+40GB+with+NVLINK
#   H100  https://glennklockwood.com/garden/processors/h100
#   H200  https://www.kunwar.page/chapter/appendix-d-hardware-reference
#   NVLink is given for both ways together, 600 and 900 GB/s; here it is one way.
#   Network, an adapter a GPU: A100 200 Gb/s (HDR; adapters: https://www.besthub.dev/articles, "Inside the
#   High-Performance GPU Server"; rate: https://alpha-one-index.github.io/ai-infra-index/specs/networking-interconnects),
#   H100 and H200 400 Gb/s (https://docs.nvidia.com/dgx-basepod, core components).
GPUS = {
    "a100-40gb": GPU(312e12, 19.5e12, 42.4e9, 1.555e12, 300e9, 25e9),
    "a100-80gb": GPU(312e12, 19.5e12, 80e9, 2.039e12, 300e9, 25e9),
    "h100": GPU(989e12, 67e12, 80e9, 3.35e12, 450e9, 50e9),
    "h200": GPU(989e12, 67e12, 141e9, 4.8e12, 450e9, 50e9),
}


def gpu(name: str, network: float | None = None) -> GPU:
    """Look up a GPU; `network` in GB/s replaces its network. Raises ValueError for an unknown name."""
    if name not in GPUS:
        raise ValueError(f"gpu={name}: is not in the table: choose one of {', '.join(GPUS)}")
    return replace(GPUS[name], network=network * 1e9) if network else GPUS[name]


def bubble(config: Config) -> float:
    """Share of a step that a pipeline process idles, if all passes of all stages take the same time.

    Narayanan et al. 2021, arXiv 2104.04473 (1f1b, interleaved).
    """
    parallel, count = config.parallel, len(config.microbatches)
    waits, work = parallel.pp - 1, count * parallel.stages // parallel.pp
    return waits / (work + waits)


def stage_flops(config: Config, layers: int, head: bool, causal: bool = True, recomputed: bool = True) -> float:
    """FLOPs of a process in a step for `layers` blocks and the head: 3 passes, plus the recomputed part."""
    model, length, parallel = config.model, config.data.seq_length, config.parallel
    again = recomputed_share(model, length, config.train.activation_checkpointing) if recomputed else 0.0
    blocks = forward_flops(model, length, scored=0, causal=causal) * layers / model.num_hidden_layers
    heads = 2 * length * model.vocab_size * (model.hidden_size + model.head_bias) if head else 0
    return sum(config.microbatches) * (blocks * (3 + again) + 3 * heads) / parallel.tp / parallel.cp


@dataclass(frozen=True)
class StepTime:
    """Estimated seconds of a step of one process."""

    compute: float
    tensor: float  # messages in every block: tp, cp
    wait: float  # the pipeline's bubble
    data: float  # gathered weights and reduced gradients
    update: float  # the optimizer, by the bandwidth of memory

    @property
    def total(self) -> float:
        return self.compute + self.tensor + self.wait + self.data + self.update


def step_time(
    config: Config, device: GPU, layers: int, head: bool, parameters: int, traffic: dict[tuple[str, str], int]
) -> StepTime:
    """Estimate the step time of a process that holds `layers` blocks and sends `traffic` bytes."""
    peak = device.flops_fp32 if config.train.dtype == "fp32" else device.flops
    links = {axis: device.nvlink if within_host(config, axis) else device.network for axis in AXES}
    links["dp_shard x cp"] = min(links["dp_shard"], links["cp"])
    sent = dict.fromkeys((*links, "world"), 0.0)
    for (axis, _), size in traffic.items():
        sent[axis] += size / links.get(axis, device.network) / LINK
    compute = stage_flops(config, layers, head) / (peak * COMPUTE)
    tensor = sent["tp"] + (sent["cp"] if config.parallel.shards > 1 else 0.0)
    data = sum(sent.values()) - sent["pp"] - tensor
    idle = bubble(config)
    # AdamW reads weight, gradient and two moments, and writes all but the gradient: 28 bytes.
    return StepTime(compute, tensor, (compute + tensor) * idle / (1 - idle), data, 28 * parameters / device.bandwidth)


def within_host(config: Config, axis: str) -> bool:
    """True if the processes of an axis are on one host; `tp` is innermost, as the mesh orders ranks."""
    parallel = config.parallel
    sizes = {
        "tp": parallel.tp,
        "cp": parallel.cp,
        "dp_shard": config.parallel.shards,
        "dp_replicate": parallel.dp_replicate,
        "pp": parallel.pp,
    }
    span = 1
    for name in reversed(AXES):
        span *= sizes[name]
        if name == axis:
            break
    return span <= HOST

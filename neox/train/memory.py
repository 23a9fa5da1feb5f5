"""Out of memory: a snapshot, and one line that says which option to change first."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from neox.config import Config
from neox.model.flops import parameters
from neox.parallel.mesh import ParallelDims
from neox.system.device import check_fits, is_out_of_memory

EVENTS = 100_000
"""Allocations that CUDA remembers, with the Python lines that made them: some steps' worth, tens of megabytes."""


@contextmanager
def remembered_allocations(device: torch.device) -> Iterator[None]:
    """Record allocations inside, on CUDA: a snapshot taken when memory runs out then names their lines."""
    if device.type != "cuda":
        yield
        return
    # Python's lines alone: torch's documentation puts them at 2 microseconds an allocation.
    torch.cuda.memory._record_memory_history(max_entries=EVENTS, stacks="python")
    try:
        yield
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


@contextmanager
def out_of_memory_explained(config: Config, dims: ParallelDims, run: Path, step: int) -> Iterator[None]:
    """Run step `step` inside; if memory runs out, raise ValueError with the option to change.

    On CUDA it leaves RUN/memory_snapshot.pickle (of rank R above 0: memory_snapshot_rankR.pickle), for
    docs.pytorch.org/memory_viz. What the run has saved is untouched.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        seen, total = "", 0
        if dims.device.type == "cuda":
            rank = dims.processes.rank
            file = run / f"memory_snapshot{f'_rank{rank}' if rank else ''}.pickle"
            torch.cuda.memory._dump_snapshot(str(file))
            total = torch.cuda.get_device_properties(dims.device).total_memory
            seen = f" ({file} shows what of: docs.pytorch.org/memory_viz)"
        raise ValueError(f"{run}: step {step} ran out of memory{seen}: {advice(config, dims, total)}") from error


def check_weights_fit(config: Config, dims: ParallelDims) -> None:
    """Raise ValueError where the float32 weights alone, shared by all processes, are more than a device's memory."""
    size = parameters(config.model).total * 4 / dims.processes.world
    check_fits(size, dims.device, "model: a process's part of the float32 weights alone")


def state_bytes(config: Config, dims: ParallelDims) -> int:
    """Bytes of weights, their gathered or cast copies, gradients and optimizer state on this process."""
    # Imported when memory has run out: a run that does not needs neither.
    from neox.model.training_memory import stage_parameters, state_memory
    from neox.parallel.pipeline import layers_of_stages, stages_of_rank

    layers, stages = [config.model.num_hidden_layers], [0]
    if dims.size("pp") > 1:
        layers = [len(stage) for stage in layers_of_stages(config)]
        stages = stages_of_rank(config.parallel, dims.rank("pp"))
    count = sum(layers[stage] for stage in stages)
    stage = stage_parameters(config.model, dims.size("tp"), count, 0 in stages, len(layers) - 1 in stages)
    return round(sum(state_memory(config, stage, dims.size("dp_shard") * dims.size("cp")).values()))


def advice(config: Config, dims: ParallelDims, total: int = 0) -> str:
    """Option to change first, and why. `total` is the device's memory in bytes, 0 if unknown.

    A microbatch's part comes first, since less of it at a time changes nothing in the result; but where the state
    alone fills the device, only sharing it helps.
    """
    train, parallel = config.train, config.parallel
    state = state_bytes(config, dims)
    takes = f"weights, gradients and optimizer state take {state / 1e9:.3g} GB here"
    resume = f"neox train resume={config.log.out}"
    if total and state > 0.8 * total:
        takes += f" of {total / 1e9:.3g} GB"
        sharers = dims.size("dp_shard") * dims.size("cp")
        if parallel.zero < 3 and sharers > 1 and dims.size("pp") == 1:
            return f"{takes}: share more of it, `{resume} parallel.zero={parallel.zero + 1}`"
        return f"{takes}: share it among more processes (parallel.dp_shard with parallel.zero=3, parallel.tp or pp)"
    takes += ", the rest is a microbatch's: "
    if train.micro_batch_size > 1:
        half = train.micro_batch_size // 2
        return f"{takes}halve it, the result is the same, `{resume} train.micro_batch_size={half}`"
    if train.activation_checkpointing != "full":
        mode = "selective" if train.activation_checkpointing == "none" else "full"
        return f"{takes}keep less of it, the result is the same, `{resume} train.activation_checkpointing={mode}`"
    if train.loss_chunk > 256:
        return f"{takes}fewer logits at a time, `{resume} train.loss_chunk={train.loss_chunk // 2}`"
    if train.dtype == "fp32" and dims.device.type == "cuda":
        return f"{takes}half the bytes a value, `{resume} train.dtype=bf16`"
    return f"{takes}split sequences or matrices over processes (parallel.cp, or parallel.tp with sequence_parallel)"

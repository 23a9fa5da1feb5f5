"""Plan of a run on many processes: memory and traffic of each pipeline stage, and an estimate of the step time."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby

from neox.config import Config
from neox.model.flops import train_flops_per_token
from neox.model.training_memory import KINDS
from neox.parallel.mesh import AXES
from neox.parallel.pipeline import layers_of_stages, stages_of_rank
from neox.planning.dry_run import StepCost, dry_run
from neox.planning.hardware import COMPUTE, GPU, HOST, LINK, USABLE, StepTime, bubble, stage_flops, step_time
from neox.system.console import human_bytes


@dataclass(frozen=True)
class PipelineRank:
    """Rank of the axis pp with the cost of its dry run."""

    stages: list[int]
    layers: int
    head: bool
    cost: StepCost  # shared by ranks with as many layers, of which only the first is dry-run


def dry_run_ranks(config: Config) -> list[PipelineRank]:
    """Dry-run the first and last pipeline rank, and one rank per number of layers between.

    Each runs in a process of its own. Of the ranks with as many layers the first is run, since it keeps the most
    microbatches in flight; the others get its cost.
    """
    pp, world = config.parallel.pp, config.parallel.processes
    layers = layers_of_stages(config) if pp > 1 else [range(config.model.num_hidden_layers)]
    stages = [stages_of_rank(config.parallel, at) for at in range(pp)]
    counts = [sum(len(layers[stage]) for stage in here) for here in stages]
    stand_in = [at if at in (0, pp - 1) else counts.index(counts[at], 1) for at in range(pp)]
    chosen = sorted(set(stand_in))
    if sys.stderr.isatty() or pp > 1:
        print(f"dry run of {len(chosen)} of {world} processes ...", file=sys.stderr, flush=True)
    with ThreadPoolExecutor(min(len(chosen), os.cpu_count() or 1)) as pool:
        costs = dict(zip(chosen, pool.map(lambda at: dry_run(config, at * (world // pp)), chosen), strict=True))
    return [
        PipelineRank(stages[at], counts[at], len(layers) - 1 in stages[at], costs[stand_in[at]]) for at in range(pp)
    ]


def slowest(config: Config, device: GPU, ranks: list[PipelineRank]) -> StepTime:
    """Time of a step on the pipeline rank that takes longest."""
    times = [step_time(config, device, r.layers, r.head, r.cost.parameters, r.cost.traffic) for r in ranks]
    return max(times, key=lambda time: time.total)


def plan(config: Config, name: str | None = None, device: GPU | None = None) -> str:
    """Write the plan as text of at most 120 columns; with a `device`, estimate the time of a step on it."""
    return render(config, dry_run_ranks(config), name, device)


def render(config: Config, ranks: list[PipelineRank], name: str | None = None, device: GPU | None = None) -> str:
    """Write the plan of pipeline ranks that were dry-run."""
    parallel, count = config.parallel, config.parallel.processes
    axes = " x ".join(f"{axis} {size}" for axis, size in parallel.model_dump().items() if axis in AXES and size > 1)
    lines = [
        f"Plan: {count} process{'' if count == 1 else 'es'} ({axes or 'one'}), "
        f"{len(config.microbatches)} microbatches of "
        f"{config.train.micro_batch_size} a step, zero={parallel.zero}, {config.train.dtype}, "
        f"checkpointing {config.train.activation_checkpointing}",
        "",
        "Peak memory of a process by kind: bytes of tensors in a dry run (a range: its first stage, which holds most)",
        f"  {'stage':<9}{'layers':>6}{'parameters':>18}" + "".join(f"{kind:>12}" for kind in KINDS) + f"{'peak':>9}",
    ]
    alike = [list(group) for _, group in groupby(ranks, key=lambda rank: id(rank.cost))]
    names = [" - ".join(",".join(map(str, rank.stages)) for rank in [group[0], *group[1:][-1:]]) for group in alike]
    firsts = [group[0] for group in alike]
    for label, rank in zip(names, firsts, strict=True):
        held = "".join(f"{human_bytes(rank.cost.memory.get(kind, 0)):>12}" for kind in KINDS)
        lines.append(f"  {label:<9}{rank.layers:>6}{rank.cost.parameters:>18,}{held}{human_bytes(rank.cost.peak):>9}")
    lines += ["", "Bytes that a process sends in a step, counted in the dry run"]
    messages = sorted({message for rank in ranks for message in rank.cost.traffic})
    if messages and len(firsts) > 1:
        lines.append(f"  {'stage':<30}" + "  ".join(f"{label:>9}" for label in names))
    for axis, kind in messages:
        sent = "  ".join(f"{human_bytes(rank.cost.traffic.get((axis, kind), 0)):>9}" for rank in firsts)
        lines.append(f"  {axis:<14}{kind:<16}{sent}")
    if not messages:
        lines.append("  none")
    lines.append("")
    if parallel.pp > 1:
        lines.append(f"Pipeline: {parallel.schedule}, idle {bubble(config):.1%} of a step")
    if device:
        lines += estimate(config, ranks, name or "", device)
    return "\n".join(lines).rstrip()


def estimate(config: Config, ranks: list[PipelineRank], name: str, device: GPU) -> list[str]:
    """Estimate the time of a step and whether it fits, as lines that say it is an estimate."""
    time, world = slowest(config, device, ranks), config.parallel.processes
    tokens = config.train.global_batch_size * config.data.seq_length
    needed = train_flops_per_token(config.model, config.data.seq_length) * tokens
    executed = sum(stage_flops(config, rank.layers, rank.head, causal=False) for rank in ranks) * (world // len(ranks))
    peak, room = max(rank.cost.peak for rank in ranks), device.memory * USABLE
    return [
        f"Estimate on {name}: not measured; assumes {COMPUTE:.0%} of peak FLOP/s in compute, {LINK:.0%} of the links, "
        f"{HOST} GPUs a host",
        f"  step {time.total:.3g} s = compute {time.compute:.3g} + tensor messages {time.tensor:.3g} + pipeline wait "
        f"{time.wait:.3g} + data messages {time.data:.3g} + update {time.update:.3g}",
        f"  {tokens / time.total:,.0f} tokens/s, {needed / time.total / world / 1e12:.0f} TFLOP/s a GPU that the model "
        f"needs, {executed / time.total / world / 1e12:.0f} with what is computed again",
        f"  memory: {human_bytes(peak)} of {human_bytes(device.memory)}, of which {USABLE:.0%} are taken to be usable: "
        + ("fits" if peak <= room else f"does not fit, {human_bytes(peak - room)} too much"),
    ]

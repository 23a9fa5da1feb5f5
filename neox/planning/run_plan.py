"""The plan of a run on many processes: what each pipeline stage holds and sends, and what a step takes."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby

from neox.config import Config
from neox.model.flops import train_flops_per_token
from neox.parallel.mesh import AXES
from neox.parallel.pipeline import layers_of_stages, stages_of_rank
from neox.planning.dry_run import Trace, trace
from neox.planning.hardware import COMPUTE, GPU, HOST, LINK, USABLE, StepTime, bubble, stage_flops, step_time
from neox.planning.layouts import KINDS, microbatches, processes
from neox.planning.summary import _bytes


@dataclass(frozen=True)
class Place:
    """One place along the axis pp: what the processes there have and do."""

    stages: list[int]
    layers: int
    head: bool
    trace: Trace  # shared by places of which only the first was rehearsed


def rehearsed(config: Config) -> list[Place]:
    """Rehearse the first and the last place of the pipeline, and between them one of each number of layers, each in a
    process of its own.

    It is the first of that number, and stands for the others: of these it keeps the most microbatches in flight.
    """
    pp, world = config.parallel.pp, processes(config)
    layers = layers_of_stages(config) if pp > 1 else [range(config.model.num_hidden_layers)]
    stages = [stages_of_rank(config.parallel, at) for at in range(pp)]
    counts = [sum(len(layers[stage]) for stage in own) for own in stages]
    stand_in = [at if at in (0, pp - 1) else counts.index(counts[at], 1) for at in range(pp)]
    chosen = sorted(set(stand_in))
    if sys.stderr.isatty() or pp > 1:
        print(f"rehearsing {len(chosen)} of {world} processes ...", file=sys.stderr, flush=True)
    with ThreadPoolExecutor(min(len(chosen), os.cpu_count() or 1)) as pool:
        found = dict(zip(chosen, pool.map(lambda at: trace(config, at * (world // pp)), chosen), strict=True))
    return [Place(stages[at], counts[at], len(layers) - 1 in stages[at], found[stand_in[at]]) for at in range(pp)]


def slowest(config: Config, device: GPU, places: list[Place]) -> StepTime:
    times = [step_time(config, device, p.layers, p.head, p.trace.parameters, p.trace.traffic) for p in places]
    return max(times, key=lambda time: time.total)


def plan(config: Config, name: str | None = None, device: GPU | None = None) -> str:
    """The plan as text of at most 120 columns; with a `device`, what a step takes on it."""
    return render(config, rehearsed(config), name, device)


def render(config: Config, places: list[Place], name: str | None = None, device: GPU | None = None) -> str:
    parallel = config.parallel
    axes = " x ".join(f"{axis} {size}" for axis, size in parallel.model_dump().items() if axis in AXES and size > 1)
    lines = [
        f"Plan: {processes(config)} processes ({axes or 'one'}), {microbatches(config)} microbatches of "
        f"{config.train.micro_batch_size} a step, zero={parallel.zero}, {config.train.dtype}, "
        f"checkpointing {config.train.activation_checkpointing}",
        "",
        "Peak memory of a process by kind, bytes of tensors, rehearsed (a range: its first stage, which holds most)",
        f"  {'stage':<9}{'layers':>6}{'parameters':>13}" + "".join(f"{kind:>12}" for kind in KINDS) + f"{'peak':>9}",
    ]
    alike = [list(group) for _, group in groupby(places, key=lambda place: id(place.trace))]
    names = [" - ".join(",".join(map(str, at.stages)) for at in [group[0], *group[1:][-1:]]) for group in alike]
    firsts = [group[0] for group in alike]
    for label, place in zip(names, firsts, strict=True):
        held = "".join(f"{_bytes(place.trace.memory.get(kind, 0)):>12}" for kind in KINDS)
        lines.append(f"  {label:<9}{place.layers:>6}{place.trace.parameters:>13,}{held}{_bytes(place.trace.peak):>9}")
    lines += ["", "Bytes that a process sends in a step, counted"]
    messages = sorted({message for place in places for message in place.trace.traffic})
    if messages and len(firsts) > 1:
        lines.append(f"  {'stage':<30}" + "  ".join(f"{label:>9}" for label in names))
    for axis, kind in messages:
        sent = "  ".join(f"{_bytes(place.trace.traffic.get((axis, kind), 0)):>9}" for place in firsts)
        lines.append(f"  {axis:<14}{kind:<16}{sent}")
    if not messages:
        lines.append("  none")
    lines.append("")
    if parallel.pp > 1:
        lines.append(f"Pipeline: {parallel.schedule}, idle {bubble(config):.1%} of a step")
    if device:
        lines += estimate(config, places, name or "", device)
    return "\n".join(lines).rstrip()


def estimate(config: Config, places: list[Place], name: str, device: GPU) -> list[str]:
    """Lines on the time of a step and whether it fits, each marked as an estimate."""
    time, world = slowest(config, device, places), processes(config)
    tokens = config.train.global_batch_size * config.data.seq_length
    needed = train_flops_per_token(config.model, config.data.seq_length) * tokens
    executed = sum(stage_flops(config, place.layers, place.head, causal=False) for place in places) * (
        world // len(places)
    )
    peak, room = max(place.trace.peak for place in places), device.memory * USABLE
    return [
        f"Estimate on {name}: not measured; assumes {COMPUTE:.0%} of peak FLOP/s in compute, {LINK:.0%} of the links, "
        f"{HOST} GPUs a host",
        f"  step {time.total:.3g} s = compute {time.compute:.3g} + tensor messages {time.tensor:.3g} + pipeline wait "
        f"{time.wait:.3g} + data messages {time.data:.3g} + update {time.update:.3g}",
        f"  {tokens / time.total:,.0f} tokens/s, {needed / time.total / world / 1e12:.0f} TFLOP/s a GPU that the model "
        f"needs, {executed / time.total / world / 1e12:.0f} with what is computed again",
        f"  memory: {_bytes(peak)} of {_bytes(device.memory)}, of which {USABLE:.0%} are taken to be usable: "
        + ("fits" if peak <= room else f"does not fit, {_bytes(peak - room)} too much"),
    ]

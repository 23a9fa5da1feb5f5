"""Layouts that fit on a number of GPUs, fastest first: all by formula, the fastest also by a dry run."""

from dataclasses import dataclass

from neox.config import Config
from neox.parallel.pipeline import layers_of_stages
from neox.planning import formulas
from neox.planning.hardware import GPU, USABLE, step_time
from neox.planning.run_plan import dry_run_ranks, render
from neox.system.console import human_bytes

SHOWN, SHOWN_TOO_LARGE = 8, 4
"""Layouts shown in the tables: those that fit, those that do not."""
TRIES = 3
"""Dry runs at most: after one that shows a layout not to fit, the next layout is tried."""


@dataclass(frozen=True)
class Candidate:
    """Layout with its cost by formula."""

    config: Config
    memory: dict[str, int]  # bytes by kind, of the process that holds most
    seconds: float  # of a step, of the process that takes longest

    @property
    def peak(self) -> int:
        """Peak memory in bytes."""
        return sum(self.memory.values())

    @property
    def layout(self) -> str:
        """Options that give the mesh."""
        parallel = self.config.parallel
        return (
            f"tp={parallel.tp} pp={parallel.pp} dp_shard={parallel.dp_shard} dp_replicate={parallel.dp_replicate} "
            f"zero={parallel.zero}"
        )

    @property
    def keys(self) -> str:
        """Options to add to the command."""
        train = self.config.train
        return (
            f"{self.layout} activation_checkpointing={train.activation_checkpointing} "
            f"micro_batch_size={train.micro_batch_size}"
        )

    @property
    def reason(self) -> str:
        """The three kinds that take most of the memory."""
        kinds = sorted(self.memory, key=self.memory.__getitem__, reverse=True)
        return ", ".join(f"{kind} {human_bytes(self.memory[kind])}" for kind in kinds[:3])


def candidates(config: Config, gpus: int, device: GPU) -> list[Candidate]:
    """List every layout of tp, pp, dp, zero, checkpointing and micro batch that can run, fastest first."""
    model, result = config.model, []
    for tp in (1, 2, 4, 8):
        if gpus % tp or model.num_attention_heads % tp or model.ffn_size % tp or model.vocab_size % tp:
            continue
        for pp in (n for n in range(1, min(gpus // tp, model.num_hidden_layers) + 1) if gpus // tp % n == 0):
            data = gpus // tp // pp
            if data > config.train.global_batch_size or (pp > 1 and model.tie_word_embeddings):
                continue
            # Either all ranks shard one copy of the model, or each host of 8 shards a copy of its own.
            replicas = {1, data // 8 if data > 8 and data % 8 == 0 else 1}
            for copies in replicas:
                for zero in (1, 2, 3) if pp == 1 and data > 1 else (1,):
                    parallel = {"tp": tp, "pp": pp, "dp_replicate": copies, "dp_shard": data // copies, "zero": zero}
                    result += _micro_batches(config, parallel, device)
    return sorted(result, key=lambda candidate: candidate.seconds)


def _micro_batches(config: Config, parallel: dict[str, int], device: GPU) -> list[Candidate]:
    """The layout with each checkpointing mode and micro batch size."""
    result = []
    share = -(-config.train.global_batch_size // (parallel["dp_replicate"] * parallel["dp_shard"]))
    layout = config.parallel.model_copy(update=parallel | {"cp": 1, "schedule": "1f1b", "stage_layers": ()})
    for checkpointing in ("none", "selective", "full"):
        for size in (1, 2, 4, 8, 16, 32):
            if size > share:
                break
            train = {"activation_checkpointing": checkpointing, "micro_batch_size": size}
            tried = config.model_copy(update={"parallel": layout, "train": config.train.model_copy(update=train)})
            if parallel["pp"] > 1 and len(tried.microbatches) < parallel["pp"]:
                break
            result.append(_estimated(tried, device))
    return result


def _estimated(config: Config, device: GPU) -> Candidate:
    pp = config.parallel.pp
    layers = [len(stage) for stage in layers_of_stages(config)] if pp > 1 else [config.model.num_hidden_layers]
    stages, seconds = [], 0.0
    for number in range(pp):
        stage = formulas.stage(config, number)
        time = step_time(config, device, layers[number], number == pp - 1, stage.parameters, stage.traffic)
        stages.append(stage)
        seconds = max(seconds, time.total)
    return Candidate(config, max(stages, key=lambda stage: stage.peak).memory, seconds)


def layouts(tried: list[Candidate], room: float) -> list[Candidate]:
    """Pick one candidate per layout, fastest layout first: the fastest that fits `room` bytes, else the smallest.

    Among candidates within 1 % of the fastest it picks the largest microbatch, because the estimate does not know that
    a GPU computes small ones at a lower rate.
    """
    groups: dict[str, list[Candidate]] = {}
    for candidate in tried:
        groups.setdefault(candidate.layout, []).append(candidate)
    best = []
    for group in groups.values():
        if fitting := [c for c in group if c.peak <= room]:
            close = [c for c in fitting if c.seconds <= 1.01 * min(c.seconds for c in fitting)]
            best.append(max(close, key=lambda c: (c.config.train.micro_batch_size, -c.seconds)))
        else:
            best.append(min(group, key=lambda c: c.peak))
    return sorted(best, key=lambda c: c.seconds)


def propose(config: Config, gpus: int, name: str, device: GPU) -> str:
    """Write tables of the layouts that fit and that do not, and the plan of the fastest.

    The result is one line if no layout fits.

    Raises ValueError if no layout has `gpus` processes.
    """
    room = device.memory * USABLE
    tried = candidates(config, gpus, device)
    if not tried:
        raise ValueError(
            f"gpus={gpus}: no layout of {gpus} processes divides this model's heads and layers and "
            f"train.global_batch_size={config.train.global_batch_size}; try a number with small factors"
        )
    best = layouts(tried, room)
    fitting = [c for c in best if c.peak <= room]
    if not fitting:
        least = min(best, key=lambda c: c.peak)
        return (
            f"nothing fits {gpus} x {name}: the closest, {least.keys}, takes {human_bytes(least.peak)} of "
            f"{human_bytes(room)}: more GPUs, larger ones, or a smaller model or seq_length would help"
        )
    lines = [
        f"Layouts for {gpus} x {name} with {human_bytes(room)} of memory each, by estimated seconds a step",
        "(all by formula; the plan below is a dry run)",
        *(f"  {c.seconds:>8.3g} s  {human_bytes(c.peak):>8}  {c.keys}" for c in fitting[:SHOWN]),
        f"  {len(fitting)} layouts fit" + (f", {len(fitting) - SHOWN} slower ones not shown" * (len(fitting) > SHOWN)),
    ]
    if too_large := [c for c in best if c.peak > room]:
        lines += ["", f"{len(too_large)} layouts do not fit; the fastest of them, as small as they can be made"]
        for c in too_large[:SHOWN_TOO_LARGE]:
            lines.append(f"  {c.seconds:>8.3g} s  {human_bytes(c.peak):>8}  {c.keys}: {c.reason}")
    for best_one in fitting[:TRIES]:
        ranks = dry_run_ranks(best_one.config)
        peak = max(rank.cost.peak for rank in ranks)
        if peak <= room:
            break
        lines += ["", f"Not {best_one.keys}: in the dry run it takes {human_bytes(peak)}"]
    return "\n".join([*lines, "", f"The plan of {best_one.keys}", render(best_one.config, ranks, name, device)])

"""Layouts that fit on so many GPUs, best first: all of them by formula, the best one rehearsed."""

from dataclasses import dataclass

from neox.config import Config
from neox.estimate import analytic
from neox.estimate.hardware import GPU, USABLE, step_time
from neox.estimate.layouts import microbatches
from neox.estimate.page import _bytes
from neox.estimate.plan import rehearsed, render
from neox.parallel.pipeline import layers_of_stages

SHOWN = 8
"""Layouts in the table."""


@dataclass(frozen=True)
class Candidate:
    config: Config
    peak: int  # bytes, of the process that holds most
    seconds: float  # of a step, of the process that takes longest

    @property
    def keys(self) -> str:
        """What to add to the command."""
        parallel, train = self.config.parallel, self.config.train
        return (
            f"tp={parallel.tp} pp={parallel.pp} dp_shard={parallel.dp_shard} dp_replicate={parallel.dp_replicate} "
            f"zero={parallel.zero} activation_checkpointing={train.activation_checkpointing} "
            f"micro_batch_size={train.micro_batch_size}"
        )


def candidates(config: Config, gpus: int, device: GPU) -> list[Candidate]:
    """Every layout of tp, pp, dp, zero, checkpointing and micro batch that could run; by seconds, the fewest first."""
    model, found = config.model, []
    for tp in (1, 2, 4, 8):
        if gpus % tp or model.num_attention_heads % tp or model.ffn_size % tp or model.vocab_size % tp:
            continue
        for pp in (n for n in range(1, min(gpus // tp, model.num_hidden_layers) + 1) if gpus // tp % n == 0):
            data = gpus // tp // pp
            if data > config.train.global_batch_size or (pp > 1 and model.tie_word_embeddings):
                continue
            # One host shares the model's shards, hosts hold copies, beside all sharing one.
            replicas = {1, data // 8 if data > 8 and data % 8 == 0 else 1}
            for copies in replicas:
                for zero in (1, 2, 3) if pp == 1 and data > 1 else (1,):
                    parallel = {"tp": tp, "pp": pp, "dp_replicate": copies, "dp_shard": data // copies, "zero": zero}
                    found += _micro_batches(config, parallel, device)
    return sorted(found, key=lambda candidate: candidate.seconds)


def _micro_batches(config: Config, parallel: dict[str, int], device: GPU) -> list[Candidate]:
    """The layout with each checkpointing and micro batch size."""
    found = []
    share = -(-config.train.global_batch_size // (parallel["dp_replicate"] * parallel["dp_shard"]))
    layout = config.parallel.model_copy(update=parallel | {"cp": 1, "schedule": "1f1b", "stage_layers": ()})
    for checkpointing in ("none", "selective", "full"):
        for size in (1, 2, 4, 8, 16, 32):
            if size > share:
                break
            train = {"activation_checkpointing": checkpointing, "micro_batch_size": size}
            tried = config.model_copy(update={"parallel": layout, "train": config.train.model_copy(update=train)})
            if parallel["pp"] > 1 and microbatches(tried) < parallel["pp"]:
                break
            found.append(_estimated(tried, device))
    return found


def _estimated(config: Config, device: GPU) -> Candidate:
    pp = config.parallel.pp
    layers = [len(stage) for stage in layers_of_stages(config)] if pp > 1 else [config.model.num_hidden_layers]
    peak, seconds = 0, 0.0
    for number in sorted({0, min(1, pp - 1), pp - 1}):
        found = analytic.stage(config, number)
        time = step_time(config, device, layers[number], number == pp - 1, found.parameters, found.traffic)
        peak, seconds = max(peak, found.peak), max(seconds, time.total)
    return Candidate(config, peak, seconds)


def propose(config: Config, gpus: int, name: str, device: GPU) -> str:
    """A table of layouts that fit and the plan of the best, or one line on the closest where none does.

    Raises ValueError where no layout at all has `gpus` processes.
    """
    room = device.memory * USABLE
    every = candidates(config, gpus, device)
    if not every:
        raise ValueError(f"gpus={gpus}: no layout has so many processes; try a number with small factors")
    fitting = [candidate for candidate in every if candidate.peak <= room]
    if not fitting:
        least = min(every, key=lambda candidate: candidate.peak)
        return (
            f"nothing fits {gpus} x {name}: the closest, {least.keys}, takes {_bytes(least.peak)} of "
            f"{_bytes(room)}: more GPUs, larger ones, or a smaller model or seq_length would help"
        )
    for tries, best in enumerate(fitting[:3]):
        places = rehearsed(best.config)
        if max(place.trace.peak for place in places) <= room:
            break
        # The formula said that it fits: the rehearsal is right.
        fitting[tries] = Candidate(best.config, max(place.trace.peak for place in places), best.seconds)
    shown = [candidate for candidate in fitting[:SHOWN] if candidate.peak <= room]
    lines = [f"Layouts for {gpus} x {name}, by estimated seconds a step (formulas; the plan below is rehearsed)"]
    lines += [f"  {c.seconds:>8.3g} s  {_bytes(c.peak):>8}  {c.keys}" for c in shown]
    return "\n".join([*lines, "", render(best.config, places, name, device)])

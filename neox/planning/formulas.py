"""Memory and traffic of a layout by formula, in microseconds: `propose` chooses by them before the dry run.

Legend: C hidden, V vocabulary rows, T tokens, B sequences of a microbatch, M microbatches.
Schedules other than 1f1b and context parallelism get a lower bound; `propose` asks for neither.
"""

from neox.config import Config
from neox.model.training_memory import StageParameters, stage_memory, stage_parameters
from neox.parallel.pipeline import layers_of_stages
from neox.planning.dry_run import StepCost


def stage(config: Config, number: int) -> StepCost:
    """Memory and traffic of stage `number` of a 1f1b pipeline, or of the whole model."""
    model, pp = config.model, config.parallel.pp
    layers = len(layers_of_stages(config)[number]) if pp > 1 else model.num_hidden_layers
    first, last = number == 0, number == pp - 1
    shape = stage_parameters(model, config.parallel.tp, layers, first, last)
    memory = stage_memory(config, layers, first, last, in_flight=min(len(config.microbatches), pp - number))
    return StepCost(int(shape.total / config.parallel.shards), memory, _traffic(config, shape))


def _traffic(config: Config, stage: StageParameters) -> dict[tuple[str, str], int]:
    """Bytes sent in a step by (axis, collective): docs/parallel.md has the table."""
    parallel, count = config.parallel, len(config.microbatches)
    tp, n = parallel.tp, config.parallel.shards
    value = 4 if config.train.dtype == "fp32" else 2
    tokens = sum(config.microbatches) * config.data.seq_length
    x = tokens * config.model.hidden_size * value
    traffic = {}
    if tp > 1:
        sums = 1 if config.model.use_parallel_residual else 2
        borders = bool(stage.embedding) + bool(stage.head)
        traffic["tp", "all-reduce"] = 2 * (tp - 1) / tp * x * (2 * sums * stage.layers + borders)
    if parallel.pp > 1:
        traffic["pp", "send"] = x * (2 - bool(stage.embedding) - bool(stage.head))
    if n > 1:
        times = 1 if parallel.zero == 1 else count
        # ZeRO-3 gathers all but the embedding once more for the backward pass.
        gathered = count * (2 * stage.total - stage.embedding) if parallel.zero == 3 else times * stage.total
        traffic["dp_shard", "all-gather"] = (n - 1) / n * value * gathered
        traffic["dp_shard", "reduce-scatter"] = (n - 1) / n * 4 * stage.total * times
    if parallel.dp_replicate > 1:
        copies = parallel.dp_replicate
        traffic["dp_replicate", "all-reduce"] = 2 * (copies - 1) / copies * 4 * stage.total / n
    return {key: int(size) for key, size in traffic.items()}

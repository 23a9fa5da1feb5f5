"""Memory and traffic of a layout by formula, in microseconds: what `propose` chooses by before it rehearses.

Legend: C hidden, F MLP width, V vocabulary rows, T tokens, B sequences of a microbatch, M microbatches.
Of schedules other than 1f1b and of context parallelism it gives a lower bound; `propose` asks for neither.
Where microbatches only just fill the pipeline it gives too much memory: gradients are not there when all are in flight.
"""

from neox.config import Config
from neox.model.flops import parameters
from neox.parallel.pipeline import layers_of_stages
from neox.planning.dry_run import Trace
from neox.planning.layouts import microbatches, rows, shards


def stage(config: Config, number: int) -> Trace:
    """Stage `number` of a 1f1b pipeline, or the whole model, as a rehearsal would find it."""
    model, train, parallel = config.model, config.train, config.parallel
    tp, n, pp, count = parallel.tp, shards(config), parallel.pp, microbatches(config)
    c, f, v, p = model.hidden_size, model.ffn_size, model.vocab_size, parameters(model)
    layers = len(layers_of_stages(config)[number]) if pp > 1 else model.num_hidden_layers
    first, last = number == 0, number == pp - 1
    block = (p.attention + p.mlp + p.norms) / model.num_hidden_layers / tp
    ends = [p.embedding / tp if first else 0, p.head / tp if last else 0]
    own = layers * block + sum(ends)
    sharded = n * parallel.dp_replicate > 1
    value = 4 if train.dtype == "fp32" else 2
    stream = value if sharded else 4  # the residual stream, which autocast alone leaves in fp32
    tokens = rows(config)[0] * config.data.seq_length
    memory = {"weights": 4 * own / n, "optimizer": 8 * own / n, "gradients": 4 * own, "copies": 0.0}
    if sharded and parallel.zero > 1:
        memory["gradients"] /= n
    if sharded:
        memory["copies"] = value * own
        if parallel.zero == 3:
            memory["copies"] = value * (2 * block + sum(ends))
    elif train.dtype != "fp32":
        memory["copies"] = value * own
    # Of a token and block: what `checkpoint_blocks` keeps. Attention keeps q, k, v and its result, split over tp.
    mode, half = train.activation_checkpointing, train.dtype != "fp32"
    split = {"none": 4 * c + f, "selective": 4 * c, "full": 0}[mode] / tp
    if half:
        # What the rehearsals of 16 bits keep on top: a width without checkpointing, and where norms give fp32 the
        # copies that the products read.
        split += {"none": c + 2 * c * (not sharded), "selective": c * (not sharded), "full": 0}[mode]
    whole = c if mode != "selective" else c + c / tp
    kept = tokens * (stream * whole + value * split)
    in_flight = min(count, pp - number)
    again = tokens * (value * (4 * c + 2 * f) / tp + stream * 2 * c) if mode == "full" else 0
    memory["activations"] = in_flight * layers * kept + 2 * tokens * c * stream
    # What a later stage received is the input of its first block; the gradient comes in a buffer of its own.
    memory["received"] = tokens * c * stream if pp > 1 and not last else 0
    working, logits = again + 2 * tokens * c * stream + (4 * block if sharded else 0), 0.0
    if last:
        # A chunk of logits (in 16 bits the product, its fp32 copy, the error), the gradient of the head that another
        # microbatch's is added to, in 16 bits first as such, and the gradient of the hidden states, and their copy.
        logits = min(train.loss_chunk, tokens) * v / tp * (8 if half else 4)
        logits += v * c / tp * (6 if half else 4) + tokens * c * (stream + value * (stream != value))
    # The loss's buffers are gone when the blocks' backward pass needs its own, and whole gradients.
    whole_gradients = 4 * max(2 * block, *ends) if sharded and parallel.zero > 1 else 0.0
    if logits > working + whole_gradients:
        working = whole_gradients = 0.0
    else:
        logits = 0.0
    memory |= {"logits": logits, "working": working}
    memory["gradients"] += whole_gradients
    return Trace(int(own / n), {kind: int(size) for kind, size in memory.items()}, _traffic(config, own, layers, ends))


def _traffic(config: Config, own: float, layers: int, ends: list[float]) -> dict[tuple[str, str], int]:
    """Bytes a step: docs/parallel.md has the table."""
    parallel, count = config.parallel, microbatches(config)
    tp, n = parallel.tp, shards(config)
    value = 4 if config.train.dtype == "fp32" else 2
    tokens = sum(rows(config)) * config.data.seq_length
    x = tokens * config.model.hidden_size * value
    found = {}
    if tp > 1:
        sums = 1 if config.model.use_parallel_residual else 2
        borders = bool(ends[0]) + bool(ends[1])
        found["tp", "all-reduce"] = 2 * (tp - 1) / tp * x * (2 * sums * layers + borders)
    if parallel.pp > 1:
        found["pp", "send"] = x * (2 - bool(ends[0]) - bool(ends[1]))
    if n > 1:
        times = 1 if parallel.zero == 1 else count
        # ZeRO-3 gathers all but the embedding once more for the backward pass.
        gathered = count * (2 * own - ends[0]) if parallel.zero == 3 else times * own
        found["dp_shard", "all-gather"] = (n - 1) / n * value * gathered
        found["dp_shard", "reduce-scatter"] = (n - 1) / n * 4 * own * times
    if parallel.dp_replicate > 1:
        copies = parallel.dp_replicate
        found["dp_replicate", "all-reduce"] = 2 * (copies - 1) / copies * 4 * own / n
    return {key: int(size) for key, size in found.items()}

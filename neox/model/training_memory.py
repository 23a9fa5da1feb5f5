"""Memory of training by formula, in microseconds and without torch.

`neox show`, `neox.planning.propose` and the advice after an out-of-memory error use these formulas. The other model of
training memory is the dry run (`neox.planning.dry_run`), which executes a step; tests hold the two within 10 %.

Legend: C hidden, F MLP width, V vocabulary rows, T tokens, B sequences of a microbatch. All sizes are bytes.
Schedules other than 1f1b and context parallelism get a lower bound. Where microbatches only just fill the pipeline the
gradients are counted too high: they do not exist yet when all microbatches are in flight.
"""

from __future__ import annotations

from dataclasses import dataclass

from neox.config import Config, ModelConfig, ParallelConfig
from neox.model.flops import parameters

KINDS = ("weights", "copies", "gradients", "optimizer", "activations", "received", "logits", "working")
"""weights: this process's shard; copies: gathered weights, and weights cast to the dtype of the matrix products;
gradients: before and after reduction; received: buffers of the pipeline; logits: everything the loss allocates;
working: temporaries of the backward pass and of messages, recomputed blocks included."""
STATE = ("weights", "gradients", "optimizer")
WEIGHT, GRADIENT, MOMENTS = 4, 4, 8
"""Bytes per parameter: the fp32 weight, its fp32 gradient, AdamW's two fp32 moments."""


@dataclass(frozen=True)
class StageParameters:
    """Parameters of one pipeline stage on one rank of the axis tp, before data parallelism shards them."""

    layers: int
    block: float  # of one layer
    embedding: float  # 0 where the stage does not have it
    head: float  # likewise

    @property
    def total(self) -> float:
        return self.layers * self.block + self.embedding + self.head


def stage_parameters(
    model: ModelConfig, tp: int, layers: int, first: bool = True, last: bool = True
) -> StageParameters:
    """Count the parameters of a stage of `layers` layers; `first` has the embedding, `last` the head."""
    p = parameters(model)
    block = (p.attention + p.mlp + p.norms) / model.num_hidden_layers / tp
    return StageParameters(layers, block, p.embedding / tp if first else 0, p.head / tp if last else 0)


def state_memory(config: Config, stage: StageParameters, shards: int) -> dict[str, float]:
    """Weights, gradients, optimizer state and copies of a stage on one of `shards` ranks of the axis dp_shard.

    With a single shard and no replicas autocast makes the 16-bit copies; otherwise fully_shard gathers them.
    """
    model, parallel, fp32 = config.model, config.parallel, config.train.dtype == "fp32"
    sharded, value = shards * parallel.dp_replicate > 1, 4 if fp32 else 2
    moments = MOMENTS * stage.total
    if config.optim.name == "muon":  # one moment for the matrices of the blocks
        c, f = model.hidden_size, model.ffn_size
        moments -= MOMENTS / 2 * stage.layers * (4 * c * c + 2 * c * f) / parallel.tp
    memory = {
        "weights": WEIGHT * stage.total / shards,
        "optimizer": moments / shards,
        "gradients": GRADIENT * stage.total,
        "copies": 0.0,
    }
    if sharded and parallel.zero > 1:
        memory["gradients"] /= shards
    if sharded and parallel.zero == 3:
        memory["copies"] = value * (2 * stage.block + stage.embedding + stage.head)
    elif sharded or not fp32:
        memory["copies"] = value * stage.total
    return memory


def logits_bytes(config: Config, tokens: int) -> float:
    """One chunk of logits of the loss: in 16 bits the product, its fp32 copy and the gradient; in fp32 one buffer."""
    width = 4 if config.train.dtype == "fp32" else 2 + 4 + 2
    return min(config.train.loss_chunk, tokens) * config.model.vocab_size / config.parallel.tp * width


def stage_memory(
    config: Config, layers: int, first: bool = True, last: bool = True, in_flight: int = 1
) -> dict[str, int]:
    """Peak memory by kind of one process of a 1f1b pipeline stage.

    `in_flight` microbatches keep their activations for the backward pass at once.

    The activations per token and block follow Korthikanti et al. 2022, section 4.1, without dropout and without the
    attention matrix, which the fused kernel does not keep: the norms' input C, queries, keys, values and attention's
    output 4C, and the MLP before its activation F. The outputs of the norms and of the activation are recomputed.
    """
    model, train, parallel = config.model, config.train, config.parallel
    c, v, tp, shards = model.hidden_size, model.vocab_size, parallel.tp, parallel.shards
    stage = stage_parameters(model, tp, layers, first, last)
    memory = state_memory(config, stage, shards)
    sharded, half = shards * parallel.dp_replicate > 1, train.dtype != "fp32"
    value = 2 if half else 4
    stream = value if sharded else 4  # the residual stream: autocast alone leaves it in fp32
    tokens = config.microbatches[0] * config.data.seq_length
    per_token = _activations_per_token(config, sharded, value, stream)
    memory["activations"] = in_flight * layers * tokens * per_token + 2 * tokens * c * stream
    # A later stage received the input of its first block; the gradient comes in a buffer of its own.
    memory["received"] = tokens * c * stream if parallel.pp > 1 and not last else 0
    recomputed = 0.0
    if train.activation_checkpointing == "full":
        recomputed = tokens * (value * (4 * c + 2 * model.ffn_size) / tp + stream * 2 * c)
    working = recomputed + 2 * tokens * c * stream + (4 * stage.block if sharded else 0)
    logits = 0.0
    if last:
        # Besides the chunk: the accumulated gradient of the head, in 16 bits also the one that is added to it, and the
        # gradient of the hidden states with its copy.
        logits = logits_bytes(config, tokens) + v * c / tp * (6 if half else 4)
        logits += tokens * c * (stream + value * (stream != value))
    # The loss's buffers are free again when the backward pass of the blocks needs its own, and unreduced gradients.
    unreduced = 0.0
    if sharded and parallel.zero > 1:
        unreduced = GRADIENT * max(2 * stage.block, stage.embedding, stage.head)
    if logits > working + unreduced:
        working = unreduced = 0.0
    else:
        logits = 0.0
    memory |= {"logits": logits, "working": working}
    memory["gradients"] += unreduced
    return {kind: int(size) for kind, size in memory.items()}


def _activations_per_token(config: Config, sharded: bool, value: int, stream: int) -> float:
    """Bytes that a block keeps of a token for its backward pass; see `neox.parallel.blocks.checkpoint_blocks`."""
    model, tp, mode = config.model, config.parallel.tp, config.train.activation_checkpointing
    c, f = model.hidden_size, model.ffn_size
    split = {"none": 4 * c + f, "selective": 4 * c, "full": 0}[mode] / tp
    if config.train.dtype != "fp32":
        # The dry runs in 16 bits keep more: one width without checkpointing, and where the norms give fp32, the copies
        # that the matrix products read.
        split += {"none": c + 2 * c * (not sharded), "selective": c * (not sharded), "full": 0}[mode]
    whole = c if mode != "selective" else c + c / tp
    if not model.use_parallel_residual and mode != "full":
        whole += c  # the second norm has an input of its own
    return stream * whole + value * split


def one_device(config: Config) -> dict[str, int]:
    """Peak memory by kind of training on one device with nothing sharded."""
    alone = config.model_copy(update={"parallel": ParallelConfig()})
    return stage_memory(alone, config.model.num_hidden_layers)

"""Pipeline parallelism: layers in stages, microbatches passed from stage to stage by torch's schedules.

Shapes: M microbatches, B sequences a microbatch, T tokens a sequence, C hidden.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import pipelining
from torch.distributed.fsdp import FSDPModule

from neox.config import Config, ParallelConfig
from neox.model.decoder import GPTNeoX
from neox.model.flops import forward_flops, parameters
from neox.parallel.forward import Forward
from neox.parallel.fsdp import reshard
from neox.parallel.mesh import ParallelDims
from neox.system.device import resolve_dtype

SCHEDULES: dict[str, Any] = {
    "1f1b": pipelining.Schedule1F1B,
    "interleaved_1f1b": pipelining.ScheduleInterleaved1F1B,
}


def layers_of_stages(config: Config) -> list[range]:
    """Layers of each stage: those of `parallel.stage_layers`, else balanced by cost.

    In units of one block's forward FLOPs the head adds its product. The embedding adds as much as if it were one: what
    a lookup saves in time, its weight, gradient and optimizer state take in memory, on the stage that also keeps the
    most activations. Layer by layer goes to the cheapest stage, on a tie to the later one, which keeps fewer.
    """
    model, stages, T = config.model, config.parallel.stages, config.data.seq_length
    counts = list(config.parallel.stage_layers)
    if not counts:
        block = forward_flops(model, T, scored=0) / T / model.num_hidden_layers
        costs = [1.0] * stages
        costs[0] += 2 * parameters(model).embedding / block
        costs[-1] += 2 * model.vocab_size * model.hidden_size / block
        counts = [1] * stages
        for _ in range(model.num_hidden_layers - stages):
            cheapest = min(reversed(range(stages)), key=costs.__getitem__)
            counts[cheapest] += 1
            costs[cheapest] += 1
    starts = [sum(counts[:stage]) for stage in range(stages)]
    return [range(start, start + count) for start, count in zip(starts, counts, strict=True)]


def rank_of_stage(config: ParallelConfig, stage: int) -> int:
    """Rank of a stage along the axis pp: stages go round the ranks."""
    return stage % config.pp


def stages_of_rank(config: ParallelConfig, rank: int) -> list[int]:
    """Stages of rank `rank` along the axis pp."""
    return list(range(rank, config.stages, config.pp))


def check_pipeline(config: Config, dims: ParallelDims) -> None:
    """Raise ValueError for a schedule that cannot run the microbatches of each size of batch."""
    for size in (*(size for size, _ in config.train.batch_warmup), config.train.global_batch_size):
        _check_schedule(config, dims, size)


def _check_schedule(config: Config, dims: ParallelDims, size: int) -> None:
    parallel, train = config.parallel, config.train
    schedule, pp = parallel.schedule, parallel.pp
    share = -(-size // dims.dp_size)
    count = -(-share // train.micro_batch_size)
    rounds = max(1, count // pp)
    if schedule == "1f1b" and count < parallel.stages:
        need = f"at least {parallel.stages}, one a stage"
    elif schedule == "interleaved_1f1b" and count % rounds:
        need = f"a multiple of {rounds}, its rounds of {pp} or more"
    else:
        return
    raise ValueError(
        f"train.global_batch_size={size} gives each data-parallel rank {count} microbatches of "
        f"train.micro_batch_size={train.micro_batch_size}; parallel.schedule={schedule} with parallel.pp={pp} needs "
        f"{need}: change one of these"
    )


def pipelined(
    parts: Mapping[int, GPTNeoX], config: Config, dims: ParallelDims, forward: Forward
) -> Callable[[Sequence[Any], float, bool], Tensor]:
    """Build the callable that runs a step's microbatches through the stages; `parts` are those of this process.

    It returns the sum of the losses on the last stage's process, 0 elsewhere.
    """
    parallel, device, last = config.parallel, dims.device, config.parallel.stages - 1
    axis = dims.axis("pp")
    assert axis is not None
    group = axis.get_group()
    # A group's first operation must be one of all its members.
    dims.sum_over_stages(torch.zeros(1, device=device))
    scale_now = 1.0

    def loss_of(hidden: Tensor, labels: Tensor) -> Tensor:
        return forward.loss(parts[last], hidden, labels, scale_now)

    @cache
    def schedule(count: int, rows: int) -> Any:
        tokens = torch.empty((rows, config.data.seq_length // parallel.cp), dtype=torch.int64, device="meta")
        hidden = _hidden(parts, config, rows)
        stages = [
            _Stage(
                part,
                number,
                last + 1,
                device,
                # With both known torch need not run a microbatch, and its backward pass, to find out.
                input_args=hidden if number else tokens,
                output_args=hidden,
                group=group,
                forward=forward,
            )
            for number, part in parts.items()
        ]
        here = stages[0] if parallel.schedule == "1f1b" else stages
        return SCHEDULES[parallel.schedule](here, count, loss_of, scale_grads=False)

    def forward_backward(batches: Sequence[Any], scale: float, backward: bool) -> Tensor:
        nonlocal scale_now
        scale_now = scale
        tokens, labels, inputs = _joined(batches, device)
        if not backward:
            shape = _hidden(parts, config, len(tokens) // len(batches))
            return _forward_only(parts, parallel, group, forward, loss_of, shape, len(batches), tokens, labels, inputs)
        losses: list[Tensor] | None = [] if last in parts else None
        schedule(len(batches), len(tokens) // len(batches)).step(
            *([tokens] if 0 in parts else []),
            target=labels if last in parts else None,
            losses=losses,
            return_outputs=False,
            **inputs,
        )
        return torch.stack(losses).detach().sum() if losses else torch.zeros((), device=device)

    return forward_backward


class _Stage(pipelining.PipelineStage):
    """A stage that runs by `forward`, and keeps no receive buffer longer than needed."""

    def __init__(self, *args: Any, forward: Forward, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.forward = forward

    def forward_maybe_with_nosync(self, *args: Any, **kwargs: Any) -> Tensor:
        (x,) = args
        return self.forward(cast(GPTNeoX, self.submod), x, stage=self.stage_index, **kwargs)

    # torch keeps a buffer to receive in for each microbatch of a step: gigabytes, of which a few are in use at a time.
    # Here a buffer is made when a message is to come, and is its reader's own afterwards; between, a meta tensor keeps
    # the shape. tests/parallel/test_pipeline.py holds these private methods.

    def _setup_forward_recv_info(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_forward_recv_info(*args, **kwargs)
        for infos in self.args_recv_info.values():
            _drop_buffers(infos)

    def _create_grad_recv_info(self, *args: Any, **kwargs: Any) -> Any:
        infos = super()._create_grad_recv_info(*args, **kwargs)
        _drop_buffers(infos)
        return infos

    def _get_recv_ops(self, recv_infos: Any) -> Any:
        for info in recv_infos:
            if getattr(info, "buffer", None) is not None and info.buffer.device.type == "meta":
                info.buffer = torch.empty_like(info.buffer, device=self.device)
        return super()._get_recv_ops(recv_infos)

    def _retrieve_recv_activations(self, fwd_chunk_id: int) -> Any:
        received = super()._retrieve_recv_activations(fwd_chunk_id)
        _drop_buffers(self.args_recv_info[fwd_chunk_id])
        return received

    def _retrieve_recv_grads(self, bwd_chunk_id: int) -> Any:
        received = super()._retrieve_recv_grads(bwd_chunk_id)
        _drop_buffers(self.grad_recv_info[bwd_chunk_id])
        return received

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        if loss is not None and full_backward:
            loss.detach_()  # the schedule keeps losses to the end of the step, and their graphs what was received


def _drop_buffers(infos: Any) -> None:
    """Drop our reference to the receive buffers; keep a meta tensor for the shape."""
    for info in infos:
        if getattr(info, "buffer", None) is not None:
            info.buffer = torch.empty_like(info.buffer, device="meta", requires_grad=False)


def _joined(batches: Sequence[Any], device: torch.device) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Join all microbatches: tokens and labels [M B, T], and the other inputs of each stage, to be split by M.

    All stages exchange tensors of one shape: the last microbatch is filled up with rows that are ignored.
    """
    rows = [len(batch.tokens) for batch in batches]
    assert all(count == rows[0] for count in rows[:-1]), "only the last microbatch may be smaller"
    if filler := rows[0] - rows[-1]:
        batches = [*batches[:-1], batches[-1].filled(filler)]

    def join(field: str) -> Tensor:
        return torch.cat([getattr(batch, field) for batch in batches]).to(device)

    inputs = {"positions": join("positions"), "sample": torch.tensor([batch.first for batch in batches])}
    if batches[0].segments is not None:
        inputs["segments"] = join("segments")
    return join("tokens"), join("labels"), inputs


def _hidden(parts: Mapping[int, GPTNeoX], config: Config, rows: int) -> Tensor:
    """Meta tensor in the shape of the hidden states that go from stage to stage."""
    parallel = config.parallel
    # fully_shard hands blocks their input in the type of their products; autocast alone leaves the residual stream be.
    sharded = isinstance(next(iter(parts.values())), FSDPModule)
    dtype = resolve_dtype(config.train.dtype) if sharded else torch.float32
    # Between blocks a process holds its part of a sequence that is split.
    length = config.data.seq_length // parallel.cp // (parallel.tp if parallel.sequence_parallel else 1)
    shape = (rows, length, config.model.hidden_size)
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)


@torch.no_grad()
def _forward_only(
    parts: Mapping[int, GPTNeoX],
    parallel: ParallelConfig,
    group: dist.ProcessGroup,
    forward: Forward,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    hidden: Tensor,
    count: int,
    tokens: Tensor,
    labels: Tensor,
    inputs: Mapping[str, Tensor],
) -> Tensor:
    """Sum of the losses, without a backward pass, for any number of microbatches.

    At each tick a rank takes one microbatch through one of its stages, and all pass on their results. A microbatch
    enters the second stages of the ranks when the last one has left the first ones.
    """
    total = torch.zeros((), device=tokens.device)
    waiting = {(0, micro): chunk for micro, chunk in enumerate(tokens.chunk(count))}
    targets = labels.chunk(count)
    split = {name: value.chunk(count) for name, value in inputs.items()}
    lap = parallel.pp + count - 1
    for tick in range(lap * (parallel.stages // parallel.pp)):
        operations = []
        for stage in range(parallel.stages):
            micro = tick - stage // parallel.pp * lap - stage % parallel.pp
            if not 0 <= micro < count:
                continue
            following = stage + 1, micro
            if stage in parts:
                mine = {name: chunks[micro] for name, chunks in split.items()}
                out = forward(parts[stage], waiting.pop((stage, micro)), stage=stage, **mine)
                if stage + 1 == parallel.stages:
                    total += loss_of(out, targets[micro])
                elif stage + 1 in parts:
                    waiting[following] = out
                else:
                    peer = rank_of_stage(parallel, stage + 1)
                    operations.append(dist.P2POp(dist.isend, out.contiguous(), group=group, group_peer=peer))
            elif stage + 1 in parts:
                waiting[following] = torch.empty_like(hidden, device=tokens.device, requires_grad=False)
                peer = rank_of_stage(parallel, stage)
                operations.append(dist.P2POp(dist.irecv, waiting[following], group=group, group_peer=peer))
        for work in dist.batch_isend_irecv(operations) if operations else ():
            work.wait()
    for part in parts.values():
        reshard(part)
    return total

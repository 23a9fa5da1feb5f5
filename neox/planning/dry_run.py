"""A rehearsal: one step of one process of a run that is not there, by the real code, on tensors without values.

Model, sharding, pipeline schedule, loss, clipping and optimizer are those that train. The other processes are a fake
group whose messages go nowhere, the tensors fake ones that take no memory. `rehearse` needs a process of its own: what
DTensor works out for one world does not hold in another (`python -m neox.planning.dry_run`, which `trace` starts).
"""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from neox.config import Config
from neox.planning.layouts import microbatches, processes, rows

if TYPE_CHECKING:
    from neox.parallel import Layout


@dataclass(frozen=True)
class Trace:
    """What one process holds and sends in a step."""

    parameters: int  # of its stages, its own share of them
    memory: dict[str, int]  # bytes by kind at the peak, see `neox.planning.memory_tracker`
    traffic: dict[tuple[str, str], int]  # bytes sent by (axis, collective)

    @property
    def peak(self) -> int:
        return sum(self.memory.values())


def trace(config: Config, rank: int) -> Trace:
    """Rehearse rank `rank` of the run in a process of its own. Raises ValueError for a layout that is refused."""
    child = subprocess.run(
        [sys.executable, "-m", "neox.planning.dry_run", str(rank)],
        input=config.model_dump_json(),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if child.returncode:
        refused = child.stdout.removeprefix("refused: ")
        if child.stdout == refused:
            raise RuntimeError(child.stderr)
        raise ValueError(refused.strip())
    found = json.loads(child.stdout)
    traffic = {(axis, kind): size for axis, kind, size in found.pop("traffic")}
    return Trace(traffic=traffic, **found)


def counts(config: Config) -> list[int]:
    """Numbers of microbatches to rehearse with.

    Beyond what fills the pipeline another one adds the same to memory and traffic each time, so two numbers tell all;
    a step of no more is rehearsed whole.
    """
    parallel, whole = config.parallel, microbatches(config)
    if parallel.pp == 1:
        few = [3, 4]
    elif parallel.schedule == "1f1b":
        few = [parallel.pp + 1, parallel.pp + 2]
    else:
        few = [2 * parallel.stages, 2 * parallel.stages + parallel.pp]
    return [whole] if whole <= few[1] else few


def rehearse(config: Config, rank: int) -> Trace:
    """In a process that has no process group, and is of no further use."""
    import torch
    import torch.distributed as dist

    from neox.parallel import layout
    from neox.system.runtime import Processes

    world = processes(config)
    if world > 1:
        dist.init_process_group("fake", rank=rank, world_size=world)
    few, whole = counts(config), microbatches(config)
    place = layout(config.parallel, Processes(rank, world), torch.device("cpu"))
    steps = [_step(config, place, count) for count in few]

    def at_whole(field: str) -> Counter[Any]:
        values = [getattr(step, field) for step in steps]
        if len(few) == 1:
            return values[0]
        (a, b), each = values, (whole - few[1]) // (few[1] - few[0])
        return Counter({key: b[key] + each * (b[key] - a[key]) for key in a | b})

    return Trace(steps[-1].parameters, at_whole("memory"), at_whole("traffic"))


def _step(config: Config, place: "Layout", count: int) -> Trace:
    """One step of `count` microbatches, from building the model to the optimizer's update."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed.tensor._sharding_prop import ShardingPropagator
    from torch.utils._python_dispatch import _disable_current_modes

    from neox.checkpoint import fill_state
    from neox.data import Batch
    from neox.model.decoder import GPTNeoX
    from neox.parallel import build
    from neox.parallel.fsdp import shard
    from neox.parallel.loss import LossHead
    from neox.planning.memory_tracker import Ledger
    from neox.planning.traffic import Recorder
    from neox.train.optim import build_optimizers, clip_gradients

    take_loss = LossHead.loss

    def take_loss_as_logits(*arguments: Any) -> Any:
        with ledger.during("logits"):
            return take_loss(*arguments)

    def for_real(function: Callable[..., Any]) -> Callable[..., Any]:
        """Without values, but not fake: modules on the meta device, and meshes, which look at ranks as numbers."""

        def call(*arguments: Any) -> Any:
            with _disable_current_modes():
                return function(*arguments)

        return call

    # DTensor tries its operators at global size, the first time: nothing that a process would hold.
    global_size = ShardingPropagator._propagate_tensor_meta_non_cached
    # The last microbatch may be smaller than the others.
    sizes, length = [*rows(config)[: count - 1], rows(config)[-1]], config.data.seq_length
    with (
        FakeTensorMode(allow_non_fake_inputs=True) as fake,
        Ledger(fake) as ledger,
        patch("neox.parallel.build.GPTNeoX", for_real(GPTNeoX)),
        patch("neox.parallel.build.shard", for_real(shard)),
        patch.object(LossHead, "loss", take_loss_as_logits),
        patch.object(ShardingPropagator, "_propagate_tensor_meta_non_cached", for_real(global_size)),
    ):
        parts, forward_backward = build(config, place)
        with ledger.during("optimizer"):
            optimizers = build_optimizers(parts, config.optim)
            fill_state(optimizers)
        parameters = [parameter for part in parts for parameter in part.parameters()]
        with ledger.during("activations"):
            batches = [
                Batch(
                    torch.zeros(size, length, dtype=torch.int64),
                    torch.zeros(size, length, dtype=torch.int64),
                    torch.arange(length).repeat(size, 1),
                )
                for size in sizes
            ]
            for part in parts:
                part.train()
            with Recorder(place) as recorder:
                forward_backward(batches, 1.0)
            ledger.mark([parameter.grad for parameter in parameters], "gradients")
        with ledger.during("working"):
            clip_gradients(parts, config.optim.clip, 1.0, place)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        own = sum(getattr(p, "_local_tensor", p).numel() for p in parameters)
    return Trace(own, ledger.peak(), recorder.traffic())


def main() -> int:
    config = Config.model_validate_json(sys.stdin.read())
    try:
        found = rehearse(config, int(sys.argv[1]))
    except ValueError as error:
        print(f"refused: {error}")
        return 1
    traffic = [[axis, kind, size] for (axis, kind), size in sorted(found.traffic.items())]
    print(json.dumps({"parameters": found.parameters, "memory": found.memory, "traffic": traffic}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Dry run of one process of a run: one step of the training code on fake tensors in a fake process group.

Model, sharding, pipeline schedule, loss, clipping and optimizer are those that train. Fake tensors take no memory, and
the fake group sends nothing. Each dry run needs a process of its own, because DTensor caches results for one world
size: `dry_run` starts `python -m neox.planning.dry_run`, which calls `dry_run_here`.
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

if TYPE_CHECKING:
    from neox.parallel import ParallelDims


@dataclass(frozen=True)
class StepCost:
    """Memory and traffic of one process in one step."""

    parameters: int  # that this process stores, after sharding
    memory: dict[str, int]  # bytes by kind at the peak: `neox.model.training_memory.KINDS`
    traffic: dict[tuple[str, str], int]  # bytes sent by (axis, collective)

    @property
    def peak(self) -> int:
        """Peak memory in bytes."""
        return sum(self.memory.values())


def dry_run(config: Config, rank: int) -> StepCost:
    """Dry-run a step of rank `rank` in a process of its own. Raises ValueError for a layout that is refused."""
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
    cost = json.loads(child.stdout)
    traffic = {(axis, kind): size for axis, kind, size in cost.pop("traffic")}
    return StepCost(traffic=traffic, **cost)


def step_sizes(config: Config) -> list[int]:
    """Numbers of microbatches of the steps to run: two short steps, or the whole step where it is as short.

    Once the pipeline is full, each further microbatch adds the same memory and traffic, so two steps are enough to
    extrapolate.
    """
    parallel, whole = config.parallel, len(config.microbatches)
    if parallel.pp == 1:
        few = [3, 4]
    elif parallel.schedule == "1f1b":
        few = [parallel.pp + 1, parallel.pp + 2]
    else:
        few = [2 * parallel.stages, 2 * parallel.stages + parallel.pp]
    return [whole] if whole <= few[1] else few


def dry_run_here(config: Config, rank: int) -> StepCost:
    """Dry-run a step in this process, which must have no process group and must end afterwards."""
    import torch
    import torch.distributed as dist

    from neox.parallel import parallel_dims
    from neox.system.processes import Processes

    world = config.parallel.processes
    if world > 1:
        dist.init_process_group("fake", rank=rank, world_size=world)
    few, whole = step_sizes(config), len(config.microbatches)
    mesh = parallel_dims(config.parallel, Processes(rank, world), torch.device("cpu"))
    steps = [_step(config, mesh, count) for count in few]

    def extrapolated(field: str) -> Counter[Any]:
        values = [getattr(step, field) for step in steps]
        if len(few) == 1:
            return values[0]
        (a, b), each = values, (whole - few[1]) // (few[1] - few[0])
        return Counter({key: b[key] + each * (b[key] - a[key]) for key in a | b})

    return StepCost(steps[-1].parameters, extrapolated("memory"), extrapolated("traffic"))


def _step(config: Config, mesh: "ParallelDims", count: int) -> StepCost:
    """Run one step of `count` microbatches, from building the model to the optimizer's update."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed.tensor._sharding_prop import ShardingPropagator
    from torch.utils._python_dispatch import _disable_current_modes

    from neox.data import Batch
    from neox.model.decoder import GPTNeoX
    from neox.parallel import build
    from neox.parallel.fsdp import shard
    from neox.parallel.loss import LossHead
    from neox.planning.memory_tracker import MemoryTracker
    from neox.planning.traffic import TrafficCounter
    from neox.train.optim import build_optimizers, clip_gradients

    take_loss = LossHead.loss

    def take_loss_as_logits(*arguments: Any) -> Any:
        with tracker.during("logits"):
            return take_loss(*arguments)

    def not_fake(function: Callable[..., Any]) -> Callable[..., Any]:
        """Run outside the fake mode: modules on the meta device, and meshes, which read ranks as numbers."""

        def call(*arguments: Any) -> Any:
            with _disable_current_modes():
                return function(*arguments)

        return call

    # DTensor runs each new operator once at global size, which a process would never hold: not counted.
    global_size = ShardingPropagator._propagate_tensor_meta_non_cached
    # The last microbatch may be smaller than the others.
    sizes, length = [*config.microbatches[: count - 1], config.microbatches[-1]], config.data.seq_length
    with (
        FakeTensorMode(allow_non_fake_inputs=True) as fake,
        MemoryTracker(fake) as tracker,
        patch("neox.parallel.build.GPTNeoX", not_fake(GPTNeoX)),
        patch("neox.parallel.build.shard", not_fake(shard)),
        patch.object(LossHead, "loss", take_loss_as_logits),
        patch.object(ShardingPropagator, "_propagate_tensor_meta_non_cached", not_fake(global_size)),
    ):
        parts, forward_backward = build(config, mesh)
        with tracker.during("optimizer"):
            optimizers = build_optimizers(parts, config.optim)
        parameters = [parameter for part in parts for parameter in part.parameters()]
        with tracker.during("activations"):
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
            with TrafficCounter(mesh) as counter:
                forward_backward(batches, 1.0)
            tracker.mark([parameter.grad for parameter in parameters], "gradients")
        with tracker.during("working"):
            clip_gradients(parts, config.optim.clip, 1.0, mesh)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        stored = sum(getattr(p, "_local_tensor", p).numel() for p in parameters)
    return StepCost(stored, tracker.peak(), counter.traffic())


def main() -> int:
    """Read a config as JSON from stdin, print the cost of the rank in argv as JSON."""
    config = Config.model_validate_json(sys.stdin.read())
    try:
        cost = dry_run_here(config, int(sys.argv[1]))
    except ValueError as error:
        print(f"refused: {error}")
        return 1
    traffic = [[axis, kind, size] for (axis, kind), size in sorted(cost.traffic.items())]
    print(json.dumps({"parameters": cost.parameters, "memory": cost.memory, "traffic": traffic}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

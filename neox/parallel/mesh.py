"""The processes of a run as a mesh: its axes, and the coordinates of this process."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from neox.config import ParallelConfig
from neox.system.processes import Processes

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""Outermost first, as gpt-neox orders its ranks: tensor parallelism, which talks most, is among neighbours."""


@dataclass(frozen=True)
class ParallelDims:
    """Mesh and coordinates of this process. Data parallelism covers two axes: each of its ranks reads other samples."""

    processes: Processes
    device: torch.device
    mesh: DeviceMesh | None  # axes AXES; None for one process alone

    def size(self, axis: str) -> int:
        """Number of processes along an axis."""
        return 1 if self.mesh is None else self.mesh.size(AXES.index(axis))

    def rank(self, axis: str) -> int:
        """Rank of this process along an axis."""
        return 0 if self.mesh is None else self.mesh.get_local_rank(axis)

    def axis(self, name: str) -> DeviceMesh | None:
        """Mesh of one axis, None where it has one process."""
        return None if self.mesh is None or self.size(name) == 1 else self.mesh[name]

    @property
    def dp_size(self) -> int:
        """Number of ranks that read different samples."""
        return self.size("dp_replicate") * self.size("dp_shard")

    @property
    def dp_rank(self) -> int:
        """Rank of this process among those that read different samples."""
        return self.rank("dp_replicate") * self.size("dp_shard") + self.rank("dp_shard")

    def sum_over_stages(self, value: torch.Tensor) -> torch.Tensor:
        """Sum over the stages of the pipeline, on each of them; `value` is overwritten."""
        stages = self.axis("pp")
        if stages is not None:
            dist.all_reduce(value, group=stages.get_group())
        return value

    def sum_over_data(self, value: int) -> int:
        """Sum over the ranks that read different samples."""
        return self.processes.all_reduce_sum(value) // (self.processes.world // self.dp_size)


def parallel_dims(config: ParallelConfig, processes: Processes, device: torch.device) -> ParallelDims:
    """Build the mesh of `config`. Raises ValueError if its axes do not multiply up to the number of processes."""
    world, least = processes.world, config.processes // config.shards
    shard = config.dp_shard or max(1, world // least)
    sizes = (config.pp, config.dp_replicate, shard, config.cp, config.tp)
    if shard * least != world:
        factors = " x ".join(f"parallel.{axis}={size}" for axis, size in zip(AXES, sizes, strict=True) if size > 1)
        raise ValueError(
            f"{factors or 'one process'} is {shard * least} processes, {world} run: start as many with torchrun, "
            "or change parallel"
        )
    if world == 1:
        return ParallelDims(processes, device, None)
    return ParallelDims(processes, device, init_device_mesh(device.type, sizes, mesh_dim_names=AXES))

"""The processes of a run as a mesh: its axes, and this process's place on the data axes."""

from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from neox.config import ParallelConfig
from neox.runtime import Processes


@dataclass(frozen=True)
class Layout:
    """Where this process stands. Data parallelism covers both its axes: each rank reads other samples."""

    processes: Processes
    device: torch.device
    mesh: DeviceMesh | None  # axes dp_replicate, dp_shard; None for one process alone
    dp_rank: int = 0
    dp_size: int = 1


def layout(config: ParallelConfig, processes: Processes, device: torch.device) -> Layout:
    """The mesh of `config` over the processes. Raises ValueError where its axes do not make up their number."""
    world, replicate = processes.world, config.dp_replicate
    shard = config.dp_shard or world // replicate
    if replicate * shard != world:
        raise ValueError(
            f"parallel.dp_replicate={replicate} x parallel.dp_shard={shard} is {replicate * shard} processes, "
            f"{world} run: start as many with torchrun, or change parallel"
        )
    if world == 1:
        return Layout(processes, device, None)
    mesh = init_device_mesh(device.type, (replicate, shard), mesh_dim_names=("dp_replicate", "dp_shard"))
    return Layout(processes, device, mesh, processes.rank, world)

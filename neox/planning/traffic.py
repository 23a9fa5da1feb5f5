"""Bytes that a process sends, by mesh axis and collective: counted while the real code runs."""

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from neox.parallel import ParallelDims
from neox.parallel.mesh import AXES

KINDS = {
    "allreduce": "all-reduce",
    "allgather": "all-gather",
    "all_gather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "send": "send",
}
"""Name of a collective here, by a substring of its operator's name."""
NEGLIGIBLE = 16
"""Bytes up to which a message is not counted: sums for log lines and clipping, handshakes of the pipeline."""
Traffic = Counter[tuple[str, str]]
"""(axis, collective) -> bytes sent."""


class TrafficCounter(TorchDispatchMode):
    """Record each collective inside: axis, kind, and bytes as a ring algorithm sends them.

    A message of S bytes (the largest tensor read or written) over n processes counts (n - 1) / n S for a gather or a
    reduce-scatter, twice that for an all-reduce; a send as S.
    """

    def __init__(self, dims: ParallelDims) -> None:
        super().__init__()
        self.calls: list[tuple[str, str, int]] = []
        self.axes = {"": ("world", dims.processes.world)}
        for axis in AXES:
            if mesh := dims.axis(axis):
                self.axes[mesh.get_group().group_name] = axis, mesh.size()
        if dims.mesh is not None and dims.size("cp") > 1:
            flat = dims.mesh["dp_shard", "cp"]._flatten("dp_shard_cp")
            self.axes.setdefault(flat.get_group().group_name, ("dp_shard x cp", flat.size()))

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # its operations on local tensors arrive here
        result = function(*args, **(kwargs or {}))
        name = function._schema.name
        kind = next((KINDS[word] for word in KINDS if word in name), None)
        if name.startswith(("c10d::", "_c10d_functional::")) and kind:
            tensors: list[torch.Tensor] = []
            group = ""
            for value in (*args, *(kwargs or {}).values(), result):
                for item in value if isinstance(value, list | tuple) else [value]:
                    tensors += item if isinstance(item, list) else [item] if isinstance(item, torch.Tensor) else []
                if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):
                    group = dist.ProcessGroup.unbox(value).group_name
                elif isinstance(value, str) and value in self.axes:
                    group = value
            axis, size = self.axes.get(group, self.axes[""])
            largest = max(tensor.numel() * tensor.element_size() for tensor in tensors)
            share = largest * (size - 1) // size
            self.calls.append((axis, kind, {"all-reduce": 2 * share, "send": largest}.get(kind, share)))
        return result

    def traffic(self) -> Traffic:
        """Bytes by axis and kind, without negligible messages."""
        traffic: Traffic = Counter()
        for axis, kind, size in self.calls:
            if size > NEGLIGIBLE:
                traffic[axis, kind] += size
        return traffic

"""Memory tracker of the dry run: every storage that is allocated and freed while a step runs on fake tensors.

The kinds of memory are `neox.model.training_memory.KINDS`.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryTracker(TorchDispatchMode):
    """Track the storages of the fake tensors that are created inside. Enter `fake` first, then this.

    Fake tensors have no values. Where the code reads one, a bool is False (nothing overflowed, nothing is clipped) and
    a number is 1 (whether all stages of a pipeline know their shapes; a seed).
    """

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.fake = fake
        self.phase = "weights"
        self.events: list[tuple[int, int]] = []  # (storage number, bytes: > 0 allocated, < 0 freed), in order
        self.kinds: list[str] = []  # by storage number: the phase of the allocation, until an operator says more
        self._live: dict[int, tuple[int, int]] = {}  # address of the StorageImpl -> (storage number, bytes)
        self._patch = patch.object(torch.UntypedStorage, "resize_", self._resizing(torch.UntypedStorage.resize_))

    def __enter__(self) -> "MemoryTracker":
        self._patch.start()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.stop()

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Give storages that are allocated inside this kind."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def mark(self, tensors: Any, kind: str) -> None:
        """Give the storages of these tensors this kind, from their allocation on."""
        for tensor in tree_leaves(tensors):
            tensor = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
            if isinstance(tensor, Tensor) and (entry := self._live.get(tensor.untyped_storage()._cdata)):
                self.kinds[entry[0]] = kind

    def peak(self) -> Counter[str]:
        """Bytes by kind at the moment of the highest total."""
        total = most = at = 0
        for count, (_, size) in enumerate(self.events, 1):
            total += size
            if total > most:
                most, at = total, count
        by_kind: Counter[str] = Counter()
        for number, size in self.events[:at]:
            by_kind[self.kinds[number]] += size
        return by_kind

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # its operations on local tensors arrive here
        try:
            result = function(*args, **(kwargs or {}))
        except DataDependentOutputException:
            return False if args[0].dtype == torch.bool else 1
        name = function._schema.name
        kind = self.phase
        if kind == "activations" and torch._C._current_graph_task_id() != -1:
            kind = "working"
        if name == "aten::_to_copy" and self._kind(args[0]) in ("weights", "copies"):
            kind = "copies"
        for tensor in tree_leaves(result):
            if isinstance(tensor, FakeTensor) and tensor.fake_mode is self.fake and tensor.device.type != "meta":
                self._note(tensor.untyped_storage(), kind)
        # Only the operator that uses a storage reveals these kinds. fully_shard splits the gathered weights out of the
        # message, and concatenates gradients into one.
        if name == "fsdp::split_with_sizes_copy":
            self.mark((kwargs or {}).get("out"), "copies")
        elif name == "fsdp::chunk_cat":
            self.mark(args[0], "gradients")
        elif name == "c10d::recv_":
            self.mark(args[0], "received")
        return result

    def _kind(self, tensor: Tensor) -> str:
        entry = self._live.get(tensor.untyped_storage()._cdata)
        return self.kinds[entry[0]] if entry else ""

    def _note(self, storage: torch.UntypedStorage, kind: str) -> None:
        if storage._cdata not in self._live:
            self._begin(storage, kind)
            weakref.finalize(storage, self._end, storage._cdata)

    def _begin(self, storage: torch.UntypedStorage, kind: str) -> None:
        self._live[storage._cdata] = len(self.kinds), storage.nbytes()
        self.events.append((len(self.kinds), storage.nbytes()))
        self.kinds.append(kind)

    def _end(self, address: int) -> None:
        number, size = self._live.pop(address)
        self.events.append((number, -size))

    def _resizing(self, resize: Callable[..., Any]) -> Callable[..., Any]:
        """Track resizes: fully_shard frees and reallocates gathered weights by resizing their storage."""

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            known = self._live.get(storage._cdata)
            result = resize(storage, size)
            if known:
                self._end(storage._cdata)
                self._begin(storage, self.kinds[known[0]])
            return result

        return resized

"""A hash that tells one model from another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from neox.system.machine import available_cores


def inner_tensors(tensor: Tensor) -> list[Tensor]:
    """List the plain tensors of a wrapper such as torchao's, which has no `flatten`; a plain tensor is its own."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [getattr(tensor, name) for name in names]


def fingerprint(tensors: Mapping[str, Tensor], *others: Any) -> str:
    """Hash the names, shapes, dtypes and every byte of the tensors, and `others` as JSON.

    All cores hash: about 1 GB/s each.
    """
    digest = hashlib.sha256(json.dumps(others, default=str).encode())
    with ThreadPoolExecutor(available_cores()) as pool:  # hashing lets other threads run
        for hashed in pool.map(_hashed, tensors.items()):
            digest.update(hashed)
    return digest.hexdigest()


def _hashed(named: tuple[str, Tensor]) -> bytes:
    name, tensor = named
    digest = hashlib.sha256(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode())
    for part in inner_tensors(tensor):
        values = part.detach().flatten().contiguous().cpu()
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.digest()

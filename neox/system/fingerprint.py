"""A hash that tells one model from another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

VALUES = 4096  # of each tensor, spread over it: a training step changes them all


def inner_tensors(tensor: Tensor) -> list[Tensor]:
    """List the plain tensors of a wrapper such as torchao's, which has no `flatten`; a plain tensor is its own."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [getattr(tensor, name) for name in names]


def fingerprint(tensors: Mapping[str, Tensor], *others: Any) -> str:
    """Hash the names, shapes, dtypes and VALUES values of each tensor, and `others` as JSON."""
    digest = hashlib.sha256(json.dumps(others, default=str).encode())
    for name, tensor in tensors.items():
        digest.update(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode())
        for part in inner_tensors(tensor):
            flat = part.detach().flatten()
            values = flat[:: max(1, len(flat) // VALUES)].contiguous().cpu()
            digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

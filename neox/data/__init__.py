"""Token files to batches: .bin/.idx -> build_datasets -> Loader -> Batch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from neox.data.datasets import Datasets, build_datasets
from neox.data.order import PermutedOrder, SequentialOrder
from neox.data.token_file import TokenFile, TokenWriter, token_dtype
from neox.data.windows import Dataset, TokenDataset

if TYPE_CHECKING:
    from neox.data.loader import Batch, Loader

__all__ = [
    "Batch",
    "Dataset",
    "Datasets",
    "Loader",
    "PermutedOrder",
    "SequentialOrder",
    "TokenDataset",
    "TokenFile",
    "TokenWriter",
    "build_datasets",
    "token_dtype",
]


_HOME = {"Batch": "neox.data.loader", "Loader": "neox.data.loader"}


def __getattr__(name: str) -> Any:
    """Resolve Loader and Batch on first use: they import torch, which `prepare` has no need to wait for."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)

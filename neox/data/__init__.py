"""From text to batches: text -> prepare -> .bin/.idx -> build_datasets -> Loader -> Batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from neox.data.build import Datasets, build_datasets
from neox.data.dataset import Dataset, TokenDataset
from neox.data.mmap import TokenFile, TokenWriter, token_dtype
from neox.data.order import PermutedOrder, SequentialOrder
from neox.data.prepare import PrepareReport, prepare
from neox.data.readers import read_documents

if TYPE_CHECKING:
    from neox.data.loader import Batch, Loader

__all__ = [
    "Batch",
    "Dataset",
    "Datasets",
    "Loader",
    "PermutedOrder",
    "PrepareReport",
    "SequentialOrder",
    "TokenDataset",
    "TokenFile",
    "TokenWriter",
    "build_datasets",
    "prepare",
    "read_documents",
    "token_dtype",
]


def __getattr__(name: str) -> Any:
    """Loader and Batch on first use: they import torch, which `prepare` has no need to wait for."""
    if name in ("Batch", "Loader"):
        from neox.data import loader

        return getattr(loader, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""A run's order of samples as gpt-neox's index files, for its tools or for proof."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from neox.data.arrays import write_npy
from neox.data.blend import BlendedDataset
from neox.data.megatron import MegatronDataset
from neox.data.windows import Dataset, TokenDataset

BLOCK = 1 << 20  # rows made at once
ENDINGS = {"today": "_packedpi_ac", "v1": ""}
"""Part of the files' names that gpt-neox has added: samples are packed, documents may be cut."""


def export_order(dataset: Dataset, samples: int, seed: int, out: Path, names: str = "today") -> list[Path]:
    """Write doc_idx, sample_idx and shuffle_idx of each source.

    The run takes `samples` samples.

    Files are `OUT_train[_N]_indexmap_{ns}ns_{sl}sl_{seed}s_packedpi_ac_{doc,sample,shuffle}_idx.npy`, with `names` "v1"
    those of gpt-neox 1.0, without `_packedpi_ac`: N is the number of the source in a blend, ns the number of samples
    that its order is made for. A reader takes sample i of a source to be the
    tokens of its documents in the order of doc_idx from sample_idx[shuffle_idx[i]] to sample_idx[shuffle_idx[i] + 1],
    both included. Of the permuted order shuffle_idx has the samples that the run takes, over all epochs. Raises
    ValueError where the order cannot be said so: text pooled from several files, and preshuffled documents. Source:
    EleutherAI/gpt-neox, megatron/data/gpt2_dataset.py.
    """
    if not isinstance(dataset, BlendedDataset):
        return _export(dataset, samples, seed, f"{out}_train", ENDINGS[names])
    given = dataset.schedule.given(samples).tolist()
    sources: Sequence[Dataset] = dataset.datasets
    paths = []
    for n, source in enumerate(sources):
        paths += _export(source, given[n], seed, f"{out}_train_{n}", ENDINGS[names])
    return paths


def _export(dataset: Dataset, samples: int, seed: int, name: str, ending: str) -> list[Path]:
    length = dataset.seq_length
    if isinstance(dataset, MegatronDataset):
        samples, count = dataset.num_samples, len(dataset.shuffle_idx)
        doc_idx: npt.NDArray[Any] = dataset.doc_idx
        shuffle: Iterator[npt.NDArray[Any]] = iter([dataset.shuffle_idx])
        shuffled, dtype = count, dataset.shuffle_idx.dtype
        begins = dataset.whole_sample_idx()
    else:
        if not isinstance(dataset, TokenDataset) or len(dataset.sources) != 1 or dataset.preshuffled:
            raise ValueError(
                "export: gpt-neox's index files hold the order of one file each, of samples that share a token: give "
                "data.weights, one an entry, or use another data.order than preshuffled"
            )
        source, count, order = dataset.sources[0], dataset.num_windows, dataset.order
        doc_idx = np.arange(source.first, source.last, dtype=np.int32)
        ends = np.cumsum(source.sizes, dtype=np.int64)
        shuffle, shuffled = (order(numbers) for numbers in _blocks(samples)), samples
        dtype = np.dtype(np.uint32 if count < 2**32 - 2 else np.int64)
        begins = (_begins(ends, numbers * length) for numbers in _blocks(count + 1))
    stem = f"{name}_indexmap_{samples}ns_{length}sl_{seed}s{ending}"
    paths = [Path(f"{stem}_{kind}_idx.npy") for kind in ("doc", "sample", "shuffle")]
    write_npy(paths[0], np.int32, doc_idx.shape, [doc_idx])
    write_npy(paths[1], np.int32 if 2 * (count + 1) < 2**31 else np.int64, (count + 1, 2), begins)
    write_npy(paths[2], dtype, (shuffled,), shuffle)
    return paths


def _blocks(count: int) -> Iterator[npt.NDArray[np.int64]]:
    return (np.arange(first, min(first + BLOCK, count)) for first in range(0, count, BLOCK))


def _begins(ends: npt.NDArray[np.int64], tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Document and offset of each of these tokens; documents end before tokens `ends`."""
    documents = np.searchsorted(ends, tokens, side="right")
    before = np.where(documents, ends[documents - 1], 0)
    return np.stack((documents, tokens - before), axis=1)

"""Datasets of a run from its config: the samples and their order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neox.config import Config, DataConfig
from neox.data.blend import BlendedDataset, shares
from neox.data.manifest import Manifest
from neox.data.split import Documents, split, whole
from neox.data.windows import Dataset, TokenDataset


@dataclass(frozen=True)
class Datasets:
    """Datasets of a run."""

    train: Dataset
    valid: TokenDataset | None
    """Held-out text as sequential windows, the same at each evaluation."""
    weights: tuple[float, ...]
    """Blend weights of the config; none where nothing is blended."""
    fingerprint: str
    """Hash of everything that the order of the training samples depends on: 16 hex digits."""
    check: Callable[[], None] = lambda: None
    """Raise ValueError once the bytes of a token file are found to have changed (`check_bytes`)."""


def check_named(config: Config) -> None:
    """Check that the config names data for everything it asks; reads no file.

    Raises ValueError.
    """
    if not config.data.train:
        raise ValueError("data.train is empty: name .bin/.idx prefixes (see `neox prepare`) or text")
    if config.eval.every and not (config.data.valid or config.data.split):
        raise ValueError(
            "data.valid is empty but eval.every is set: name held-out text, set data.split, or eval.every=0"
        )


def build_datasets(
    data: DataConfig,
    train: Sequence[str | Path],
    valid: Sequence[str | Path],
    seed: int,
    train_samples: int,
    progress: bool = False,
    began: Sequence[float] = (),
    cache: Path | None = None,
) -> Datasets:
    """Build the datasets of a run over token files.

    `train` has one prefix for each entry of data.train; the run takes `train_samples` samples.

    Where data.num_samples is none it is `train_samples`; a run that may be resumed for more steps writes it down when
    it starts. `began`: the weights that a run which has changed them began with: its order, and the dataset here,
    are of these (see `BlendedDataset.with_phases`). `cache`: a folder for the megatron order's arrays, unless the
    config names one. `progress` says on stderr what takes seconds.
    Raises ValueError (the key or file, what to do) where a file has too few tokens or documents for what is asked,
    and where the megatron order was made for fewer samples than the run takes; FileNotFoundError for a missing file.
    """
    if data.fractions:
        assert data.split is not None
        sources, held_out = split(train, data.split, data.fractions)
    else:
        sources, held_out = whole(train), whole(valid)
    num_samples = data.num_samples or train_samples
    weights = data.weights
    if data.weigh != "given":
        from neox.data.weights import blend_weights

        weights = blend_weights(data, sources)
    first = tuple(began) if weights else ()
    first = first or weights
    dataset: Dataset
    if data.order == "megatron":
        cache = Path(data.cache) if data.cache else cache
        dataset = _megatron(data, sources, seed, num_samples, train_samples, progress, first, cache)
    elif first:
        # Files of equal size must not be permuted alike: hence a seed each.
        seeds = [(seed + number) % 2**63 for number in range(len(sources))]
        datasets = [
            TokenDataset([source], data.seq_length, own, segments=data.segments)
            for source, own in zip(sources, seeds, strict=True)
        ]
        dataset = BlendedDataset(datasets, [(0, first)], progress=progress)
    else:
        dataset = TokenDataset(sources, data.seq_length, seed, data.order, data.segments)
    return Datasets(
        dataset,
        TokenDataset(held_out, data.seq_length, seed, "sequential", data.segments) if held_out else None,
        weights,
        _fingerprint(data, sources, seed, num_samples, first),
    )


def _megatron(
    data: DataConfig,
    sources: list[Documents],
    seed: int,
    num_samples: int,
    train_samples: int,
    progress: bool,
    weights: tuple[float, ...],
    cache: Path | None,
) -> Dataset:
    """Build the dataset of gpt-neox's order.

    A single unweighted file follows gpt-neox's `data_path`; otherwise its `train_data_paths`: weight 1.0 each, 0.5 %
    extra samples.
    """
    from neox.data.megatron import MegatronDataset

    if not sources:
        raise ValueError("no token files given: set data.train to at least one prefix")
    if len(sources) == 1 and not weights:
        single = MegatronDataset(sources[0], data.seq_length, seed, num_samples, data.segments, progress, cache)
        _check_enough(num_samples, train_samples, len(single) + 1)
        return single
    weights = weights or (1.0,) * len(sources)
    datasets = [
        MegatronDataset(source, data.seq_length, seed, share, data.segments, progress, cache)
        for source, share in zip(sources, shares(weights, num_samples), strict=True)
    ]
    # gpt-neox wraps at the sum of lengths, each one short; 1 is where it would divide by zero.
    size = max(1, sum(map(len, datasets)))
    _check_enough(num_samples, train_samples, size)
    return BlendedDataset(datasets, [(0, weights)], size, progress)


def _check_enough(num_samples: int, train_samples: int, available: int) -> None:
    if train_samples > max(num_samples, available):
        raise ValueError(
            f"data.num_samples = {num_samples} gives {available} samples; train.steps * train.global_batch_size takes "
            f"{train_samples}: raise data.num_samples, which is another order and needs a new run, or lower train.steps"
        )


def _fingerprint(
    data: DataConfig, sources: list[Documents], seed: int, num_samples: int, weights: tuple[float, ...]
) -> str:
    """Hash of everything that the order of the training samples depends on.

    Paths play no role: files may move.
    """
    order: dict[str, Any] = {
        "order": data.order,
        "num_samples": num_samples if data.order == "megatron" else None,
        "seed": seed,
        "seq_length": data.seq_length,
        "weights": weights,
        "files": [
            [source.first, source.last, len(source.file), len(source.file.tokens), _text_identity(source.file.bin)]
            for source in sources
        ],
    }
    return hashlib.sha256(json.dumps(order, sort_keys=True).encode()).hexdigest()[:16]


def _text_identity(bin_file: Path) -> list[Any]:
    """Identity of a token file's tokenizer and text, from its manifest.

    Empty where another program wrote the pair.
    """
    manifest = Manifest.read_sound(bin_file)
    if manifest is None:
        return []
    return [manifest.tokenizer_sha256, manifest.append_eod, manifest.special_in_text, manifest.bytes]

"""The datasets of a run from its config: which samples exist and in what order, decided in one place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
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
    """What a run reads."""

    train: Dataset
    valid: TokenDataset | None
    """Held-out text as sequential windows, the same at each evaluation."""
    weights: tuple[float, ...]
    """Those that the config asks for; none where nothing is blended."""
    fingerprint: str
    """Equal where the order of the training samples is, for all that it depends on: 16 hex digits."""


def check_named(config: Config) -> None:
    """Raises ValueError where the config names no data for what it asks; looks at no file."""
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
    """The datasets of a run over token files, `train` one an entry of data.train, that takes `train_samples` samples.

    Where data.num_samples is none it is `train_samples`; a run that may be resumed for more steps writes it down when
    it starts. `began`: the weights that a run which has changed them began with: its order, and the dataset here,
    are of these (see `BlendedDataset.with_phases`). `cache`: a folder for the megatron order's arrays, unless the
    config names one. `progress` says on stderr what takes seconds.
    Raises ValueError (the key or file, what to do) where a file has too few tokens or documents for what is asked,
    and where the megatron order was made for fewer samples than the run takes; FileNotFoundError for a missing file.
    """
    if data.fractions:
        assert data.split is not None
        parts, held_out = split(train, data.split, data.fractions)
    else:
        parts, held_out = whole(train), whole(valid)
    num_samples = data.num_samples or train_samples
    weights = data.weights
    if data.weigh != "given":
        from neox.data.weights import blend_weights

        weights = blend_weights(data, parts)
    first = tuple(began) if weights else ()
    first = first or weights
    dataset: Dataset
    if data.order == "megatron":
        cache = Path(data.cache) if data.cache else cache
        dataset = _megatron(data, parts, seed, num_samples, train_samples, progress, first, cache)
    elif first:
        # Files of equal size must not be permuted alike: hence a seed each.
        seeds = [(seed + number) % 2**63 for number in range(len(parts))]
        datasets = [
            TokenDataset([part], data.seq_length, own, segments=data.segments)
            for part, own in zip(parts, seeds, strict=True)
        ]
        dataset = BlendedDataset(datasets, [(0, first)], progress=progress)
    else:
        dataset = TokenDataset(parts, data.seq_length, seed, data.order, data.segments)
    return Datasets(
        dataset,
        TokenDataset(held_out, data.seq_length, seed, "sequential", data.segments) if held_out else None,
        weights,
        _fingerprint(data, parts, seed, num_samples, first),
    )


def _megatron(
    data: DataConfig,
    parts: list[Documents],
    seed: int,
    num_samples: int,
    train_samples: int,
    progress: bool,
    weights: tuple[float, ...],
    cache: Path | None,
) -> Dataset:
    """One file without weights as gpt-neox's `data_path`, all else as its `train_data_paths`: 1.0 for each by default,
    and half a percent of samples more."""
    from neox.data.megatron import MegatronDataset

    if not parts:
        raise ValueError("no token files given: set data.train to at least one prefix")
    if len(parts) == 1 and not weights:
        single = MegatronDataset(parts[0], data.seq_length, seed, num_samples, data.segments, progress, cache)
        _check_enough(num_samples, train_samples, len(single) + 1)
        return single
    weights = weights or (1.0,) * len(parts)
    datasets = [
        MegatronDataset(part, data.seq_length, seed, share, data.segments, progress, cache)
        for part, share in zip(parts, shares(weights, num_samples), strict=True)
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
    data: DataConfig, parts: list[Documents], seed: int, num_samples: int, weights: tuple[float, ...]
) -> str:
    """A hash of all that the order of the training samples depends on, and of nothing else: files may move."""
    order: dict[str, Any] = {
        "order": data.order,
        "num_samples": num_samples if data.order == "megatron" else None,
        "seed": seed,
        "seq_length": data.seq_length,
        "weights": weights,
        "files": [
            [part.first, part.last, len(part.file), len(part.file.tokens), _text_identity(part.file.bin)]
            for part in parts
        ],
    }
    return hashlib.sha256(json.dumps(order, sort_keys=True).encode()).hexdigest()[:16]


def _text_identity(bin_file: Path) -> list[Any]:
    """Tokenizer and text of a token file by its manifest; empty where another program wrote the pair."""
    manifest = Manifest.read_sound(bin_file)
    if manifest is None:
        return []
    return [manifest.tokenizer_sha256, manifest.append_eod, manifest.special_in_text, manifest.bytes]

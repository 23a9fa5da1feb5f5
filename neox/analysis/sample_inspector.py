"""Samples of a run, step by step: their tokens, the documents they come from, and their text.

Steps count as in the logs: step 1 is the first, and its loss is that of the row with "step": 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from neox.checkpoint import complete_steps, read_step
from neox.config import Config, load_config
from neox.corpus.for_training import named_files
from neox.data import Datasets, Loader, build_datasets
from neox.data.loader import batch_sizes
from neox.data.provenance import Origin, Provenance
from neox.data.token_file import beside, pair
from neox.data.windows import Dataset, DocumentSpan
from neox.tokenizer import Tokenizer
from neox.train.state import frozen_samples, initial_weights, with_blend_schedule


@dataclass(frozen=True)
class Passage:
    """Decoded part of one document in a row."""

    span: DocumentSpan
    file: str
    origin: Origin
    text: str

    @property
    def name(self) -> str:
        """Name of the document, as `SampleInspector.document` takes it."""
        return f"{self.file}:{self.span.document}"


@dataclass(frozen=True)
class Row:
    """Row of a step's batch."""

    row: int
    sample: int
    tokens: npt.NDArray[np.int64]  # [seq_length + 1]
    passages: list[Passage]


class SampleInspector:
    """Access to the samples of a run by step, row and document."""

    def __init__(self, config: Config, loader: Loader, tokenizer: Tokenizer | None, last: int) -> None:
        """`last`: the newest step of the run, or the last step of a run that does not exist yet."""
        self.config, self.loader, self.tokenizer, self.last = config, loader, tokenizer, last

    @classmethod
    def of_run(cls, run: Path, tokenizer: str | None = None) -> SampleInspector:
        """Inspect a run directory, with the data order that its newest checkpoint records.

        Raises ValueError where the directory holds no run, and where its token files have changed since.
        """
        steps, state = complete_steps(run), dict[str, Any]()
        for folder in reversed(steps):
            with suppress(ValueError, OSError):
                state = read_step(folder)[1]
                break
        configs = [folder / "config.toml" for folder in (run, *steps[-1:])]
        if not any(file.is_file() for file in configs):
            raise ValueError(f"{run}: holds no run (no config.toml)")
        config = load_config(files=[next(file for file in configs if file.is_file())])
        order = run / "order"
        datasets = _datasets(config, run, initial_weights(steps), order if order.is_dir() else None)
        if state.get("order", "") not in ("", datasets.fingerprint):
            raise ValueError(f"{run}: its token files are not those that it was trained on: put them back")
        dataset = with_blend_schedule(datasets.train, state.get("blend", []), datasets.weights, state.get("samples", 0))
        sizes = batch_sizes(config.train, state.get("batch_sizes", ()), state.get("step", 0))
        loader = Loader(dataset, sizes, map(tuple, state.get("stepped_over", [])))
        if tokenizer is None and (run / "tokenizer.json").exists():
            tokenizer = str(run / "tokenizer.json")
        return cls(config, loader, _tokenizer(config, tokenizer), state.get("step", 0) or config.train.steps)

    @classmethod
    def of_config(cls, config: Config, tokenizer: str | None = None) -> SampleInspector:
        """Inspect the samples that a run of this config would read from the token files of data.train.

        Raises ValueError where the config names no token files.
        """
        loader = Loader(_datasets(config, Path(), (), None).train, batch_sizes(config.train))
        return cls(config, loader, _tokenizer(config, tokenizer), config.train.steps)

    @property
    def dataset(self) -> Dataset:
        """Training data in the order of the run."""
        return self.loader.dataset

    @cached_property
    def sources(self) -> list[Provenance]:
        """Provenance of the documents of each token file."""
        return [Provenance.of(part.file) for part in self.dataset.sources]

    def samples_before(self, step: int) -> int:
        """Number of samples that steps 1 to `step` read."""
        return self.loader.position(step) if step else 0

    def rows(self, step: int, only: Sequence[int] | None = None) -> Iterator[Row]:
        """Yield the rows of a step, or `only` those of these numbers. Raises ValueError for a wrong step or row."""
        if step < 1:
            raise ValueError(f"step={step}: steps count from 1")
        numbers = self.loader.samples(step - 1)
        for row in range(len(numbers)) if only is None else only:
            if not 0 <= row < len(numbers):
                raise ValueError(f"row={row}: rows of a step are 0 to {len(numbers) - 1}")
            tokens, spans = self.dataset.sample([numbers[row]])[0], self.dataset.trace([numbers[row]])[0]
            yield Row(row, int(numbers[row]), tokens, [self.passage(span) for span in spans])

    def passage(self, span: DocumentSpan) -> Passage:
        """Decode a document span and look up its provenance."""
        part = self.dataset.sources[span.source]
        tokens = part.file.document(span.document)[span.offset : span.offset + span.tokens]
        return Passage(span, part.file.bin.stem, self.sources[span.source][span.document], self.text(tokens))

    def text(self, tokens: npt.NDArray[Any]) -> str:
        """Decode tokens; without a tokenizer, list their ids."""
        if self.tokenizer is None:
            return " ".join(map(str, tokens.tolist()))
        known = self.tokenizer.vocab_size
        return self.tokenizer.decode([token for token in tokens.tolist() if token < known])

    def document(self, name: str) -> DocumentSpan:
        """Span of a whole document, by NUMBER, or FILE:NUMBER if there are several files. Raises ValueError."""
        file, _, number = name.rpartition(":")
        parts = self.dataset.sources
        matching = [n for n, part in enumerate(parts) if file in ("", part.file.bin.stem, str(part.file.bin)[:-4])]
        if not number.isdecimal() or len(matching) != 1:
            files = ", ".join(part.file.bin.stem for part in parts)
            raise ValueError(f"document={name}: must be a number, of several files FILE:NUMBER; the files: {files}")
        part = parts[matching[0]]
        if not part.first <= int(number) < part.last:
            raise ValueError(f"document={name}: {part.file.bin} has documents {part.first} to {part.last - 1} here")
        return DocumentSpan(matching[0], int(number), 0, int(part.file.sizes[int(number)]))

    def reads(self, span: DocumentSpan, until: int) -> list[tuple[int, int, int]]:
        """(step, row, epoch) of each sample of steps 1 to `until` that holds any token of `span`; epochs from 1."""
        seen = self.dataset.seen(span, self.samples_before(until))
        where = self.loader.steps(seen[:, 0])
        return [
            (step + 1, row, epoch + 1)
            for (step, row), epoch in zip(where.tolist(), seen[:, 1].tolist(), strict=True)
            if 0 <= step < until
        ]


def _datasets(config: Config, run: Path, began: Sequence[float], cache: Path | None) -> Datasets:
    if not config.data.train:
        raise ValueError("data.train is empty: name .bin/.idx prefixes, or a run's directory")
    files = []
    for kind, name, prefix in named_files(config, run):
        if kind == "train":
            if not pair(prefix)[1].exists():
                raise ValueError(f"{name}: no token file ({pair(prefix)[1]}); make it with `neox prepare`")
            files.append(prefix)
    config, samples = frozen_samples(config, complete_steps(run))
    return build_datasets(config.data, files, [], config.train.seed, samples, True, began, cache)


def _tokenizer(config: Config, given: str | None) -> Tokenizer | None:
    trained = beside(config.data.train[0], "-tokenizer.json")  # the one that `neox prepare` trained
    path = given or config.tokenizer.path or (trained if trained.exists() else None)
    return Tokenizer.from_file(path) if path else None

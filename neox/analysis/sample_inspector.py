"""What a run reads, or would read: which samples make up a step, which documents they come from, and in what words.

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

from neox.checkpoint import complete_steps
from neox.checkpoint.steps import read_step
from neox.config import Config, load_config
from neox.corpus.for_training import named_files
from neox.data import Datasets, Loader, build_datasets
from neox.data.provenance import Origin, Sources
from neox.data.windows import Dataset, Piece
from neox.tokenizer import Tokenizer
from neox.train.blend_history import began_with, blended


@dataclass(frozen=True)
class Stretch:
    """What a row holds of one document."""

    piece: Piece
    file: str
    origin: Origin
    text: str

    @property
    def name(self) -> str:
        """The document's, as `Reading.document` takes it."""
        return f"{self.file}:{self.piece.document}"


@dataclass(frozen=True)
class Row:
    """A sample of a step."""

    row: int
    sample: int
    tokens: npt.NDArray[np.int64]  # [seq_length + 1]
    stretches: list[Stretch]


class Reading:
    """The samples of a run, step by step."""

    def __init__(self, config: Config, loader: Loader, tokenizer: Tokenizer | None, last: int) -> None:
        """`last`: the step that the run has come to, or is to come to where there is no run."""
        self.config, self.loader, self.tokenizer, self.last = config, loader, tokenizer, last

    @property
    def dataset(self) -> Dataset:
        return self.loader.dataset

    @cached_property
    def sources(self) -> list[Sources]:
        """Of each part where its documents come from."""
        return [Sources.of(part.file) for part in self.dataset.parts]

    def samples_before(self, step: int) -> int:
        """The sample number up to which steps 1 to `step` read."""
        return self.loader.position(step) if step else 0

    def rows(self, step: int, wanted: Sequence[int] | None = None) -> Iterator[Row]:
        """The rows of a step, or those of these numbers. Raises ValueError for a step or row that is none."""
        if step < 1:
            raise ValueError(f"step={step}: steps count from 1")
        numbers = self.loader.samples(step - 1)
        for row in range(len(numbers)) if wanted is None else wanted:
            if not 0 <= row < len(numbers):
                raise ValueError(f"row={row}: rows of a step are 0 to {len(numbers) - 1}")
            tokens, pieces = self.dataset.sample([numbers[row]])[0], self.dataset.trace([numbers[row]])[0]
            yield Row(row, int(numbers[row]), tokens, [self.stretch(piece) for piece in pieces])

    def stretch(self, piece: Piece) -> Stretch:
        """A piece with its words and where they come from."""
        part = self.dataset.parts[piece.part]
        tokens = part.file.document(piece.document)[piece.offset : piece.offset + piece.tokens]
        return Stretch(piece, part.file.bin.stem, self.sources[piece.part][piece.document], self.text(tokens))

    def text(self, tokens: npt.NDArray[Any]) -> str:
        """Their words; their numbers where there is no tokenizer."""
        if self.tokenizer is None:
            return " ".join(map(str, tokens.tolist()))
        known = self.tokenizer.vocab_size
        return self.tokenizer.decode([token for token in tokens.tolist() if token < known])

    def document(self, name: str) -> Piece:
        """A document by its number, or as FILE:NUMBER where several files are read. Raises ValueError."""
        file, _, number = name.rpartition(":")
        parts = self.dataset.parts
        found = [n for n, part in enumerate(parts) if file in ("", part.file.bin.stem, str(part.file.bin)[:-4])]
        if not number.isdecimal() or len(found) != 1:
            files = ", ".join(part.file.bin.stem for part in parts)
            raise ValueError(f"document={name}: must be a number, of several files FILE:NUMBER; the files: {files}")
        part = parts[found[0]]
        if not part.first <= int(number) < part.last:
            raise ValueError(f"document={name}: {part.file.bin} has documents {part.first} to {part.last - 1} here")
        return Piece(found[0], int(number), 0, int(part.file.sizes[int(number)]))

    def places(self, piece: Piece, until: int) -> list[tuple[int, int, int]]:
        """(step, row, epoch) of each sample of steps 1 to `until` that holds any of the piece; epochs count from 1."""
        seen = self.dataset.seen(piece, self.samples_before(until))
        where = self.loader.steps(seen[:, 0])
        return [
            (step + 1, row, epoch + 1)
            for (step, row), epoch in zip(where.tolist(), seen[:, 1].tolist(), strict=True)
            if 0 <= step < until
        ]


def of_run(run: Path, tokenizer: str | None = None) -> Reading:
    """What the run in this directory reads, as its newest checkpoint has it.

    Raises ValueError where the directory holds no run, and where its token files have changed since.
    """
    done, state = complete_steps(run), dict[str, Any]()
    for folder in reversed(done):
        with suppress(ValueError, OSError):
            state = read_step(folder)[1]
            break
    kept = [file for file in (run / "config.toml", *(folder / "config.toml" for folder in done[-1:])) if file.is_file()]
    if not kept:
        raise ValueError(f"{run}: holds no run (no config.toml)")
    config = load_config(files=kept[:1])
    order = run / "order"
    datasets = _datasets(config, run, began_with(done), order if order.is_dir() else None)
    if state.get("order", "") not in ("", datasets.fingerprint):
        raise ValueError(f"{run}: its token files are not those that it was trained on: put them back")
    dataset = blended(datasets.train, state.get("blend", []), datasets.weights, state.get("samples", 0))
    loader = Loader(dataset, config.train.global_batch_size, map(tuple, state.get("stepped_over", [])))
    if tokenizer is None and (run / "tokenizer.json").exists():
        tokenizer = str(run / "tokenizer.json")
    return Reading(config, loader, _tokenizer(config, tokenizer), state.get("step", 0) or config.train.steps)


def of_config(config: Config, tokenizer: str | None = None) -> Reading:
    """What a run of this config would read from the token files that data.train names. Raises ValueError."""
    datasets = _datasets(config, Path(), (), None)
    return Reading(
        config,
        Loader(datasets.train, config.train.global_batch_size),
        _tokenizer(config, tokenizer),
        config.train.steps,
    )


def _datasets(config: Config, run: Path, began: Sequence[float], cache: Path | None) -> Datasets:
    if not config.data.train:
        raise ValueError("data.train is empty: name .bin/.idx prefixes, or a run's directory")
    files = []
    for kind, name, prefix in named_files(config, run):
        if kind == "train":
            if not prefix.with_suffix(".idx").exists():
                raise ValueError(f"{name}: no token file ({prefix}.idx); make it with `neox prepare`")
            files.append(prefix)
    samples = config.train.steps * config.train.global_batch_size
    return build_datasets(config.data, files, [], config.train.seed, samples, True, began, cache)


def _tokenizer(config: Config, given: str | None) -> Tokenizer | None:
    beside = Path(f"{config.data.train[0]}-tokenizer.json")  # where `neox prepare` leaves the one it trained
    path = given or config.tokenizer.path or (beside if beside.exists() else None)
    return Tokenizer.from_file(path) if path else None

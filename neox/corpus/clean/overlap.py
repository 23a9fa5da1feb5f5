"""Decontamination: text of evaluation sets in training documents, by GPT-3's rule of 13-word runs.

The rule is that of Brown et al. 2020 (arXiv 2005.14165), appendix C, which the Pile's authors also used for their
ablation: a match goes with 200 characters on each side of it, and what then lies between two cuts is a piece; pieces
stay that are longer than 200 characters, and a document that falls into more than 10 pieces goes as a whole.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from neox.config.structured import parse_json
from neox.corpus.clean.shingles import Numbers, placed, shingles, words
from neox.corpus.readers.streams import COMPRESSED, FileStream
from neox.corpus.readers.text import BYTE_ORDER_MARK
from neox.system.console import one_line
from neox.system.files import write_whole
from neox.system.optional import optional

RUN = 13  # words
MARGIN = 200  # characters on each side of a match
LEAST = 200  # a piece is longer
MOST = 10  # pieces


@dataclass(frozen=True)
class EvaluationSet:
    """Index statistics of one evaluation set."""

    name: str
    examples: int
    short: int
    """Examples of fewer than 13 words: they cannot be found."""
    runs: int
    """Runs of 13 words that no earlier set had."""


@dataclass(frozen=True)
class Overlap:
    """A range of a document whose every run of 13 words is in evaluation sets."""

    set: str
    """The set that its first run is in."""
    words: str
    """That run, as the document spells it."""
    start: int
    end: int
    """Characters of the document; the margin is not counted."""


class Overlaps:
    """Index of the word runs of evaluation sets: 10 bytes a run."""

    def __init__(self, numbers: Numbers, owners: npt.NDArray[np.uint16], sets: Sequence[EvaluationSet]) -> None:
        self._numbers, self._owners = numbers, owners
        self.sets = tuple(sets)

    @classmethod
    def of(cls, sets: Iterable[tuple[str, Iterable[str]]]) -> Overlaps:
        """Index sets, each given by a name and the texts of its examples.

        A run that several sets hold belongs to the first.
        """
        numbers, owners = np.empty(0, np.uint64), np.empty(0, np.uint16)
        known: list[EvaluationSet] = []
        for owner, (name, texts) in enumerate(sets):
            examples = short = 0
            found = [numbers[:0]]
            for text in texts:
                of_text = shingles(words(text), RUN)
                examples += 1
                short += not len(of_text)
                found.append(of_text)
            new = np.setdiff1d(np.concatenate(found), numbers)
            known.append(EvaluationSet(name, examples, short, len(new)))
            numbers = np.concatenate((numbers, new))
            owners = np.concatenate((owners, np.full(len(new), owner, np.uint16)))
        order = np.argsort(numbers)
        return cls(numbers[order], owners[order], known)

    def save(self, path: Path) -> None:
        """Write what `load` reads. Raises OSError."""
        sets = json.dumps([asdict(known) for known in self.sets])
        write_whole(path, lambda file: np.savez(file, numbers=self._numbers, owners=self._owners, sets=sets))

    @classmethod
    def load(cls, path: Path) -> Overlaps:
        with np.load(path) as saved:
            sets = [EvaluationSet(**known) for known in json.loads(str(saved["sets"]))]
            return cls(saved["numbers"], saved["owners"], sets)

    @property
    def digest(self) -> str:
        """Hash that identifies these sets."""
        return blake2b(self._numbers.tobytes() + self._owners.tobytes(), digest_size=16).hexdigest()

    def find(self, text: str) -> list[Overlap]:
        """Find the runs that `text` shares with the sets, in order.

        Runs that overlap or touch become one range.
        """
        if not len(self._numbers):
            return []
        numbers = shingles(words(text), RUN)
        places = np.searchsorted(self._numbers, numbers).clip(max=len(self._numbers) - 1)
        hits = np.flatnonzero(self._numbers[places] == numbers)
        if not len(hits):
            return []
        _, starts, ends = zip(*placed(text), strict=True)
        stretches = np.split(hits, np.flatnonzero(np.diff(hits) > RUN) + 1)
        return [
            Overlap(
                self.sets[self._owners[places[first]]].name,
                text[starts[first] : ends[first + RUN - 1]],
                starts[first],
                ends[last + RUN - 1],
            )
            for first, last in ((stretch[0], stretch[-1]) for stretch in stretches)
        ]


def cut(text: str, overlaps: Sequence[Overlap]) -> list[str]:
    """Cut the overlaps out of a document; return the text that remains, in pieces.

    The whole text where nothing overlaps; nothing where too little of it would remain.
    """
    if not overlaps:
        return [text]
    pieces, begin = [], 0
    for overlap in overlaps:
        pieces.append(text[begin : max(begin, overlap.start - MARGIN)])
        begin = max(begin, overlap.end + MARGIN)
    pieces.append(text[begin:])
    pieces = [piece for piece in pieces if piece]
    return [] if len(pieces) > MOST else [piece for piece in pieces if len(piece) > LEAST]


def evaluation_texts(name: str) -> Iterator[str]:
    """Read the examples of a name: a file's where there is one, else a task's of lm-eval.

    A file is .jsonl or .json with an example a line, or a .txt that is one example, each also .gz or .zst. An example's
    text is all strings in it, in order, with spaces between: question, choices and answer, whatever their keys.
    Raises ValueError that names the file and line, or the task, which cannot be read.
    """
    path = Path(name)
    if not path.exists():
        yield from (_text(example) for example in _task(name))
        return
    suffixes = [suffix for suffix in path.suffixes if suffix not in COMPRESSED]
    if not suffixes or suffixes[-1] not in (".jsonl", ".json", ".txt"):
        raise ValueError(f"decontaminate: {name}: must be a .jsonl, .json or .txt file, or a task of lm-eval")
    stream = FileStream(name)
    with io.BufferedReader(stream) as file:
        if suffixes[-1] == ".txt":
            yield file.read().decode("utf-8", errors="replace")
        else:
            for number, line in enumerate(file, 1):
                try:
                    content = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
                    if content.strip():
                        yield _text(parse_json(content.decode("utf-8")))
                except ValueError as error:
                    raise ValueError(f"decontaminate: {name}:{number}: not a line of JSON: {error}") from None
    if stream.damage:
        raise ValueError(f"decontaminate: {name}: {stream.damage}; fetch it or make it again")


def _task(name: str) -> Iterator[Any]:
    optional("lm_eval", f"decontaminate: {name} is no file, and a task", "eval")
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    if name not in manager.all_tasks:
        raise ValueError(f"decontaminate: {name} is neither a file nor a task of lm-eval")
    try:
        for task in manager.load(name)["tasks"].values():
            yield from task.eval_docs
    except Exception as error:  # a task fetches its data with whatever it likes, and fails as that does
        raise ValueError(
            f"decontaminate: the data of the task {name} cannot be had ({one_line(error, named=True)}); "
            "name a local .jsonl file of its examples"
        ) from None


def _text(example: Any) -> str:
    """All strings of a record, in order, with spaces between."""
    if isinstance(example, str):
        return example
    if isinstance(example, dict):
        example = list(example.values())
    if isinstance(example, list):
        return " ".join(filter(None, map(_text, example)))
    return ""

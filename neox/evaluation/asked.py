"""Note beside results of what they answer: the model, the documents of the tasks, and the options.

Results whose note says otherwise are those of another model or another task, and are made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lm_eval

from neox.system.files import write_atomic

NOTE = "asked.json"


def describe(model: str, identity: str, tasks: Iterable[Any], options: Mapping[str, Any]) -> str:
    """Describe an evaluation; `identity` is a hash of the model's weights, `tasks` are loaded ones with their data."""
    what = {"model": model, "identity": identity, "documents": digest(tasks), "lm_eval": lm_eval.__version__}
    return json.dumps(what | dict(options), default=list, sort_keys=True)


def is_answered(folder: Path, asked: str) -> bool:
    """Tell whether a folder holds the results of this evaluation."""
    note = folder / NOTE
    return note.is_file() and note.read_text() == asked and (folder / "results.json").is_file()


def write_note(folder: Path, asked: str) -> None:
    """Note what the results in a folder answer, once they are complete."""
    write_atomic(folder / NOTE, asked.encode())


def digest(tasks: Iterable[Any]) -> str:
    """Hash the configs and the documents of tasks and groups, few-shot examples included."""
    hashed = hashlib.sha256()
    for task in _flat(tasks):
        hashed.update(json.dumps(task.dump_config(), default=_name, sort_keys=True).encode())
        for documents in (task.eval_docs, _examples(task)):
            for document in documents:
                hashed.update(json.dumps(document, default=_name, sort_keys=True).encode() + b"\n")
    return hashed.hexdigest()


def _flat(tasks: Iterable[Any]) -> Iterator[Any]:
    for one in tasks:
        yield from one.get_all_tasks() if hasattr(one, "get_all_tasks") else (one,)


def _examples(task: Any) -> Iterable[Any]:
    """The documents that few-shot examples are drawn from, where there are some."""
    if task.has_training_docs():
        return task.training_docs() or ()
    return (task.validation_docs() or ()) if task.has_validation_docs() else ()


def _name(value: object) -> str:
    """A function of a task's own by its name: its address differs from process to process."""
    return str(getattr(value, "__qualname__", type(value).__name__))

"""Cache of model answers in a file, so that an evaluation resumes where it was interrupted."""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, hash_args

from neox.system.files import read_rows

Ask = Callable[..., list[Any]]
METHODS = ("loglikelihood", "loglikelihood_rolling", "generate_until")
SECONDS = 5.0  # between two fsyncs of the file


class AnswerCache:
    """Answers in a file, one JSON object a line: a hash of the model and the request, and the answer.

    Takes the place of lm-eval's cache hook, which a model gives each answer as soon as it has it. Several models and
    processes may share a file. A line cut by a crash is ignored. Raises OSError if the file cannot be written.
    """

    def __init__(self, path: Path, identity: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.identity, self.added = path, identity, 0
        # Unbuffered: a line is one write, and a failed write is not repeated when the file is closed.
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115  (__exit__ closes it)
        self._known = {row["key"]: row["answer"] for row in read_rows(path) if row.keys() >= {"key", "answer"}}
        size = self._file.seek(0, os.SEEK_END)
        if size and os.pread(self._file.fileno(), 1, size - 1) != b"\n":
            self._file.write(b"\n")
        self._synced = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._file:
            os.fsync(self._file.fileno())

    def key(self, method: str, arguments: Sequence[Any] | None) -> str | None:
        """Cache key of a request; None for a sampled answer, which differs each time, and for part of a request."""
        if arguments is None or is_sampled(method, arguments):
            return None
        return hash_args(f"{self.identity} {method}", arguments)

    def add_partial(self, method: str, arguments: Sequence[Any] | None, answer: Any) -> None:
        """Store an answer; the name is lm-eval's. A window of a rolling request comes without arguments."""
        key = self.key(method, arguments)
        if key is None or key in self._known:
            return
        self._known[key] = answer
        self.added += 1
        try:
            self._file.write(json.dumps({"key": key, "answer": answer}).encode() + b"\n")
            if time.monotonic() > self._synced + SECONDS:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()
        except OSError as error:
            reason = f"{error.strerror or error}: the answers so far are kept, the same command continues"
            raise OSError(error.errno, reason, str(self.path)) from error

    def wrap(self, method: str, ask: Ask) -> Ask:
        """Wrap `ask`, a method of a model, to be called only for requests without an answer, once for equal ones."""

        def answers(requests: list[Instance], **options: Any) -> list[Any]:
            keys = [self.key(method, request.args) for request in requests]
            missing: list[int] = []
            answered = set(self._known)
            for number, key in enumerate(keys):
                if key is None or key not in answered:
                    missing.append(number)
                    answered |= {key} if key else set()
            new = ask([requests[number] for number in missing], **options) if missing else []
            sampled = {}
            for number, answer in zip(missing, new, strict=True):
                sampled[number] = answer
                self.add_partial(method, requests[number].args, answer)
            result = [sampled[number] if key is None else self._known[key] for number, key in enumerate(keys)]
            # JSON has no tuples; lm-eval's are (log-likelihood, is_greedy).
            return [tuple(answer) if isinstance(answer, list) else answer for answer in result]

        return answers


@contextlib.contextmanager
def wrapped(model: LM, wrap: Callable[[str, Ask], Ask]) -> Iterator[None]:
    """Wrap the methods of `model` that lm-eval calls: each becomes wrap(name, method) inside."""
    before = {method: vars(model)[method] for method in METHODS if method in vars(model)}
    vars(model).update({method: wrap(method, getattr(model, method)) for method in METHODS})
    try:
        yield
    finally:
        for method in METHODS:
            delattr(model, method)
        vars(model).update(before)


@contextlib.contextmanager
def cached_answers(model: LM, answers: AnswerCache) -> Iterator[None]:
    """Answer from the cache inside, and add new answers to it."""
    hook = model.cache_hook
    model.set_cache_hook(answers)
    try:
        with wrapped(model, answers.wrap):
            yield
    finally:
        model.set_cache_hook(hook)


def is_sampled(method: str, arguments: Sequence[Any]) -> bool:
    """True if the answer is sampled, by lm-eval's reading of a task's options."""
    if method != "generate_until":
        return False
    do_sample = arguments[1].get("do_sample")
    return bool(do_sample or (do_sample is None and float(arguments[1].get("temperature", 0.0)) > 0))

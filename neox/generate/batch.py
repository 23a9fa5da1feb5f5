"""Completions of many prompts: records in input order, in a file that can be continued."""

import contextlib
import hashlib
import io
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from neox.generate.engine import Engine
from neox.generate.requests import Completion
from neox.generate.sampling import Sampling
from neox.system.console import progress_bar
from neox.system.files import sync_folder, temporary_name, try_lock, write_synced
from neox.system.fingerprint import fingerprint

Record = dict[str, Any]


def complete(
    engine: Engine, prompts: Sequence[tuple[str, str]], sampling: Sampling, n: int = 1, progress: bool = True
) -> Iterator[Record]:
    """Generate `n` records for each prompt, in order.

    Keys: index, sample, prompt, text, tokens, finish_reason, seed, and logprobs where the options ask for them.
    `prompts` are (prompt, where it stands) as `read_prompts` gives them. Record k (from 0) samples with seed + k.
    Raises ValueError naming the place of a prompt that leaves no room in the context, before anything is computed.
    """
    return _records(engine, prompts, _encoded(engine, prompts), sampling, n, 0, progress)


def _encoded(engine: Engine, prompts: Sequence[tuple[str, str]]) -> list[list[int]]:
    encoded = []
    for prompt, where in prompts:
        try:
            encoded.append(engine.encode(prompt))
        except ValueError as error:
            raise ValueError(f"{where}: {error}" if where else str(error)) from None
    return encoded


def _records(
    engine: Engine,
    prompts: Sequence[tuple[str, str]],
    encoded: list[list[int]],
    sampling: Sampling,
    n: int,
    skip: int,
    progress: bool,
) -> Iterator[Record]:
    """Records of `complete` from number `skip` on."""
    numbers = range(skip, len(prompts) * n)
    samplings = [sampling.replace(seed=sampling.seed + k) for k in numbers]
    context = engine.model.config.max_position_embeddings
    rooms = [min(sampling.max_tokens, context - len(encoded[k // n])) for k in numbers]
    waiting: dict[int, Record] = {}
    following, sampled, started = 0, 0, time.monotonic()
    with progress_bar("status", show=progress) as bar:
        # In tokens, so that the time left is known before the first prompt is through.
        task = bar.add_task(f"generate: {skip} of {len(prompts) * n}", total=sum(rooms), status="")
        for event in engine.events([encoded[k // n] for k in numbers], samplings, stream=False):
            new = event.token is not None
            sampled, advance = sampled + new, int(new)
            if event.done:
                i = event.number
                waiting[i] = _record(engine, numbers[i], n, prompts[numbers[i] // n][0], samplings[i], event.done)
                advance += rooms[i] - len(event.done.tokens)
            rate = sampled / max(time.monotonic() - started, 1e-9)
            text = f"generate: {skip + following + len(waiting)} of {len(prompts) * n}"
            bar.update(task, description=text, advance=advance, status=f"{rate:.0f} tokens/s")
            while following in waiting:
                yield waiting.pop(following)
                following += 1


def _record(engine: Engine, k: int, n: int, prompt: str, sampling: Sampling, done: Completion) -> Record:
    record: Record = {
        "index": k // n,
        "sample": k % n,
        "prompt": prompt,
        "text": done.text,
        "tokens": len(done.tokens),
        "finish_reason": done.finish_reason,
        "seed": sampling.seed,
    }

    def named(token: int, logprob: float | None) -> Record:
        text = engine.tokenizer.decode([token]) if engine.tokenizer else ""
        return {"id": token, "token": text, "logprob": logprob}

    if done.logprobs is not None:
        record["logprobs"] = [
            {**named(one.token, one.logprob), "top": [named(*other) for other in one.top]} for one in done.logprobs
        ]
    return record


def write_completions(
    engine: Engine,
    prompts: Sequence[tuple[str, str]],
    sampling: Sampling,
    out: str | Path,
    n: int = 1,
    progress: bool = True,
) -> int:
    """Write the records of `complete` to `out`, one JSON object a line; returns their number.

    Until the last one is written they are in `OUT.partial`, which the same call continues after the last whole record.
    Its first line identifies model, prompts and options. Raises ValueError where `out` exists, where the partial file
    is of another model, prompts or options, and where another process is writing it.
    """
    out = Path(out)
    refuse_existing(out)
    encoded = _encoded(engine, prompts)
    header = _header(engine, prompts, sampling, n)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_name(out)
    with _opened_alone(partial) as file:
        refuse_existing(out)  # another process may have finished it just now
        kept = _kept(file, partial, header)
        for record in _records(engine, prompts, encoded, sampling, n, kept, progress):
            _append(file, partial, record)
        temporary = temporary_name(out)
        with partial.open("rb") as source:
            source.readline()
            write_synced(temporary, lambda target: target.writelines(source), named=out)
        os.replace(temporary, out)
        partial.unlink()
        sync_folder(out.parent)
    return len(prompts) * n


def _append(file: io.FileIO, path: Path, value: Record) -> None:
    line = memoryview(_line(value))
    try:
        while line:
            line = line[file.write(line) :]
    except OSError as error:
        reason = f"{error.strerror or error}: what was written is kept, the same command continues"
        raise OSError(error.errno, reason, str(path)) from error


def _line(value: Record) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


def refuse_existing(out: str | Path) -> None:
    """Raise ValueError where `out` exists: another call wrote it."""
    if Path(out).exists():
        raise ValueError(f"{out}: exists already; move it away or give another out=")


def partial_name(out: str | Path) -> Path:
    """The unfinished file of `out`."""
    return Path(f"{out}.partial")


def _header(engine: Engine, prompts: Sequence[tuple[str, str]], sampling: Sampling, n: int) -> Record:
    """The inputs that decide the records, under the user's names for them."""
    weights = fingerprint(engine.model.state_dict())
    texts = hashlib.sha256(json.dumps([prompt for prompt, _ in prompts]).encode())
    tokenizer = engine.tokenizer.sha256 if engine.tokenizer else None
    made = {"model": weights, "tokenizer": tokenizer, "prompts": texts.hexdigest(), "n": n}
    header: Record = json.loads(json.dumps({"partial": "output of neox generate", **made, **sampling.model_dump()}))
    return header


@contextlib.contextmanager
def _opened_alone(path: Path) -> Iterator[io.FileIO]:
    """Open a file for appending, locked; ValueError where another process holds it."""
    # Unbuffered: what could not be written must not be tried again, by the handle's closing, after the error was told.
    with open(path, "ab", buffering=0) as file:
        if not try_lock(file):
            raise ValueError(f"{path}: another process is writing it: wait for it, or give another out=")
        yield file


def _kept(file: io.FileIO, path: Path, header: Record) -> int:
    """Count the whole records of a partial file, and cut off the rest; an empty file gets the header."""
    with path.open("rb") as source:
        first = source.readline()
        if not first.endswith(b"\n") and _line(header).startswith(first):
            file.truncate(0)
            _append(file, path, header)
            return 0
        found = _json(first)
        if not isinstance(found, dict) or found.get("partial") != header["partial"]:
            raise ValueError(f"{path}: is no partial output of neox generate; move it away or give another out=")
        if differing := [key for key in header if found.get(key) != header[key]]:
            raise ValueError(
                f"{path}: was begun with another {', '.join(differing)}; continue with the same, delete it, or give "
                "another out="
            )
        kept, end = 0, len(first)
        for line in source:
            if not line.endswith(b"\n") or not isinstance(_json(line), dict):
                break
            kept, end = kept + 1, end + len(line)
    file.truncate(end)
    return kept


def _json(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None

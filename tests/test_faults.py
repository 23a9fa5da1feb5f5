"""Every writer of files, killed at any write and on a disk that is full at any write.

A write is a call of fsync, replace, rename or unlink: between two of them a reader sees the same files. To add a
writer, write a function of a folder and a number (1 is the old content, 2 the new) and a reader of that number.
"""

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import neox
from neox.checkpoint import Saver, complete_steps, is_valid
from neox.config import CheckpointConfig, Config, ModelConfig
from neox.data import TokenFile, TokenWriter
from neox.model.decoder import GPTNeoX
from neox.system.files import write_atomic
from neox.tokenizer import Tokenizer, train_bpe

SHAPE = ModelConfig(vocab_size=97, hidden_size=32, num_attention_heads=2, num_hidden_layers=1)
TEXTS = {1: ["the cat sat on the mat"] * 20, 2: ["a dog lay on a log"] * 20}


def write_file(folder: Path, number: int) -> None:
    write_atomic(folder / "results.json", json.dumps(number).encode())


def read_file(folder: Path) -> int | None:
    path = folder / "results.json"
    return json.loads(path.read_text()) if path.exists() else None


def write_tokenizer(folder: Path, number: int) -> None:
    train_bpe(TEXTS[number], 290, progress=False).save(folder / "tokenizer.json")


def read_tokenizer(folder: Path) -> int | None:
    if not (folder / "tokenizer.json").exists():
        return None
    found = Tokenizer.from_file(folder / "tokenizer.json").sha256
    return [train_bpe(TEXTS[number], 290, progress=False).sha256 for number in (1, 2)].index(found) + 1


def write_pair(folder: Path, number: int) -> None:
    """The new pair has the sizes of the old one: only the order of the calls keeps the two from being mixed."""
    with TokenWriter(folder / "a", "uint16") as writer:
        writer.add_document([number, number + 2])
        writer.add_document([number + 4])
        writer.manifest = {"tokens": number}


def read_pair(folder: Path) -> int | None:
    if not (folder / "a.idx").exists():
        with pytest.raises(FileNotFoundError, match=r"a\.idx: no such token file; run prepare"):
            TokenFile(folder / "a")
        return None
    number, *rest = TokenFile(folder / "a").tokens.tolist()
    assert rest == [number + 2, number + 4]
    assert (folder / "a.json").read_text() == f'{{\n  "tokens": {number}\n}}\n'
    return number


def write_model(folder: Path, number: int) -> None:
    neox.save(GPTNeoX(SHAPE).initialize(number), folder / "model")


def read_model(folder: Path) -> int | None:
    if not (folder / "model").exists():
        return None
    weight = neox.load(folder / "model")[0].embed_in.weight
    return [torch.equal(weight, GPTNeoX(SHAPE).initialize(n).embed_in.weight) for n in (1, 2)].index(True) + 1


def write_checkpoint(folder: Path, number: int) -> None:
    state = {"step": number, "samples": number, "updates": number, "loss_scaler": {}, "order": ""}
    Saver(folder, CheckpointConfig()).save([GPTNeoX(SHAPE).initialize(number)], [], Config(model=SHAPE), state)


def read_checkpoint(folder: Path) -> int | None:
    assert all(map(is_valid, complete_steps(folder)))
    return max((int(path.name.removeprefix("step_")) for path in complete_steps(folder)), default=None)


# name: (write, read, whether a reader may find neither the old content nor the new one for a moment)
WRITERS: dict[str, tuple[Callable[[Path, int], None], Callable[[Path], int | None], bool]] = {
    "one file": (write_file, read_file, False),
    "tokenizer.json": (write_tokenizer, read_tokenizer, False),
    ".bin, .idx and manifest": (write_pair, read_pair, True),
    "Hugging Face folder": (write_model, read_model, True),
    "checkpoint": (write_checkpoint, read_checkpoint, False),
}


@contextmanager
def fault_at(call: int, calls: tuple[str, ...], fail: Callable[[], Any]) -> Iterator[list[int]]:
    """Call `fail` in place of the call-th of `calls` (functions of os) in here; yields how many there were so far."""
    plain, count = {name: getattr(os, name) for name in calls}, [0]

    def counted(name: str) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            count[0] += 1
            if count[0] == call:
                fail()
            return plain[name](*arguments, **named)

        return wrapped

    for name in calls:
        setattr(os, name, counted(name))
    try:
        yield count
    finally:
        for name in calls:
            setattr(os, name, plain[name])


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.endswith(".tmp")]


@pytest.mark.parametrize("name", WRITERS)
def test_disk_full_at_any_fsync(name: str, tmp_path: Path) -> None:
    """One line names the file; the old content or nothing is left, no half of a file; writing again succeeds."""
    write, read, gap = WRITERS[name]
    for old in (None, 1):
        for call in range(1, 60):
            folder = tmp_path / f"{old}-{call}"
            folder.mkdir()
            if old:
                write(folder, old)
            error = None
            with fault_at(call, ("fsync",), full) as count:
                try:
                    write(folder, 2)
                except OSError as caught:
                    error = caught
            if count[0] < call:
                break
            if error is None:  # the sync of a folder, which that writer does not insist on
                assert read(folder) == 2, f"call {call} failed unseen"
            else:
                assert error.errno == errno.ENOSPC
                assert "\n" not in str(error)
                assert str(folder) in str(error), f"call {call}: {error} names no file"
                assert read(folder) in (old, 2, None if gap else old), f"call {call}"
            assert not leftovers(folder), f"call {call}"
            write(folder, 2)
            assert read(folder) == 2
        assert call > 1


@pytest.mark.parametrize("name", WRITERS)
def test_killed_at_any_write(name: str, tmp_path: Path) -> None:
    """A reader finds the old content, then (for some) none, then the new; writing again clears the rest."""
    write, read, gap = WRITERS[name]
    seen = []
    for call in range(1, 80):
        folder = tmp_path / str(call)
        folder.mkdir()
        write(folder, 1)
        child = os.fork()
        if not child:
            status = 1
            try:
                with fault_at(call, ("fsync", "replace", "rename", "unlink"), lambda: os._exit(9)):
                    write(folder, 2)
                status = 0
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, 9)
        seen.append(read(folder))
        write(folder, 2)
        assert read(folder) == 2, f"call {call}"
        if name != "Hugging Face folder":  # its temporary name holds the process's number; a later process has another
            assert not leftovers(folder), f"call {call}"
        if status == 0:
            break
    assert status == 0
    assert seen == sorted(seen, key=[1, None, 2].index)
    assert set(seen) == {1, 2} | ({None} if gap else set())

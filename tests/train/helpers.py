"""Tiny runs for the tests of training: their data, their options, their processes, and what is compared of them."""

import faulthandler
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import neox
from neox import cli
from neox.data import TokenWriter

ROOT = Path(neox.__file__).parent.parent
VOCAB = 64
TINY = (
    f"model.vocab_size={VOCAB}",
    "hidden_size=32",
    "num_hidden_layers=2",
    "num_attention_heads=2",
    "seq_length=32",
    "global_batch_size=4",
    "micro_batch_size=2",
    "loss_chunk=48",
    "log.every=1",
    "device=cpu",
)
HANGS = 180  # seconds: only to end a test that would never end
TIMING = {
    "tokens_per_second",
    "mfu",
    "hfu",
    "mfu_causal",
    "memory",
    "seconds",
    "eta",
    "time",
    "spent",
    "save_stall",
    "save_seconds",
}


def token_pair(prefix: Path, tokens: int = 4000, vocab: int = VOCAB, seed: int = 5) -> Path:
    """A pair of token files of one document, drawn at random."""
    ids = np.random.default_rng(seed).integers(0, vocab, tokens)
    with TokenWriter(prefix, np.uint16) as writer:
        writer.add_document(ids)
    return prefix


# --- processes -------------------------------------------------------------------------------------------------------


def start(*arguments: str, slow_sync: float = 0.0, folder: Path | None = None) -> subprocess.Popen:
    """`python -m neox train ...`. With `slow_sync` each fsync takes that many seconds longer: a slow disk."""
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    if slow_sync:
        assert folder is not None
        folder.mkdir(exist_ok=True)
        (folder / "sitecustomize.py").write_text(
            f"import os, time\nplain = os.fsync\ndef fsync(handle):\n    time.sleep({slow_sync})\n    plain(handle)\n"
            "os.fsync = fsync\n"
        )
        environment["PYTHONPATH"] = f"{folder}{os.pathsep}{ROOT}"
    command = [sys.executable, "-m", "neox", "train", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=HANGS)
    return process.returncode, out, err


# A server that has imported all there is to import, and forks: a real process of its own in 0.1 s instead of 3 s.
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["tests.train.warm", "tests.train.helpers"])


class Forked:
    """`neox train ...` in a process of its own; `setup` runs in it first and may break what it likes."""

    def __init__(self, folder: Path, *arguments: str, setup: Callable[..., None] | None = None, **options: Any) -> None:
        folder.mkdir(exist_ok=True)
        self.files = folder / "stdout", folder / "stderr"
        self.process = _forks.Process(target=_child, args=(arguments, self.files, setup, options), daemon=True)
        self.process.start()
        self.pid = self.process.pid

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def poll(self) -> int | None:
        return self.process.exitcode

    def finish(self) -> tuple[int, str, str]:
        """Exit status (negative: the signal it died of), stdout, stderr."""
        self.process.join(HANGS)
        assert self.process.exitcode is not None, "does not end"
        return self.process.exitcode, *(file.read_text() for file in self.files)


def _child(arguments: tuple[str, ...], files: tuple[Path, Path], setup: Callable[..., None] | None, options: Any):
    torch.set_num_threads(1)
    faulthandler.register(signal.SIGUSR1)  # what is it doing?
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs tests in the background ignores it
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    if setup:
        setup(**options)
    sys.exit(cli.main(["train", *arguments]))


def wait_for(condition: Callable[[], Any], process: Any) -> None:
    """Poll until `condition()`; fails where the process ends first."""
    limit = time.monotonic() + HANGS
    while not condition():
        assert process.poll() is None, "ended before the moment that was waited for"
        if time.monotonic() > limit:
            if isinstance(process, Forked):
                process.send(signal.SIGUSR1)
                time.sleep(1)
                raise AssertionError(f"the moment never came; the process says {process.files[1].read_text()}")
            raise AssertionError("the moment never came")
        time.sleep(0.001)


def path_of(handle: int) -> str:
    """The file behind a file descriptor."""
    if os.path.isdir("/proc/self/fd"):
        return os.readlink(f"/proc/self/fd/{handle}")
    import fcntl

    return fcntl.fcntl(handle, fcntl.F_GETPATH, bytes(1024)).rstrip(b"\0").decode()  # macOS


# --- what a run left -------------------------------------------------------------------------------------------------


def rows(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock. Every line must be whole."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMING} for row in lines]


def incomplete(run: Path) -> list[Path]:
    return [folder for folder in run.glob("step_*") if not (folder / ".metadata").exists()]


def complete(run: Path) -> list[Path]:
    return sorted(path.parent for path in run.glob("step_*/.metadata"))


def tensors(step: Path, scratch: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, read by torch's own converter."""
    dcp_to_torch_save(step, scratch / "tensors.pt")
    return torch.load(scratch / "tensors.pt", weights_only=True)


def assert_same_run(run: Path, reference: Path, scratch: Path) -> None:
    """All rows, and weights and optimizer state of the last step, are equal bit for bit."""
    assert rows(run) == rows(reference)
    last = complete(run)[-1]
    assert last.name == complete(reference)[-1].name
    assert_same_step(last, complete(reference)[-1], scratch)


def assert_same_step(step: Path, reference: Path, scratch: Path) -> None:
    mine, theirs = tensors(step, scratch), tensors(reference, scratch)
    assert set(mine) == set(theirs)
    assert any(name.startswith("optim.") for name in mine)
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name


def cut_back(run: Path, copy: Path, step: int) -> Path:
    """A copy of a run as it was when checkpoint `step` was the newest; rows beyond it stay."""
    shutil.copytree(run, copy)
    for folder in copy.glob("step_*"):
        if int(folder.name.removeprefix("step_")) > step:
            shutil.rmtree(folder)
    if not step:
        (copy / ".saved").unlink(missing_ok=True)
    return copy


def one_line(err: str, *words: str) -> str:
    """The one `neox: error:` line on stderr, which must hold the words; progress lines may come before it."""
    assert "Traceback" not in err, err
    assert err.count("neox: error: ") == 1, err
    line = err.rstrip("\n").rpartition("\n")[2]
    assert line.startswith("neox: error: "), err
    for word in words:
        assert re.search(word, line), (word, line)
    return line

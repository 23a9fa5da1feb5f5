"""Several real processes on this machine, joined by gloo, forked from a server that has imported everything."""

import faulthandler
import multiprocessing
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from neox.checkpoint import complete_steps
from neox.config import Config, load_config
from neox.train import Trainer
from tests.train.helpers import TINY, rows, tensors, token_pair

LIMIT = 180  # seconds: only to end a test that would never end

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["tests.train.warm", "tests.train.helpers"])


def together(world: int, folder: Path, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What function(*arguments) returns on each of `world` ranks, in the order of the ranks.

    `function` is a module's, and what goes in and out is pickled. Fails with the traceback of the first that fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.pt"):
        stale.unlink()
    (folder / "store").unlink(missing_ok=True)
    ranks = [
        _forks.Process(target=_rank, args=(rank, world, folder, function, arguments), daemon=True)
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(LIMIT)
    found = []
    for rank, process in enumerate(ranks):
        error = folder / f"{rank}.error"
        assert process.exitcode == 0, error.read_text() if error.exists() else f"rank {rank}: {process.exitcode}"
        found.append(torch.load(folder / f"{rank}.pt", weights_only=False))  # written by this test
    return found


def _rank(rank: int, world: int, folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        store = dist.FileStore(str(folder / "store"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        result = function(*arguments)
        dist.barrier()
        torch.save(result, folder / f"{rank}.pt")
        dist.destroy_process_group()
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
        os._exit(1)


# --- runs --------------------------------------------------------------------------------------------------------

# AdamW divides by the root of a moment that may be next to nothing: at its usual eps rounding alone moves weights.
STEADY = ("optim.eps=1e-3", "steps=3", "checkpoint.every=0", "checkpoint.early=1", "clip=0.3", "schedule.warmup=0")


def config(folder: Path, out: str, *options: str) -> Config:
    prefix = folder / "train"
    if not prefix.with_suffix(".idx").exists():
        token_pair(prefix)
    return load_config(overrides=(*TINY, *STEADY, f"data.train={prefix}", f"out={folder / out}", *options))


def fit(settings: Config, resume: bool = False) -> dict[str, torch.Tensor]:
    """Train, and return the gradients of the last step, whole, of the parts that are on this rank."""
    found = {}

    def note(trainer: Trainer, step: int) -> None:
        if not step:
            plain = trainer.forward_backward

            def noted(batches, scale, backward=True):
                loss = plain(batches, scale, backward)
                if not backward:
                    return loss
                for name, parameter in (named for part in trainer.model_parts for named in part.named_parameters()):
                    gradient = parameter.grad
                    whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
                    found[name] = whole.clone()
                return loss

            trainer.forward_backward = noted

    assert Trainer(settings, resume=resume, hooks=(note,), quiet=True).fit().finished
    return found


def compare(folder: Path, world: int, *options: str, tolerance: float = 1e-6) -> None:
    """One process and `world` of them: all rows, gradients of the last step, weights and optimizer state after it.

    `options` of the section parallel are those of the many alone.
    """
    alone = fit(config(folder, "alone", *(o for o in options if not o.startswith("parallel."))))
    found = together(world, folder / "ranks", fit, config(folder, "many", *options))
    assert {name for gradients in found for name in gradients} == alone.keys()
    for gradients in found:
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, alone[name], rtol=0, atol=tolerance, msg=name)
    one, many = rows(folder / "alone"), rows(folder / "many")
    assert len(one) == len(many) >= 3
    assert min(row["grad_norm"] for row in one if "loss" in row) > 0.3, "nothing was clipped"
    for a, b in zip(one, many, strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert b[key] == pytest.approx(value, abs=4 * tolerance if "norm" in key else tolerance), key
    first, second = (tensors(complete_steps(folder / run)[-1], folder) for run in ("alone", "many"))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=tolerance, msg=name)


def cut(settings: Config, stop: int) -> Config:
    """The same run, ended early."""
    return settings.model_copy(update={"train": settings.train.model_copy(update={"steps": stop})})

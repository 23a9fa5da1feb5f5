"""Several real processes on this machine, joined by gloo, forked from a server that has imported everything."""

import faulthandler
import multiprocessing
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

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

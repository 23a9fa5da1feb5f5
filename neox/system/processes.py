"""The processes of a run: torchrun's environment, the process group, and short agreements over the CPU."""

import contextlib
import json
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple

import torch

from neox.system.device import resolve_device


class OtherProcessFailed(RuntimeError):
    """Error: another process of the run failed; it printed the reason."""


class OtherProcessLost(OtherProcessFailed):
    """Error: another process of the run was killed, or its host was lost."""


class Processes(NamedTuple):
    """Rank of this process and world size. Collective calls use the CPU, so no accelerator waits for them."""

    rank: int = 0
    world: int = 1

    def all_reduce_sum(self, value: int) -> int:
        """Sum of `value` over all processes."""
        return self._reduced(value, "SUM")

    def all_reduce_max(self, value: int) -> int:
        """Largest `value` of all processes."""
        return self._reduced(value, "MAX")

    def _reduced(self, value: int, operation: str) -> int:
        if self.world == 1:
            return value
        import torch.distributed as dist

        tensor = torch.tensor(int(value))  # a truth value would stay one
        dist.all_reduce(tensor, getattr(dist.ReduceOp, operation))
        return int(tensor)

    @contextlib.contextmanager
    def rank_zero_first(self) -> Iterator[None]:
        """Run the block on rank 0 first, then on all other ranks, which find the files that rank 0 wrote.

        Raises OtherProcessFailed on the other ranks if rank 0 failed.
        """
        if self.rank and not self.all_reduce_max(0):
            raise OtherProcessFailed("rank 0 failed")
        good = 0
        try:
            yield
            good = 1
        finally:
            if not self.rank:
                self.all_reduce_max(good)


# The watchdog (train.timeout) detects and reports a hang. A collective itself may wait for long, while rank 0 tokenizes
# the text or a block is compiled.
COLLECTIVE_TIMEOUT = timedelta(days=1)
JOIN_TIMEOUT = timedelta(minutes=10)  # between the first and the last process of an attempt


@contextlib.contextmanager
def joined_processes(device: str = "auto", doing: Callable[[], str] = lambda: "") -> Iterator[Processes]:
    """Join the processes that torchrun started into a group for the block; a single process without torchrun.

    A process group that exists already is used, and is not destroyed. Raises OtherProcessLost if a collective call
    fails because another process was lost; `doing()` describes the progress of this one, for the message.
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        yield Processes(dist.get_rank(), dist.get_world_size())
        return
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield Processes()
        return
    from torch.distributed.rendezvous import rendezvous

    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # collectives that the flight recorder keeps
    backend = "cpu:gloo,cuda:nccl" if resolve_device(device).type == "cuda" else "gloo"
    processes = Processes(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    try:
        store, *_ = next(rendezvous("env://", timeout=JOIN_TIMEOUT))
        store = dist.PrefixStore(agreed_attempt(store, *processes), store)
        dist.init_process_group(
            backend, store=store, rank=processes.rank, world_size=processes.world, timeout=COLLECTIVE_TIMEOUT
        )
        yield processes
    except BaseException as error:
        # Destroying the group below would wait for lost processes, and for those that wait for this one.
        if backend != "gloo" and dist.is_initialized():
            dist.distributed_c10d._abort_process_group()
        if not (reason := _lost(error)):
            raise
        where = f"rank {processes.rank}: another process of the run was lost{doing()}"
        raise OtherProcessLost(f"{where} ({reason})") from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def agreed_attempt(store: Any, rank: int, world: int, limit: timedelta = JOIN_TIMEOUT) -> str:
    """Agree with all ranks on a key prefix that no earlier attempt used, and return it.

    torchrun keeps one store over its restarts: a fast process would find the addresses of dead ones there. Each host
    counts restarts by itself, so that count is no common name. Each rank therefore stores a fresh name under a fixed
    key, which may still hold an old one. Rank 0 sends its own name to every name that it finds, until each rank has
    answered. Raises TimeoutError if a rank does not answer within `limit`.
    """
    mine = uuid.uuid4().hex
    if rank:
        store.set(f"neox/{rank}", mine)
        attempt = store.get(mine).decode()  # waits for it
        store.set(f"{attempt}/{rank}", "")
        return attempt
    missing = set(range(1, world))
    deadline = time.monotonic() + limit.total_seconds()
    while missing:
        for other in missing:
            if store.check([f"neox/{other}"]):
                store.set(store.get(f"neox/{other}").decode(), mine)
        time.sleep(0.02)
        missing = {other for other in missing if not store.check([f"{mine}/{other}"])}
        if time.monotonic() > deadline:
            raise TimeoutError(f"rank {min(missing)} did not join within {limit.total_seconds():.0f} s")
    return mine


def _lost(error: BaseException) -> str:
    """Return torch's words for a lost process; an empty string for any other error."""
    text = str(error)  # the text of a CheckpointException holds the errors of all ranks
    found = re.search(r"Connection (closed by peer|reset by peer|refused)[^.\n]*|Broken pipe|NCCL remote error", text)
    mine = isinstance(error, RuntimeError) or type(error).__name__ == "CheckpointException"
    if mine and not isinstance(error, OtherProcessFailed) and found:
        return found[0].strip()
    return ""


def launched() -> str:
    """Name of the torchrun job, the same over restarts; empty without torchrun."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "")


def is_launched() -> bool:
    """True if torchrun, or another launcher that sets its variables, started this process."""
    return "WORLD_SIZE" in os.environ


def is_first() -> bool:
    """True for rank 0, and for a single process."""
    return os.environ.get("RANK", "0") == "0"


def first_of_host() -> bool:
    """True for the first process that torchrun started on this host."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def flight_record() -> dict[str, Any]:
    """Last collective calls of this process from torch's flight recorder; empty if it has none."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return {}
    from torch._C import _distributed_c10d as c10d

    # The first exists in builds with NCCL, the second in versions that record gloo.
    dump = getattr(c10d, "_dump_nccl_trace_json" if torch.cuda.is_available() else "_dump_fr_trace_json", None)
    return dict(json.loads(dump())) if dump else {}

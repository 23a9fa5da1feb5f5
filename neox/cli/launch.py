"""Start of several processes on this host, as torchrun starts them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
import uuid
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from neox.config import Config, TrainConfig


PR_SET_PDEATHSIG = 1  # of prctl(2)
LAUNCHER = "NEOX_LAUNCHER"
"""Environment variable with the number of the process that started this one."""


def end_with_launcher() -> None:
    """Have this process end, with a save, when the launcher that started it is killed: nobody else would stop it."""
    launcher = os.environ.get(LAUNCHER)
    if not launcher:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(launcher):  # it died before the call
            os.kill(os.getpid(), signal.SIGTERM)
        return

    def watch() -> None:
        while os.getppid() == int(launcher):
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def processes_here(config: Config) -> int:
    """Number of processes that a run takes on this host.

    It is the product of the parallel axes; with parallel.dp_shard open (0), one per CUDA device. Raises ValueError if
    there are fewer devices than that.
    """
    import torch

    from neox.system.device import resolve_device

    named = config.parallel.processes
    if resolve_device(config.train.device).type != "cuda":
        return named
    devices = torch.cuda.device_count()
    if named > devices:
        raise ValueError(
            f"parallel: its axes make {named} processes, this host has {devices} CUDA devices: start torchrun on "
            "several hosts (docs/launching.md), or change parallel"
        )
    return named if config.parallel.dp_shard else devices // named * named


def launch(arguments: list[str], number: int, config: TrainConfig) -> int:
    """Run `neox ARGUMENTS` in `number` processes and return the exit status.

    When one dies all are started again, up to `train.restarts` times. SIGTERM and Ctrl-C are passed on once; the
    processes then have `train.grace` seconds, or until a second Ctrl-C, which is passed on too. The status is 0, that
    of the first process that failed for good, or 128 + signal.
    """
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.rendezvous import RendezvousParameters
    from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

    os.environ[LAUNCHER] = str(os.getpid())
    # Each process would take all cores. What the user has set stays.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // number)))
    name = uuid.uuid4().hex
    # The port is free: it is the system that chooses it. All processes are on this host.
    meeting = RendezvousParameters("c10d", "localhost:0", name, min_nodes=1, max_nodes=1, local_addr="localhost")
    spec = WorkerSpec(
        role="train",
        local_world_size=number,
        entrypoint=sys.executable,
        args=("-m", "neox", *arguments),
        rdzv_handler=get_rendezvous_handler(meeting),
        max_restarts=config.restarts,
        local_addr="localhost",
    )

    class Agent(LocalElasticAgent):
        def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
            while True:
                try:
                    return super()._shutdown(death_sig, timeout)
                except SignalException as again:  # a second one, while the processes act on the first
                    death_sig = again.sigval

    # The processes end themselves when their grace is over; only one that cannot is killed.
    agent = Agent(spec, DefaultLogsSpecs(), shutdown_timeout=int(config.grace) + 5)
    try:
        result = agent.run()
    except SignalException as caught:
        return 128 + int(caught.sigval)
    finally:
        spec.rdzv_handler.shutdown()
    if not result.is_failed():
        return 0
    status = min(result.failures.values(), key=lambda failure: failure.timestamp).exitcode
    return status if status > 0 else 128 - status

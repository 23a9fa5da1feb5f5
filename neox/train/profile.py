"""Profile of some steps of a run: a trace, and the operators that took longest."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from neox.config import TrainConfig

ROWS = 30
"""Operators in the table."""


class Profile:
    """Profiler of the steps that `train.profile_step` and `train.profile_count` name.

    Leaves in `folder`, for each process, trace_rankR.json.gz (for ui.perfetto.dev) and operators_rankR.txt: the
    operators by their own time, on the device where there is one. A run that ends between those steps leaves what it
    has seen.
    """

    def __init__(self, config: TrainConfig, folder: Path, device: torch.device, rank: int, quiet: bool) -> None:
        self.first, self.last = config.profile_step, config.profile_step + config.profile_count - 1
        self.folder, self.device, self.rank, self.quiet = folder, device, rank, quiet
        self.running: profile | None = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Run step `number`, counted from 1, inside."""
        if self.first and number == self.first and self.running is None:
            activities = [ProfilerActivity.CPU]
            if self.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self.running = profile(activities=activities)
            self.running.start()
        if self.running is None:
            yield
            return
        with record_function(f"step {number}"):
            yield
        if number == self.last:
            self._write()

    def _write(self) -> None:
        running, self.running = self.running, None
        assert running is not None
        running.stop()  # waits for the device
        self.folder.mkdir(exist_ok=True)
        trace = self.folder / f"trace_rank{self.rank}.json.gz"
        running.export_chrome_trace(str(trace))
        order = "self_cpu_time_total" if self.device.type == "cpu" else "self_device_time_total"
        table = running.key_averages().table(sort_by=order, row_limit=ROWS)
        (self.folder / f"operators_rank{self.rank}.txt").write_text(table)
        if not self.quiet:
            print(f"profile: {trace} (open it in ui.perfetto.dev), and operators_rank{self.rank}.txt beside it")

    def close(self) -> None:
        """Write the profile if the run ends between its steps."""
        if self.running is not None:
            self._write()

"""The data of a run: its datasets, and the microbatches of a step on this process, made one step ahead."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import torch

from neox.config import Config
from neox.data.datasets import Datasets, build_datasets
from neox.data.loader import Batch, Loader
from neox.data.windows import TokenDataset
from neox.model import IGNORED
from neox.parallel.mesh import ParallelDims
from neox.system.processes import Processes, first_of_host
from neox.train.state import initial_weights

Source = TypeVar("Source")
T = TypeVar("T")


def run_datasets(
    config: Config, run: Path, steps: Sequence[Path], samples: int, processes: Processes, quiet: bool
) -> Datasets:
    """Datasets of a run that takes `samples` samples; text is tokenized first, by rank 0.

    `steps` are the run's complete checkpoints, if it is resumed. All processes call this together.
    """
    # The one way from training to `corpus`, imported here: its modules read and clean text.
    from neox.corpus.for_training import token_files
    from neox.data.byte_check import check_bytes

    with processes.rank_zero_first():
        files = token_files(config, run, quiet)
        check = check_bytes([*files.train, *files.valid], quiet) if first_of_host() else None
    with processes.rank_zero_first():  # rank 0 writes a large order down, the others map it
        datasets = build_datasets(
            config.data,
            files.train,
            files.valid,
            config.train.seed,
            samples,
            not quiet,
            initial_weights(steps),
            run / "order",
        )
    if config.eval.every and datasets.valid:
        _check_valid_labels(config, datasets.valid)
    return replace(datasets, check=check) if check else datasets


def _check_valid_labels(config: Config, valid: TokenDataset) -> None:
    """Raise ValueError where no label of the held-out text that is evaluated counts: there is no loss to take."""
    wanted = min(config.eval.batches * config.train.global_batch_size, valid.num_windows)
    for batch in Loader(valid, wanted).microbatches(0, config.train.micro_batch_size):
        if bool((batch.labels != IGNORED).any()):  # nearly always in the first
            return
    raise ValueError(
        f"data.valid: no label counts in the first {wanted} windows (data.segments leaves out the last token of each "
        "document, and each has one token): name other text, or set eval.every=0"
    )


class Batches:
    """Cuts what a loader has for a step into this rank's microbatches."""

    def __init__(
        self, config: Config, dims: ParallelDims, device: torch.device, check: Callable[[], None] = lambda: None
    ) -> None:
        """`check` is called before each batch, to raise what was found out about the data in the meantime."""
        self.check = check
        self.size, self.vocab = config.train.micro_batch_size, config.model.vocab_size
        self.dims, self.device = dims, device

    def __call__(self, loader: Loader, step: int) -> tuple[list[Batch], int]:
        """The microbatches, on their way to the device, and how many of their tokens take part in the loss.

        Raises ValueError for a token id outside the model's vocabulary, and what `check` raises.
        """
        self.check()
        batches = list(loader.microbatches(step, self.size, self.dims.dp_rank, self.dims.dp_size))
        for batch in batches:
            for token in (int(batch.tokens.max()), int(batch.labels.max()), int(batch.tokens.min())):
                if not 0 <= token < self.vocab and token != IGNORED:
                    raise ValueError(
                        f"the data holds token {token}, model.vocab_size is {self.vocab}: raise it, or prepare the "
                        "data again"
                    )
        valid = sum(int((batch.labels != IGNORED).sum()) for batch in batches)
        return [batch.to(self.device) for batch in batches], valid


class Prefetch(Generic[Source, T]):
    """Calls `make(source, step)` one step ahead, in a thread, up to `steps` steps.

    Steps may be asked for in any order and of any source: what was made ahead for another step, or of another source
    (a rewind replaces the loader), is dropped. What `make` raises is raised where its step is asked for. As a context
    manager it leaves no thread behind.
    """

    def __init__(self, make: Callable[[Source, int], T], steps: int, device: torch.device) -> None:
        self.make, self.steps = make, steps
        self.ahead: tuple[Source, int, Future[T]] | None = None
        # Pinned memory belongs to the thread's current device, which is the first one unless it is set.
        setup = partial(torch.cuda.set_device, device) if device.type == "cuda" else None
        self.thread = ThreadPoolExecutor(1, "prefetch", initializer=setup)

    def __call__(self, source: Source, step: int) -> T:
        ahead, self.ahead = self.ahead, None
        if ahead and ahead[0] is source and ahead[1] == step:
            result = ahead[2].result()
        else:
            result = self.thread.submit(self.make, source, step).result()
        if step + 1 < self.steps:
            self.ahead = source, step + 1, self.thread.submit(self.make, source, step + 1)
        return result

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.ahead = None
        self.thread.shutdown(cancel_futures=True)

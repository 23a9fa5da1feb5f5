"""The next step's batches, made while the present step runs."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Generic, Self, TypeVar

import torch

T = TypeVar("T")


class Prefetch(Generic[T]):
    """`make(step)` for the step that is asked for; a thread then begins with the step after it, while there is one.

    Steps may be asked for in any order: what was made for another one is dropped. What `make` raises is raised where
    its step is asked for. As a context manager it leaves no thread behind.
    """

    def __init__(self, make: Callable[[int], T], steps: int, device: torch.device) -> None:
        self.make, self.steps = make, steps
        self.ahead: tuple[int, Future[T]] | None = None
        # Pinned memory belongs to the thread's current device, which is the first one unless it is set.
        setup = partial(torch.cuda.set_device, device) if device.type == "cuda" else None
        self.thread = ThreadPoolExecutor(1, "prefetch", initializer=setup)

    def __call__(self, step: int) -> T:
        ahead, self.ahead = self.ahead, None
        made = ahead[1] if ahead and ahead[0] == step else self.thread.submit(self.make, step)
        result = made.result()
        if step + 1 < self.steps:
            self.ahead = step + 1, self.thread.submit(self.make, step + 1)
        return result

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.ahead = None
        self.thread.shutdown(cancel_futures=True)

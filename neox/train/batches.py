"""A step's microbatches on this process: its share of the samples, looked at before the model sees them."""

import torch

from neox.config import Config
from neox.data import Batch, Loader
from neox.model import IGNORED
from neox.parallel import Layout


class Batches:
    """Cuts what a loader has for a step into this rank's microbatches."""

    def __init__(self, config: Config, layout: Layout, device: torch.device) -> None:
        self.size, self.vocab = config.train.micro_batch_size, config.model.vocab_size
        self.layout, self.device = layout, device

    def __call__(self, loader: Loader, step: int) -> tuple[list[Batch], int]:
        """The microbatches, on their way to the device, and how many tokens of them take part in the loss.

        Raises ValueError where they hold what is no token of the model.
        """
        batches = list(loader.microbatches(step, self.size, self.layout.dp_rank, self.layout.dp_size))
        for batch in batches:
            for token in (int(batch.tokens.max()), int(batch.labels.max()), int(batch.tokens.min())):
                if not 0 <= token < self.vocab and token != IGNORED:
                    raise ValueError(
                        f"the data holds token {token}, model.vocab_size is {self.vocab}: raise it, or prepare the "
                        "data again"
                    )
        valid = sum(int((batch.labels != IGNORED).sum()) for batch in batches)
        return [batch.to(self.device) for batch in batches], valid

"""Forward pass and loss of a part of the model, in the run's precision and with its dropout.

Shapes: B sequences, T tokens a sequence, C hidden.
"""

import hashlib
from typing import cast

import torch
from torch import Tensor

from neox.config import Config
from neox.model.decoder import GPTNeoX
from neox.parallel.loss import LossHead
from neox.system.device import resolve_dtype


class Forward:
    """Forward pass of a model part, the same with a pipeline and without."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.device = config, device
        self.dtype = resolve_dtype(config.train.dtype)

    def __call__(
        self,
        part: GPTNeoX,
        x: Tensor,
        positions: Tensor,
        sample: int | Tensor,
        segments: Tensor | None = None,
        stage: int = 0,
    ) -> Tensor:
        """Hidden states [B, T, C] of tokens [B, T], or of the hidden states of the stage before.

        `sample` is the number of the first sequence, `stage` that of the pipeline's stage.
        """
        if part.training and any(self.config.model.dropout):
            seed_dropout(self.config.train.seed, int(sample), stage)
        with self._precision():
            return cast(Tensor, part(x, positions, segments=segments, head=False))

    def loss(self, part: GPTNeoX, hidden: Tensor, labels: Tensor, scale: float) -> Tensor:
        """Sum of the tokens' losses times `scale`, by the part that has the head."""
        with self._precision():
            return cast(LossHead, part.embed_out).loss(hidden, labels, scale)

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def seed_dropout(seed: int, sample: int, stage: int = 0) -> None:
    """Seed dropout for the microbatch that begins with `sample`, in one stage of the pipeline.

    It depends on the data alone: a resumed run drops what the uninterrupted one did, and ranks drop different values.
    """
    digest = hashlib.sha256(f"{seed}:dropout:{sample}:{stage}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little"))

"""Training: the loop, the loss, optimizers and metrics."""

from neox.parallel.loss import cross_entropy
from neox.train.lr_schedule import lr_factor
from neox.train.optim import Muon, build_optimizers, clip_gradients
from neox.train.run_directory import run_config
from neox.train.trainer import Result, Trainer

__all__ = [
    "Muon",
    "Result",
    "Trainer",
    "build_optimizers",
    "clip_gradients",
    "cross_entropy",
    "lr_factor",
    "run_config",
]

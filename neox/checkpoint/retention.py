"""Schedule of checkpoints, and removal of the expired ones."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from neox.checkpoint.steps import complete_steps, step_number
from neox.config import CheckpointConfig


def _early(config: CheckpointConfig, step: int) -> bool:
    return step <= config.early and config.early > 0 and step & (step - 1) == 0  # 0 and the powers of two


def is_due(config: CheckpointConfig, step: int) -> bool:
    """Tell that the schedule saves a step. Pythia's is early = 512, every = 1000."""
    return _early(config, step) or (config.every > 0 and step > 0 and step % config.every == 0)


def expired(config: CheckpointConfig, steps: Iterable[int]) -> list[int]:
    """Saved steps that are no longer kept: never the newest `keep_last`."""
    if not config.keep_last:
        return []
    older = sorted(steps)[: -config.keep_last]
    return [s for s in older if not (_early(config, s) or (config.keep_every and s % config.keep_every == 0))]


def prune(run: Path, config: CheckpointConfig) -> None:
    """Remove the run's expired checkpoints."""
    folders = {step_number(folder): folder for folder in complete_steps(run)}
    for step in expired(config, folders):
        # Metadata first: a folder that is half removed must not read as complete.
        (folders[step] / ".metadata").unlink()
        shutil.rmtree(folders[step], ignore_errors=True)

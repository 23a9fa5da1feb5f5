"""The options, section by section: typed, with defaults, each checked in itself. `neox.config` puts them together."""

from neox.sections.around import CheckpointConfig, EvalConfig, GenerateConfig, LogConfig
from neox.sections.model import ModelConfig
from neox.sections.text import DataConfig, TokenizerConfig
from neox.sections.training import OptimConfig, ParallelConfig, ScheduleConfig, TrainConfig

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "EvalConfig",
    "GenerateConfig",
    "LogConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "ScheduleConfig",
    "TokenizerConfig",
    "TrainConfig",
]

"""Options: typed, validated, frozen; presets; no torch."""

from neox.config.config import Config, load_config
from neox.config.options import SECTIONS, ConfigError, Section
from neox.config.sections.data import DataConfig, PrepareConfig, TokenizerConfig
from neox.config.sections.model import ModelConfig
from neox.config.sections.training import (
    CheckpointConfig,
    LogConfig,
    OptimConfig,
    ParallelConfig,
    ScheduleConfig,
    TrainConfig,
)
from neox.config.sections.usage import EvalConfig, GenerateConfig, SamplingConfig

__all__ = [
    "SECTIONS",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvalConfig",
    "GenerateConfig",
    "LogConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "PrepareConfig",
    "SamplingConfig",
    "ScheduleConfig",
    "Section",
    "TokenizerConfig",
    "TrainConfig",
    "load_config",
]

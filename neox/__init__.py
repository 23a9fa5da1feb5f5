"""NeoX: train, run, evaluate and study GPT-NeoX language models.

Names are resolved on first use, so that ``import neox`` and ``neox --help`` load neither torch nor pydantic.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Config": "neox.config",
    "Engine": "neox.generate",
    "GPTNeoX": "neox.model.decoder",
    "ModelConfig": "neox.config",
    "Tokenizer": "neox.tokenizer",
    "Trainer": "neox.train",
    "evaluate": "neox.evaluation",
    "load": "neox.checkpoint",
    "preset": "neox.config.presets",
    "save": "neox.checkpoint",
}

__all__ = ["Config", "Engine", "GPTNeoX", "ModelConfig", "Tokenizer", "Trainer", "evaluate", "load", "preset", "save"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'neox' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

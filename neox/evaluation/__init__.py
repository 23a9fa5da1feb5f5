"""Evaluation by lm-evaluation-harness: NeoX provides the model backend, lm-eval all else."""

try:
    import lm_eval  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "lm_eval":
        raise
    raise ValueError("evaluation needs the package lm-eval: pip install 'neox[eval]'") from None

from neox.evaluation.adapter import EngineLM
from neox.evaluation.evaluate import evaluate

__all__ = ["EngineLM", "evaluate"]

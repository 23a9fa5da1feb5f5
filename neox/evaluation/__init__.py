"""Evaluation by lm-evaluation-harness: NeoX provides the model backend, lm-eval all else."""

from neox.system.optional import optional

optional("lm_eval", "evaluation", "eval")  # before the modules that import it at their top

from neox.evaluation.adapter import EngineLM  # noqa: E402
from neox.evaluation.evaluate import evaluate  # noqa: E402

__all__ = ["EngineLM", "evaluate"]

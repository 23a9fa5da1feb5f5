"""`neox quickstart`: from the text that an install brings to a trained model, with no network.

Parts, each usable alone: run (all of it), corpus (the text), baselines (what compressors make of it), machine (what
this computer can train and run), curve (the loss as a picture), flipbook (a page on which one watches the model learn).
"""

from typing import Any

__all__ = ["quickstart"]


def __getattr__(name: str) -> Any:
    """`quickstart` on first use: the parts need neither torch nor the trainer."""
    if name == "quickstart":
        from neox.quickstart.run import quickstart

        return quickstart
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

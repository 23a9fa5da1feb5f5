"""Train a small GPT-NeoX in minutes, offline: measure, train, score, draw.

neox quickstart [key=value ...]

The text is the source and documentation of the installed packages. The verb writes runs/quickstart
(out= for another folder): the run, hf/ (the model for Hugging Face), loss.png and flipbook.html.
Interrupted and called again, it continues.

Examples:
  neox quickstart
  neox quickstart out=runs/tiny train.steps=50
"""

from __future__ import annotations

from neox.cli.verb import UsageError

OPTIONS = ("log.out", "train.steps", "model.hidden_size", "model.num_hidden_layers")


def run(targets: list[str], options: list[str]) -> int:
    """Run the verb."""
    if targets:
        raise UsageError("quickstart takes key=value options only")
    from neox.quickstart import quickstart

    result = quickstart(["log.out=runs/quickstart", *options])
    return 128 + result.signal if result.signal else 0

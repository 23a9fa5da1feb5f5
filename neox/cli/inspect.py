"""Look into runs, their data, tokenizers and parametrizations.

neox inspect TOPIC ... [key=value ...]

Topics (`neox inspect TOPIC --help` says more):
  run         curves of one or more runs, and their differing options, as a page or a picture
  tokenizer   tokens that a tokenizer makes of a text, beside others
  data        documents of a step, a string in the training data, the steps of a document
  coordinates coordinate check of muP: sizes of activations against the width

Examples:
  neox inspect run runs/first
  neox inspect run runs/a runs/b out=report.png
"""

from __future__ import annotations

from importlib import import_module

from neox.cli.verb import UsageError

TOPICS = ("run", "tokenizer", "data", "coordinates")
OPTIONS = ()


def run(targets: list[str], options: list[str]) -> int | None:
    """Run the verb."""
    if not targets or targets[0] not in TOPICS:
        raise UsageError(f"inspect needs a topic first: {', '.join(TOPICS)}")
    status: int | None = import_module(f"neox.cli.inspect_{targets[0]}").run(targets[1:], options)
    return status

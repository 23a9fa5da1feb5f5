"""Measure decoding on this CPU with weights of fewer and fewer bits.

neox bench MODEL [weights=torch,fp16,int8,int4]

MODEL is what `neox generate` takes. For each kind of weights: the bytes that a token reads,
tokens/s of a prompt of 128 and of decoding one sequence, and the share of the machine's read speed
that this uses; then the kind that weights=auto takes, and why. The model is loaded once for each.

Examples:
  neox bench runs/quickstart/hf
  neox bench EleutherAI/pythia-1.4b weights=int8,int4
"""

from __future__ import annotations

from neox.cli.verb import one_model, read_all
from neox.config import Section
from neox.config.sections import Names


class BenchOptions(Section):
    """Options of `neox bench`."""

    weights: Names = ()
    """Kinds of weights to measure: a,b; by default all that run on a CPU."""


OPTIONS = BenchOptions


def run(targets: list[str], options: list[str]) -> None:
    """Run the verb."""
    weights, model = read_all("bench", BenchOptions, options).weights, one_model("bench", targets)
    from neox.generate.benchmark import report
    from neox.quantization.kinds import KINDS

    print(report(model, weights or ("torch", *KINDS)))

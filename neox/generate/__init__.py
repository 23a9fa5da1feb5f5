"""Generation and scoring: sampling, the naive loop, the cached engine."""

from neox.generate.engine import Completion, Engine
from neox.generate.naive import naive_generate
from neox.generate.sampling import Sampler, Sampling, distribution
from neox.generate.score import bits_per_byte, token_logprobs

__all__ = [
    "Completion",
    "Engine",
    "Sampler",
    "Sampling",
    "bits_per_byte",
    "distribution",
    "naive_generate",
    "token_logprobs",
]

"""Generation and scoring: the engine, sampling, files of prompts, the terminal."""

from neox.generate.engine import Engine
from neox.generate.naive import naive_generate
from neox.generate.requests import Completion, Event, Score, TokenLogprob
from neox.generate.sampling import Sampler, Sampling, distribution
from neox.generate.score import bits_per_byte, token_logprobs
from neox.generate.speculate import DraftModel, prompt_lookup
from neox.generate.text_stream import TextStream

__all__ = [
    "Completion",
    "DraftModel",
    "Engine",
    "Event",
    "Sampler",
    "Sampling",
    "Score",
    "TextStream",
    "TokenLogprob",
    "bits_per_byte",
    "distribution",
    "naive_generate",
    "prompt_lookup",
    "token_logprobs",
]

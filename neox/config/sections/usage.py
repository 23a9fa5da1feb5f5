"""Options of evaluation and of generation."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator

from neox.config.options import Section
from neox.config.sections import (
    Biases,
    Names,
    NotNegative,
    OptionalFloat,
    OptionalInt,
    OptionalStr,
    Positive,
    Strings,
    json_text,
    listed,
)


class EvalTasksConfig(Section):
    """Options of an evaluation on tasks."""

    tasks: Names = ()
    """Tasks, groups or tags of lm-evaluation-harness, or YAML files of tasks: a,b."""
    include_path: OptionalStr = None
    """Folder of YAML files with tasks of your own; none = only lm-evaluation-harness's."""
    limit: OptionalFloat = Field(default=None, gt=0)
    """Number of documents per task, from the first on; below 1 a fraction of them; none = all."""
    num_fewshot: OptionalInt = Field(default=None, ge=0)
    """Examples before each question; none = as many as the task says."""
    seed: OptionalInt = Field(default=None, ge=0, lt=2**32)
    """Seed of few-shot examples and of sampling; none = lm-evaluation-harness's own seeds."""
    log_samples: bool = False
    """Write samples_TASK.jsonl too: each document with its prompts, answers and scores."""
    batch_size: OptionalInt = Field(default=8, gt=0)
    """Requests per batch of lm-evaluation-harness's backends (hf:, lm-eval:); none = as many as fit."""

    @property
    def asked(self) -> dict[str, Any]:
        """Arguments of `evaluate`."""
        return {key: getattr(self, key) for key in EvalTasksConfig.model_fields}


class EvalConfig(EvalTasksConfig):
    """Evaluation during training: of the loss on data.valid, and of tasks."""

    every: NotNegative = 0
    """Steps between evaluations of the loss on data.valid; 0 = never."""
    batches: Positive = 10
    """Global batches per evaluation of the loss on data.valid."""
    tasks_every: NotNegative = 0
    """Steps between evaluations of eval.tasks during training; 0 = never."""


class SamplingConfig(Section):
    """Options of sampling; `neox.generate.Sampling` acts on them."""

    max_tokens: Positive = 128
    """Most new tokens per prompt; the end of the context ends the output too."""
    temperature: float = Field(default=1.0, ge=0)
    """Divisor of the logits; 0 = greedy: the most likely token."""
    top_k: NotNegative = 0
    """Sample from the k most likely tokens; 0 = from all."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the smallest set of most likely tokens with this total probability; 1 = from all."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Sample from tokens at least this fraction as likely as the most likely one; 0 = from all."""
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100)
    """Factor above 1: tokens of the prompt and of the output so far become less likely; 1 = off; 0.01 to 100."""
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    """Penalty subtracted from the logit of every token that the output already holds; -2 to 2."""
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    """Penalty subtracted from a token's logit once for each time that the output already holds it; -2 to 2."""
    logit_bias: Biases = ()
    """Table of biases added to the logits, -100 to 100, keyed by token id or by a text that is one token:
    {" the" = -100, 262 = 5}."""
    seed: int = Field(default=1234, ge=0, lt=2**63)
    """Seed of the sampling; the same seed and prompt give the same text."""
    stop: Strings = ()
    """Texts that end the output before the first of them, also while streaming. Several: ["\\n\\n", "Q:"]."""
    stop_tokens: Annotated[tuple[NotNegative, ...], BeforeValidator(listed)] = ()
    """Token ids that end the output and are left out of it: [187, 535]."""
    stop_at_eod: bool = True
    """End at the end-of-document token, which is left out; false goes on to max_tokens."""
    json_schema: Annotated[str | None, BeforeValidator(json_text)] = None
    """JSON schema that the output satisfies: a file, or the schema itself, {...}; none = any text."""
    regex: OptionalStr = None
    """Regular expression that the whole output matches; none = any text."""
    grammar: OptionalStr = None
    """File with the grammar that the output follows, in llguidance's dialect of Lark; none = any text."""
    logprobs: OptionalInt = Field(default=None, ge=0)
    """Record each token's log-probability and those of this many alternatives; none = record nothing."""
    echo: bool = False
    """Begin text and log-probabilities with the prompt's (an empty one's is the end-of-document token); the first token
    has log-probability null."""

    @field_validator("stop")
    @classmethod
    def _not_empty(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        if not all(stop):
            raise ValueError("a stop text must not be empty")
        # A shell passes '\\n' on as a backslash and an n, which no text ends with.
        breaks = {r"\n": "\n", r"\t": "\t", r"\r": "\r"}
        typed = re.compile(r"(\\[ntr])+")
        return tuple(re.sub(r"\\.", lambda m: breaks[m[0]], one) if typed.fullmatch(one) else one for one in stop)


class GenerateConfig(SamplingConfig):
    """Options of generation."""

    n: Positive = 1
    """Samples per prompt; sample k of all draws with seed + k."""
    slots: Positive = 8
    """Sequences generated at the same time; more is faster until memory or cores run out."""

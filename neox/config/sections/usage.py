"""What is kept and told of a run, and how a model is used."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator

from neox.config.options import Section
from neox.config.sections.types import (
    Biases,
    Names,
    NotNegative,
    OptionalFloat,
    OptionalInt,
    OptionalStr,
    Positive,
    Strings,
    listed,
)


class CheckpointConfig(Section):
    """What is kept of a run."""

    every: NotNegative = 1000
    """Steps between checkpoints; 0 = only at the end."""
    early: NotNegative = 0
    """Also at steps 0, 1, 2, 4, 8 .. up to this one, as Pythia does with 512; 0 = no early ones."""
    keep_last: NotNegative = 0
    """Keep the newest so many and remove older ones; 0 = keep all."""
    keep_every: NotNegative = 0
    """Of the older ones keep those of every so many steps, and the early ones; 0 = no others."""
    asynchronous: bool = False
    """Write in the background while training goes on; takes CPU memory for a copy of weights and optimizer state."""


class LogConfig(Section):
    """What a run tells, and where."""

    every: Positive = 10
    """Steps between log lines."""
    out: str = Field(default="runs/neox", min_length=1)
    """Run directory."""
    norms: bool = False
    """Each line also holds the norms of gradients, parameters and update of embedding, attention, mlp, norms, head."""
    tensorboard: bool = False
    """Write RUN/tensorboard as well."""
    wandb: OptionalStr = None
    """Weights & Biases project to report to as well; its own settings say where (WANDB_MODE=offline: to RUN/wandb)."""
    sample_every: NotNegative = 0
    """Steps between samples of what the model writes, drawn as generate.* says; 0 = never."""
    sample_prompt: str = ""
    """What each sample continues; empty = the start of a document."""
    sample_tokens: Positive = 64
    """New tokens per sample, at most."""


class EvalConfig(Section):
    """Evaluation: of the loss on data.valid during training, and of tasks by `neox eval`."""

    every: NotNegative = 0
    """Steps between evaluations on data.valid; 0 = never."""
    batches: Positive = 10
    """Global batches per evaluation on data.valid."""
    tasks: Names = ()
    """Tasks, groups or tags of lm-evaluation-harness, or YAML files of tasks: a,b."""
    tasks_every: NotNegative = 0
    """Steps between evaluations of `tasks` during training; 0 = never."""
    include_path: OptionalStr = None
    """A folder of YAML files with tasks of one's own; none = only lm-evaluation-harness's."""
    limit: OptionalFloat = Field(default=None, gt=0)
    """The first so many documents of each task, below 1 this fraction of them; none = all."""
    num_fewshot: OptionalInt = Field(default=None, ge=0)
    """Examples before each question; none = as many as the task says."""
    seed: OptionalInt = Field(default=None, ge=0)
    """Of examples and of everything else drawn; none = lm-evaluation-harness's own seeds."""
    log_samples: bool = False
    """Also write each document with its prompts, answers and scores."""
    batch_size: OptionalInt = Field(default=8, gt=0)
    """Requests that a backend of lm-evaluation-harness (hf:, lm-eval:) computes at a time; none = as many as fit."""

    @property
    def asked(self) -> dict[str, Any]:
        """What `evaluate` is called with: all but the options that say when training evaluates."""
        return self.model_dump(exclude={"every", "batches", "tasks_every"})


class GenerateConfig(Section):
    """How `neox generate` continues a prompt."""

    max_tokens: Positive = 128
    """New tokens per prompt, at most."""
    temperature: float = Field(default=1.0, ge=0)
    """Divides the logits; 0 = greedy."""
    top_k: NotNegative = 0
    """Sample from the k likeliest tokens; 0 = from all."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the likeliest tokens that hold this probability together."""
    seed: NotNegative = 1234
    """The same seed and prompt give the same text."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Sample from tokens at least this fraction as likely as the likeliest; 0 = from all."""
    repetition_penalty: float = Field(default=1.0, gt=0)
    """Above 1, tokens of the prompt and of the output so far become less likely; 1 = off."""
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    """Taken from the logits of tokens that the output holds already."""
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    """Taken from the logits of a token for each time that the output holds it already."""
    logit_bias: Biases = ()
    """Added to the logits of tokens, each by its id or by a text that is one token: {" the" = -100, 262 = 5}."""
    stop: Strings = ()
    """End before the first of these texts in the output."""
    stop_tokens: Annotated[tuple[NotNegative, ...], BeforeValidator(listed)] = ()
    """End at one of these tokens (ids), which is then left out."""
    stop_at_eod: bool = True
    """End at the end-of-document token, which is then left out; false goes on to max_tokens."""
    json_schema: OptionalStr = None
    """The output is JSON of this schema: a file, or the schema itself, {...}; none = any text."""
    regex: OptionalStr = None
    """The output as a whole matches this regular expression; none = any text."""
    grammar: OptionalStr = None
    """The output follows the grammar in this file, in llguidance's dialect of Lark; none = any text."""
    logprobs: OptionalInt = Field(default=None, ge=0)
    """Record each token's log-probability and those of this many alternatives; none = record nothing."""
    echo: bool = False
    """Text and log-probabilities begin with the prompt's; nothing comes before its first token, which has none."""
    n: Positive = 1
    """Samples per prompt; the k-th of all samples draws with seed + k."""
    slots: Positive = 8
    """Sequences that run at a time."""

    @field_validator("stop")
    @classmethod
    def _not_empty(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        if not all(stop):
            raise ValueError("a stop text must not be empty")
        return stop

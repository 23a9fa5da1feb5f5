"""How a model is trained: length, optimizer, schedule, processes."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from neox.config.options import Section
from neox.config.sections.types import Fraction, Ints, NotNegative, OptionalInt, OptionalStr, Positive, listed


class TrainConfig(Section):
    """How long, how wide and on what."""

    steps: Positive = 1000
    """Optimizer steps."""
    global_batch_size: Positive = 16
    """Sequences per step, over all ranks."""
    micro_batch_size: Positive = 4
    """Sequences per forward pass on one rank."""
    seed: NotNegative = 1234
    """Of initialisation, data order and dropout."""
    init: OptionalStr = None
    """Model that a new run starts from: Hugging Face folder, hub id, run or step folder; none = random weights."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the matrix products; parameters and optimizer state stay fp32. fp16 scales the loss, see optim.loss_scale."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto takes an accelerator where there is one."""
    float8: Literal["none", "tensorwise", "rowwise"] = "none"
    """The blocks' products in 8 bits, by torchao, scaled by tensor or by row; wants a GPU from H100 on, and compile."""
    loss_chunk: Positive = 512
    """Tokens whose logits exist at one time: the head and the loss run chunk by chunk."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again instead of keeping it: nothing dear; the MLPs; whole blocks."""
    guard: bool = True
    """Look at each step's loss and gradient norm before its update; an accelerator is waited for once a step."""
    spike_sigma: float = Field(default=0.0, ge=0)
    """Leave out the update of a step whose loss or gradient norm is so many standard deviations above the mean of the
    last updates; 0 = only where one of them is not finite. 6 is usual."""
    spike_window: Positive = 128
    """Updates that mean and standard deviation are taken over."""
    rewind_after: Positive = 10
    """Updates left out in a row after which the run goes back to its last good checkpoint, and past their data."""
    max_rewinds: NotNegative = 3
    """Times that a run may go back; then it ends with an error."""
    compile: Literal["auto", True, False] = "auto"
    """Compile each block with torch.compile: half a minute and more at the start, fewer passes over memory after. auto
    does on CUDA, without tp, cp and pp."""
    profile_step: NotNegative = 0
    """First step that is profiled, to RUN/profile: a trace, and the operators that took longest; 0 = none is."""
    profile_count: Positive = 3
    """How many steps are."""

    restarts: NotNegative = 3
    """How often the processes that `neox train` starts itself begin anew, from the newest checkpoint, when one dies."""
    grace: float = Field(default=30.0, gt=0)
    """Seconds from SIGTERM to the end of the process: what is not saved by then is given up. See docs/launching.md."""
    timeout: float = Field(default=1800.0, ge=0)
    """Seconds without a finished step after which a run leaves its stacks in RUN/hang and ends; 0 = never."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.profile_step > self.steps:
            raise ValueError(f"profile_step: {self.profile_step} is beyond the last step (steps={self.steps})")
        return self


class OptimConfig(Section):
    """The optimizer."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon updates the blocks' matrices with Muon and all else with AdamW."""
    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate."""
    betas: Annotated[tuple[Fraction, Fraction], BeforeValidator(listed)] = (0.9, 0.95)
    """Decay rates of AdamW's two moments."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of AdamW's second moment."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled; not on biases and layer norms."""
    clip: float = Field(default=1.0, ge=0)
    """Largest global gradient norm; 0 = no clipping."""
    muon_lr: float = Field(default=0.02, gt=0)
    """Peak learning rate of the matrices under Muon."""
    muon_momentum: Fraction = 0.95
    """Muon's momentum."""
    loss_scale: float = Field(default=4096.0, ge=1)
    """In fp16 the loss is multiplied by this at first; it is halved on overflow and doubled after a while without."""
    loss_scale_window: Positive = 1000
    """Steps without overflow after which the loss scale is doubled."""
    loss_scale_hysteresis: Positive = 2
    """Overflows until the loss scale is halved for the first time."""
    loss_scale_min: float = Field(default=1.0, gt=0)
    """Least loss scale: an overflow there ends the run."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.loss_scale_min > self.loss_scale:
            raise ValueError(f"loss_scale_min: {self.loss_scale_min} is above loss_scale ({self.loss_scale})")
        return self


class ScheduleConfig(Section):
    """The learning rate over the run. It counts applied updates: a step that is skipped does not move it."""

    name: Literal["cosine", "cosine_floored", "linear", "exponential", "constant", "inverse_sqrt", "wsd"] = "cosine"
    """Shape after a linear warmup; cosine_floored trained GPT-NeoX-20B and Pythia. Formulas: docs/training.md."""
    warmup: float = Field(default=0.01, ge=0)
    """Below 1: fraction of the horizon. From 1 on: number of updates."""
    decay: float = Field(default=0.2, ge=0)
    """Length of the decay that ends wsd (warmup, stable, decay), counted like warmup."""
    horizon: OptionalInt = Field(default=None, gt=0)
    """Updates over which the schedule runs; the rate stays as it is from there. none = train.steps."""
    min_lr: float = Field(default=1e-4, ge=0)
    """Least learning rate after the warmup (absolute)."""

    def warmup_updates(self, horizon: int) -> float:
        """Length of the warmup, of `horizon` updates in all."""
        return self.warmup if self.warmup >= 1 else self.warmup * horizon

    def decay_updates(self, horizon: int) -> float:
        """Length of the decay that ends wsd, of `horizon` updates in all."""
        return self.decay if self.decay >= 1 else self.decay * horizon

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.name == "inverse_sqrt" and not self.warmup:
            raise ValueError("warmup: inverse_sqrt decays by its length, set schedule.warmup above 0")
        return self


class ParallelConfig(Section):
    """How the processes that torchrun started share the work; one process needs none of it."""

    dp_replicate: Positive = 1
    """Groups of processes that hold a whole copy of the model each."""
    dp_shard: NotNegative = 0
    """Processes that share one copy; 0 = all that dp_replicate leaves."""
    zero: Literal[1, 2, 3] = 1
    """What they share: 1 the optimizer state; 2 gradients too; 3 parameters too, gathered block by block."""
    tp: Positive = 1
    """Processes that share each matrix: heads, the MLP's inner width and the vocabulary are split over them."""
    cp: Positive = 1
    """Processes that share each sequence, for long ones; they share optimizer state as dp_shard does."""
    pp: Positive = 1
    """Processes that share the blocks, one after the other."""
    sequence_parallel: bool = False
    """Between the matrices that tp splits, its processes hold a part of each sequence: less memory, the same sums."""
    schedule: Literal["1f1b", "interleaved_1f1b"] = "1f1b"
    """The order in which the pipeline's stages run microbatches forward and backward: see docs/parallel.md."""
    stages_per_rank: Positive = 2
    """Stages that each process of an interleaved pipeline holds; with 1f1b it is always 1."""
    stage_layers: Ints = ()
    """Layers of each stage, first to last; without it they are balanced by cost, embedding and head counted."""

    @property
    def stages(self) -> int:
        """Stages of the pipeline, over all of its processes."""
        return self.pp * (1 if self.schedule == "1f1b" else self.stages_per_rank)


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

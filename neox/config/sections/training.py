"""Options of training: length, optimizer, schedule, parallelism, checkpoints, logs."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from neox.config.options import Section
from neox.config.sections import Fraction, Ints, NotNegative, OptionalInt, OptionalStr, Positive, listed, pairs, project


class TrainConfig(Section):
    """Length, batch size and precision of training, and its guards."""

    steps: Positive = 1000
    """Number of optimizer steps."""
    global_batch_size: Positive = 16
    """Sequences per optimizer step, over all ranks; it may change when a run is resumed."""
    batch_warmup: Annotated[tuple[tuple[Positive, Positive], ...], BeforeValidator(pairs)] = ()
    """Smaller batches at the beginning: [[256, 1000], [512, 2000]] = 256 sequences up to step 1000, 512 up to 2000."""
    micro_batch_size: Positive = 4
    """Sequences per forward pass on one rank."""
    seed: NotNegative = 1234
    """Seed of initialization, data order and dropout."""
    init: OptionalStr = None
    """Model that a new run starts from: Hugging Face folder, hub id, run or step folder; none = random weights."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of the matrix products; parameters and optimizer state stay fp32. fp16 scales the loss, see
    optim.loss_scale."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device to train on; auto = an accelerator if there is one."""
    float8: Literal["none", "tensorwise", "rowwise"] = "none"
    """8-bit matrix products in the blocks, by torchao, scaled per tensor or per row; needs an H100 or later, and
    compile."""
    loss_chunk: Positive = 512
    """Tokens whose logits exist at one time; head and loss run chunk by chunk."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """Activations that the backward pass recomputes: none; selective = those of the MLPs; full = whole blocks."""
    guard: bool = True
    """Check each step's loss and gradient norm before its update; costs one wait for the accelerator per step."""
    spike_sigma: float = Field(default=0.0, ge=0)
    """Loss spikes: skip the update of a step whose loss or gradient norm is this many standard deviations above the
    mean of the last updates, such as 6; 0 = skip only NaN and infinity."""
    spike_window: Positive = 128
    """Loss spikes: number of last updates that mean and standard deviation are taken over; half as many are needed."""
    rewind_after: Positive = 10
    """Loss spikes: consecutive skipped updates that rewind the run to its last valid checkpoint, past their data."""
    max_rewinds: NotNegative = 3
    """Loss spikes: number of rewinds before the run ends with an error; 0 = it ends instead of the first."""
    compile: Literal["auto", True, False] = "auto"
    """Compile each block with torch.compile: slow to start, fewer passes over memory afterwards; auto = on CUDA without
    tp, cp and pp."""
    profile_step: NotNegative = 0
    """First step to profile; trace and slowest operators go to RUN/profile; 0 = no profile."""
    profile_count: Positive = 3
    """Number of steps to profile, from profile_step on."""

    restarts: NotNegative = 3
    """Restarts from the newest checkpoint when one of the processes that `neox train` started dies."""
    grace: float = Field(default=30.0, gt=0)
    """Seconds from SIGTERM to the end of the process, saved or not; see docs/launching.md."""
    timeout: float = Field(default=1800.0, ge=0)
    """Watchdog: seconds without a finished step after which a run writes its stacks to RUN/hang and ends; 0 = off."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.profile_step > self.steps:
            raise ValueError(f"profile_step: {self.profile_step} is beyond the last step (steps={self.steps})")
        return self


class OptimConfig(Section):
    """The optimizer."""

    name: Literal["adamw", "muon"] = "adamw"
    """Optimizer: adamw, or muon for the blocks' matrices with AdamW for the rest."""
    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate."""
    betas: Annotated[tuple[Fraction, Fraction], BeforeValidator(listed)] = (0.9, 0.95)
    """Decay rates of AdamW's two moments."""
    eps: float = Field(default=1e-8, gt=0)
    """Term added to the root of AdamW's second moment."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay; biases and layer norms have none."""
    clip: float = Field(default=1.0, ge=0)
    """Largest global gradient norm; larger gradients are scaled down to it; 0 = no clipping."""
    muon_lr: float = Field(default=0.02, gt=0)
    """Peak learning rate of the matrices that Muon updates."""
    muon_momentum: Fraction = 0.95
    """Momentum of Muon."""
    loss_scale: float = Field(default=4096.0, ge=1)
    """Initial loss scale in fp16; it is halved on overflow and doubled after loss_scale_window steps without one."""
    loss_scale_window: Positive = 1000
    """Steps without overflow after which the fp16 loss scale is doubled."""
    loss_scale_hysteresis: Positive = 2
    """Overflows before the fp16 loss scale is halved for the first time."""
    loss_scale_min: float = Field(default=1.0, gt=0)
    """Smallest fp16 loss scale; an overflow there ends the run."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.loss_scale_min > self.loss_scale:
            raise ValueError(f"loss_scale_min: {self.loss_scale_min} is above loss_scale ({self.loss_scale})")
        return self


class ScheduleConfig(Section):
    """Learning rate over applied updates; a skipped update does not move it."""

    name: Literal["cosine", "cosine_floored", "linear", "exponential", "constant", "inverse_sqrt", "wsd"] = "cosine"
    """Shape of the learning rate after a linear warmup; cosine_floored trained GPT-NeoX-20B and Pythia. Formulas:
    docs/training.md."""
    warmup: float = Field(default=0.01, ge=0)
    """Length of the linear warmup: below 1 a fraction of the horizon, from 1 on a number of updates."""
    decay: float = Field(default=0.2, ge=0)
    """Length of the decay that ends wsd (warmup, stable, decay): below 1 a fraction of the horizon, else updates."""
    horizon: OptionalInt = Field(default=None, gt=0)
    """Number of updates over which the schedule runs; the rate then stays as it is; none = train.steps."""
    min_lr: float = Field(default=1e-4, ge=0)
    """Smallest learning rate after the warmup, absolute."""

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
    """Axes of parallelism over the processes of the run."""

    dp_replicate: Positive = 1
    """Data parallelism: groups of processes that hold a whole copy of the model each."""
    dp_shard: NotNegative = 0
    """Data parallelism: processes that share one copy of the model; 0 = all that the other axes leave."""
    zero: Literal[1, 2, 3] = 1
    """ZeRO stage that dp_shard shards by: 1 optimizer state; 2 gradients too; 3 parameters too, gathered block by
    block."""
    tp: Positive = 1
    """Tensor parallelism: processes that share each matrix (heads, the MLP's inner width, the vocabulary)."""
    cp: Positive = 1
    """Context parallelism: processes that share each sequence; they shard optimizer state as dp_shard does."""
    pp: Positive = 1
    """Pipeline parallelism: processes that share the blocks, one stage after another."""
    sequence_parallel: bool = False
    """Split sequences over the processes of tp between its matrices: less memory, the same sums."""
    schedule: Literal["1f1b", "interleaved_1f1b"] = "1f1b"
    """Order in which pipeline stages run microbatches forward and backward; see docs/parallel.md."""
    stages_per_rank: Positive = 2
    """Stages per process of an interleaved pipeline; 1f1b always has 1."""
    stage_layers: Ints = ()
    """Layers of each pipeline stage, first to last; empty = balanced by cost, embedding and head included."""

    @property
    def shards(self) -> int:
        """Value of dp_shard; 1 where it is open."""
        return self.dp_shard or 1

    @property
    def processes(self) -> int:
        """World size: product of the axes; the smallest if dp_shard is open."""
        return self.pp * self.dp_replicate * self.shards * self.cp * self.tp

    @property
    def stages(self) -> int:
        """Stages of the pipeline, over all of its processes."""
        return self.pp * (1 if self.schedule == "1f1b" else self.stages_per_rank)


class CheckpointConfig(Section):
    """Checkpoints of a run."""

    every: NotNegative = 1000
    """Steps between checkpoints; 0 = only at the end."""
    early: NotNegative = 0
    """Last step of the early checkpoints at 0, 1, 2, 4, 8 ..; Pythia has 512; 0 = no early checkpoints."""
    keep_last: NotNegative = 0
    """Number of newest checkpoints to keep; older ones are removed; 0 = keep all."""
    keep_every: NotNegative = 0
    """Interval in steps of older checkpoints that keep_last leaves, with the early ones; 0 = leave none."""
    asynchronous: bool = False
    """Write checkpoints in the background; takes CPU memory for a copy of weights and optimizer state."""


class LogConfig(Section):
    """Logs of a run."""

    every: Positive = 10
    """Steps between log lines."""
    out: str = Field(default="runs/neox", min_length=1)
    """Run directory."""
    norms: bool = False
    """Log the norms of gradients, parameters and update of embedding, attention, mlp, norms and head."""
    tensorboard: bool = False
    """Log to RUN/tensorboard as well."""
    wandb: Annotated[str | None, BeforeValidator(project)] = None
    """Weights & Biases project to log to; its own settings say where (WANDB_MODE=offline: to RUN/wandb)."""
    sample_every: NotNegative = 0
    """Steps between samples of generated text, drawn with temperature, top_k, top_p and seed of generate; 0 = never."""
    sample_prompt: str = ""
    """Prompt of the samples that log.sample_every writes; empty = the start of a document."""
    sample_tokens: Positive = 64
    """Most new tokens per sample that log.sample_every writes."""

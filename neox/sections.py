"""The options, section by section: typed, with defaults, each checked in itself. `neox.config` puts them together."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from neox.options import Section


# TOML has no null, and a resolved file must still be able to undo what a preset sets: hence the word.
def _none(value: Any) -> Any:
    return None if value == "none" else value


def _listed(value: Any) -> Any:
    """TOML and JSON have lists where a frozen section holds tuples; one string is a list of one."""
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


def _pairs(value: Any) -> Any:
    """A table as the pairs that it holds, for a section can be hashed; `to_toml` makes lists of two of them."""
    pairs = list(value.items()) if isinstance(value, dict) else value
    if not isinstance(pairs, list | tuple):
        raise ValueError('must be a table such as {" the" = -100, 262 = 5}')
    return tuple(_listed(pair) for pair in pairs)


OptionalInt = Annotated[int | None, BeforeValidator(_none)]
OptionalFloat = Annotated[float | None, BeforeValidator(_none)]
OptionalStr = Annotated[str | None, BeforeValidator(_none)]
Strings = Annotated[tuple[str, ...], BeforeValidator(_listed)]
Ints = Annotated[tuple[int, ...], BeforeValidator(_listed)]
Weights = Annotated[tuple[Annotated[float, Field(gt=0)], ...], BeforeValidator(_listed)]
Biases = Annotated[tuple[tuple[str, Annotated[float, Field(ge=-100, le=100)]], ...], BeforeValidator(_pairs)]
Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class ModelConfig(Section):
    """The decoder's shape, in the names of Hugging Face's GPTNeoX config, plus flags for GPT-J and GPT-Neo."""

    model_type: Literal["gpt_neox", "gptj", "gpt_neo"] = "gpt_neox"
    """Family whose names and file layout a Hugging Face export uses."""
    vocab_size: Positive = 8192
    """Rows of the embedding and of the head, padding rows included."""
    hidden_size: Positive = 256
    """Width of the residual stream."""
    num_hidden_layers: Positive = 4
    """Number of blocks."""
    num_attention_heads: Positive = 4
    """Heads per block; they split hidden_size evenly."""
    intermediate_size: OptionalInt = Field(default=None, gt=0)
    """Width inside the MLP; none = 4 * hidden_size."""
    hidden_act: Literal["gelu", "gelu_fast", "gelu_new", "gelu_pytorch_tanh"] = "gelu"
    """gelu is exact (erf); the other three are names of one tanh approximation."""
    max_position_embeddings: Positive = 2048
    """Longest context, in tokens."""
    rotary_pct: float = Field(default=0.25, ge=0, le=1)
    """Fraction of each head's dims that is rotated."""
    rotary_emb_base: float = Field(default=10000.0, gt=0)
    """Base of the geometric sequence of rotary frequencies."""
    layer_norm_eps: float = Field(default=1e-5, gt=0)
    """Added to the variance in every layer norm."""
    use_parallel_residual: bool = True
    """x + attention(ln1(x)) + mlp(ln2(x)) if true, else one after the other."""
    tie_word_embeddings: bool = False
    """The head uses the embedding's weight."""
    init_method: Literal["small_init", "normal"] = "small_init"
    """small_init: std sqrt(2/(5h)), residual outputs 2/(L sqrt(h)). normal: initializer_range, residual outputs
    scaled by 1/sqrt(2L)."""
    initializer_range: float = Field(default=0.02, gt=0)
    """Standard deviation that init_method = "normal" draws with."""
    mup_base_width: OptionalInt = Field(default=None, gt=0)
    """muP: weights and AdamW's rates are those of a model so wide (of this one's head_dim, depth and MLP ratio) and
    follow the width from there: what is tuned on it holds here. none = standard. See docs/width_transfer.md."""
    position_embedding: Literal["rotary", "learned"] = "rotary"
    """How positions enter: rotated queries and keys, or a learned table."""
    shared_layer_norm: bool = False
    """Attention and MLP read one layer norm (GPT-J) in place of two."""
    qkv_bias: bool = True
    """Bias on the fused query-key-value projection."""
    dense_bias: bool = True
    """Bias on the attention's output projection."""
    mlp_bias: bool = True
    """Biases on both MLP projections."""
    head_bias: bool = False
    """Bias on the output head."""
    attention_scale: OptionalFloat = Field(default=None, gt=0)
    """Factor on the attention scores; none = head_dim ** -0.5."""
    local_window: NotNegative = 0
    """In local layers, position i sees only the local_window positions i - local_window < j <= i."""
    local_layers: Ints = ()
    """Numbers (from 0) of the layers that attend locally."""
    hidden_dropout: Fraction = 0.0
    """In training, fraction of each branch's output that is zeroed before it joins the residual stream."""
    attention_dropout: Fraction = 0.0
    """In training, fraction of the attention's probabilities that are zeroed."""
    embedding_dropout: OptionalFloat = Field(default=None, ge=0, lt=1)
    """In training, fraction of the embedding's output that is zeroed; none = hidden_dropout."""

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        """Rotated dims per head, rounded down as Hugging Face does; 0 without rotary positions."""
        return int(self.head_dim * self.rotary_pct) if self.position_embedding == "rotary" else 0

    @property
    def ffn_size(self) -> int:
        """Width inside the MLP."""
        return self.intermediate_size or 4 * self.hidden_size

    @property
    def dropout(self) -> tuple[float, float, float]:
        """Fractions zeroed in training: of the embedding, of each branch's output, of the attention's probabilities."""
        embedding = self.hidden_dropout if self.embedding_dropout is None else self.embedding_dropout
        return embedding, self.hidden_dropout, self.attention_dropout

    @property
    def softmax_scale(self) -> float:
        """Factor on the attention scores."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size: {self.hidden_size} does not split into {self.num_attention_heads} heads")
        if self.mup_base_width and self.mup_base_width % self.head_dim:
            raise ValueError(
                f"mup_base_width: {self.mup_base_width} does not split into heads of {self.head_dim}, this model's "
                "head_dim, which the base model shares: choose a multiple of it"
            )
        if self.rotary_dim % 2:
            raise ValueError(
                f"rotary_pct: {self.rotary_pct} of {self.head_dim} dims per head rotates {self.rotary_dim}, "
                "which must be even"
            )
        if self.shared_layer_norm and not self.use_parallel_residual:
            raise ValueError("shared_layer_norm: needs use_parallel_residual = true")
        outside = [n for n in self.local_layers if not 0 <= n < self.num_hidden_layers]
        if outside:
            raise ValueError(f"local_layers: no layer {outside[0]}, they are 0 to {self.num_hidden_layers - 1}")
        if len(set(self.local_layers)) < len(self.local_layers):
            raise ValueError("local_layers: names a layer twice")
        if self.local_layers and not self.local_window:
            raise ValueError("local_window: must be at least 1 where local_layers are given")
        return self


class TokenizerConfig(Section):
    """Where the tokenizer comes from, or how one is trained on the text."""

    path: OptionalStr = None
    """A tokenizer.json; none = one is trained on the text."""
    vocab_size: Positive = 8192
    """Number of tokens when one is trained."""
    special_tokens: Strings = ()
    """Special tokens after <|endoftext|> and <|padding|>, in this order, when one is trained."""
    space_runs: NotNegative = 24
    """Longest run of spaces that is a token of its own, when one is trained; 0 = none is."""
    digits: Literal["joined", "single"] = "joined"
    """single lets no token hold two digits; joined splits as GPT-2 does. When one is trained."""
    normalizer: Literal["nfc", "none"] = "nfc"
    """nfc composes characters, as GPT-NeoX-20B's does; none gives every text back as it was. When one is trained."""

    @property
    def training(self) -> dict[str, Any]:
        """What `train_bpe` is called with, besides the texts."""
        return self.model_dump(exclude={"path"})


class DataConfig(Section):
    """What is read, and in what order."""

    train: Strings = ()
    """For training: .bin/.idx prefixes (what `neox prepare` writes), or text: files, folders, hf:OWNER/NAME."""
    valid: Strings = ()
    """The same, held out for evaluation."""
    seq_length: Positive = 256
    """Tokens per sample."""
    order: Literal["permuted", "megatron"] = "permuted"
    """permuted: a keyed permutation of the samples, without index files. megatron: gpt-neox's order, bit for bit."""
    num_samples: OptionalInt = Field(default=None, gt=0)
    """Samples that the megatron order is made for, and depends on; none = train.steps * train.global_batch_size."""
    weights: Weights = ()
    """Shares of data.train's entries in the samples, one each; without them permuted pools all text and megatron
    takes each entry alike."""
    split: OptionalStr = None
    """Shares of each data.train entry's documents for training, validation and test, in that order, such as
    "995,4,1"; none = all is training text."""
    segments: bool = False
    """Documents that share a sample do not see each other."""
    text_key: str = "text"
    """Key of the text in JSON lines; its column in Parquet files and data sets."""
    append_eod: bool = True
    """End each document with the end-of-document token."""
    special_in_text: Literal["token", "text"] = "token"
    """What the spelling of a special token in a document becomes: that token, which may end the document, or text."""
    on_error: Literal["fail", "skip"] = "fail"
    """What cannot be read: fail stops there, skip leaves it out, counts it and reports it."""

    @property
    def fractions(self) -> tuple[float, float, float] | None:
        """What `split` gives to training, validation and test; together 1. Raises ValueError where it cannot be read.

        Split by commas or else slashes, parts that are missing are 0, as gpt-neox reads it.
        """
        if self.split is None:
            return None
        wrong = f'split: "{self.split[:60]}" must be up to three shares, such as "995,4,1", the first of them above 0'
        try:
            shares = [float(share) for share in self.split.split("," if "," in self.split else "/")]
        except ValueError:
            raise ValueError(wrong) from None
        shares += [0.0] * (3 - len(shares))
        total = sum(shares)
        if len(shares) != 3 or not (shares[0] > 0 and min(shares) >= 0 and total < float("inf")):
            raise ValueError(wrong)
        train, valid, test = (share / total for share in shares)
        return train, valid, test

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.weights and self.train and len(self.weights) != len(self.train):
            raise ValueError(f"weights: {len(self.weights)} for {len(self.train)} entries of data.train; give one each")
        if self.fractions and self.valid:
            raise ValueError("split: holds out a part of data.train; leave out one of data.split and data.valid")
        return self


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
    betas: Annotated[tuple[Fraction, Fraction], BeforeValidator(_listed)] = (0.9, 0.95)
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
    plan: OptionalStr = None
    """"package:function" that gives another table of how tp lays out each module; none = neox.parallel.plan's. It is
    code: a run that is resumed wants it on the command line again."""
    schedule: Literal["1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipev"] = "1f1b"
    """The order in which the pipeline's stages run microbatches forward and backward: see docs/parallel.md."""
    stages_per_rank: Positive = 2
    """Stages that each process of an interleaved pipeline holds; 1f1b has 1, zbv and dualpipev have 2."""
    stage_layers: Ints = ()
    """Layers of each stage, first to last; without it they are balanced by cost, embedding and head counted."""

    @property
    def stages(self) -> int:
        """Stages of the pipeline, over all of its processes."""
        if self.schedule == "1f1b":
            return self.pp
        return self.pp * (self.stages_per_rank if self.schedule.startswith("interleaved") else 2)


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
    init: OptionalStr = None
    """A new run begins with these weights: Hugging Face folder, hub id, run or step folder; none = at random."""


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
    """Evaluation on data.valid during training."""

    every: NotNegative = 0
    """Steps between evaluations; 0 = never."""
    batches: Positive = 10
    """Global batches per evaluation."""


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
    stop_tokens: Annotated[tuple[NotNegative, ...], BeforeValidator(_listed)] = ()
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

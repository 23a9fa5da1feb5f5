"""Doubtful points in the record of the presets: value, reason, source."""

from __future__ import annotations

_FP16 = (
    "Precision: trained in fp16 with a dynamic loss scale; train.dtype=fp16 repeats that, train.dtype stays fp32, "
    "which every device runs."
)
_FLOOR = (
    "Schedule: cosine_floored, the formula of gpt-neox 1.0, which trained it. Today's gpt-neox has another (its pull "
    "requests #1008, #1011, #1039, #1040), here called cosine."
)
_GELU_PYTHIA = (
    "GELU: trained with the tanh approximation (bias_gelu_fusion), but the released Hugging Face configs say gelu "
    "(erf) and the published evaluations run that; hidden_act follows the released files. hidden_act=gelu_fast is "
    "as trained."
)
_SCALE = (
    "Loss scale: gpt-neox's config leaves fp16.initial_scale_power out, so a run began at DeepSpeed's default, 2^16; "
    "the other presets begin at 2^12, as their configs say."
)
_GPT_BATCH = (
    "Batch: gpt-neox's config fixes only the micro batch per GPU and leaves their number open; "
    "global_batch_size is that of one GPU, raise it to suit the run."
)
_NO_RECIPE = (
    "Training recipe: not recorded here; optim, schedule and train hold neox's defaults, not the original values."
)
FAMILY_NOTES: dict[str, tuple[str, ...]] = {
    "20b": (
        "Run: recipes/neox-20b.toml repeats it (fp16, TP 2 x PP 4 x DP 12, ZeRO-1, checkpointed activations); "
        "the preset alone resolves to fp32 on one device.",
        "Learning rate: 0.97e-4, as in gpt-neox's configs/20B.yml and the run log of gpt-neox issue #792. The paper "
        "and the model card print 0.97e-5, which is the config's min_lr.",
        "Batch: 1536 sequences = micro batch 4 x 32 accumulations x 12 data-parallel ranks (configs/20B.yml). "
        "The paper and the model card say 1538.",
        "Vocabulary: 50432 rows, as in the released weights = the tokenizer's 50277 tokens padded to a multiple of "
        "128 x tensor parallel 2. The paper and the model card say 50257.",
        "Parameters: 20,554,567,680, as on the model card. An early draft of the card says 20,556,201,984, "
        "which no vocabulary size explains.",
        _FLOOR,
        "Layer norms: two per block on the same input. One shared norm was intended; the released weights have two.",
        _FP16,
    ),
    "pythia": (_GELU_PYTHIA, _FLOOR, _FP16),
    "pythia-zero0": (
        "Loss scale: trained with ZeRO stage 0, whose fp16 loss scaler has no hysteresis: each overflow halves it.",
        _GELU_PYTHIA,
        _FLOOR,
        _FP16,
    ),
    "pythia-normal": (
        "Initialisation: normal(0.02) with scaled residual outputs. The config leaves out the small_init / wang_init "
        "of the other sizes, an acknowledged erratum (pythia issue #135); the preset keeps what was run.",
        _GELU_PYTHIA,
        _FLOOR,
        _FP16,
    ),
    "gpt": (_GPT_BATCH, _SCALE, _FP16),
    "gpt-scale12": (_GPT_BATCH, _FP16),
    "gpt-49m": (
        "Residual: parallel with rotary_pct 0.25, unlike gpt-neox's other GPT configs (configs/49M.yml).",
        _GPT_BATCH,
        _FP16,
    ),
    "gpt-760m": (
        "Betas: 0.9 and 0.999, unlike gpt-neox's other GPT configs (configs/760M.yml).",
        _GPT_BATCH,
        _SCALE,
        _FP16,
    ),
    "gpt-j": (_NO_RECIPE,),
    "gpt-neo": (_NO_RECIPE,),
    "quickstart": ("Recipe: our own, sized so that a laptop's CPU finishes it in minutes.",),
}
OWN_NOTES: dict[str, tuple[str, ...]] = {
    "pythia-1b": (
        "Learning rate: 2.5e-4, as in the config that was run (configs/pythia/1B.yml). Pythia's README says 3.0e-4.",
        _GELU_PYTHIA,
        _FLOOR,
        "Precision: trained in bf16, after an irrecoverable loss spike in fp16; train.dtype=bf16 repeats that.",
    ),
}

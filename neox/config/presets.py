"""The one table of named models and recipes, as plain rows.

A row holds what differs within a family; the family holds the rest; `preset` joins them into sections of options.
Where the published record contradicts itself, a note in `preset_notes` says which value is taken, why, and from where.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any, NamedTuple

from neox.config.options import did_you_mean

Sections = dict[str, dict[str, Any]]


class Row(NamedTuple):
    """One model: shape, padded vocabulary, peak lr, batch in sequences, steps.

    None: not recorded, the default stays.
    """

    name: str
    family: str
    layers: int
    hidden: int
    heads: int
    vocab: int
    lr: float | None
    batch: int | None
    steps: int | None


# fmt: off
ROWS: tuple[Row, ...] = (
    #   name            family        layers hidden heads  vocab  lr       batch  steps
    Row("quickstart",   "quickstart",      4,   128,   2,   4096, 3e-2,       8,   1000),
    Row("neox-20b",     "20b",            44,  6144,  64,  50432, 0.97e-4, 1536, 150000),
    Row("pythia-14m",   "pythia-zero0",    6,   128,   4,  50304, 1e-3,    1024, 143000),
    Row("pythia-31m",   "pythia-zero0",    6,   256,   8,  50304, 1e-3,    1024, 143000),
    Row("pythia-70m",   "pythia",          6,   512,   8,  50304, 1e-3,    1024, 143000),
    Row("pythia-160m",  "pythia",         12,   768,  12,  50304, 6e-4,    1024, 143000),
    Row("pythia-410m",  "pythia",         24,  1024,  16,  50304, 3e-4,    1024, 143000),
    Row("pythia-1b",    "pythia",         16,  2048,   8,  50304, 2.5e-4,  1024, 143000),
    Row("pythia-1.4b",  "pythia",         24,  2048,  16,  50304, 2e-4,    1024, 143000),
    Row("pythia-2.8b",  "pythia",         32,  2560,  32,  50304, 1.6e-4,  1024, 143000),
    Row("pythia-6.9b",  "pythia-normal",  32,  4096,  32,  50432, 1.2e-4,  1024, 143000),
    Row("pythia-12b",   "pythia-normal",  36,  5120,  40,  50688, 1.2e-4,  1024, 143000),
    Row("neox-19m",     "gpt-scale12",     6,   512,   8,  50304, 1e-3,       4, 143000),
    Row("neox-49m",     "gpt-49m",        10,   640,  10,  50304, 8e-4,      32, 143000),
    Row("neox-125m",    "gpt",            12,   768,  12,  50304, 6e-4,       4, 320000),
    Row("neox-350m",    "gpt",            24,  1024,  16,  50304, 3e-4,       4, 320000),
    Row("neox-760m",    "gpt-760m",       24,  1536,  16,  50304, 2.5e-4,     4, 320000),
    Row("neox-800m",    "gpt-scale12",    16,  2048,   8,  50304, 2.5e-4,    16, 143000),
    Row("neox-1.3b",    "gpt",            24,  2048,  16,  50304, 2e-4,       4, 320000),
    Row("neox-2.7b",    "gpt",            32,  2560,  32,  50304, 1.6e-4,     4, 320000),
    Row("neox-6.7b",    "gpt",            32,  4096,  32,  50304, 1.2e-4,     4, 320000),
    Row("neox-13b",     "gpt",            40,  5120,  40,  50304, 1e-4,       4, 320000),
    Row("neox-175b",    "gpt",            96, 12288,  96,  50304, 6e-5,       4, 320000),
    Row("gpt-j-6b",     "gpt-j",          28,  4096,  16,  50400, None,    None,   None),
    Row("gpt-neo-125m", "gpt-neo",        12,   768,  12,  50257, None,    None,   None),
    Row("gpt-neo-1.3b", "gpt-neo",        24,  2048,  16,  50257, None,    None,   None),
    Row("gpt-neo-2.7b", "gpt-neo",        32,  2560,  20,  50257, None,    None,   None),
)
# fmt: on

_NEOX: dict[str, Any] = {
    "model_type": "gpt_neox",
    "hidden_act": "gelu",
    "rotary_pct": 0.25,
    "use_parallel_residual": True,
    "init_method": "small_init",
}
_RECIPE: Sections = {
    "model": _NEOX,
    "optim": {"name": "adamw", "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "clip": 1.0},
    "schedule": {"name": "cosine", "warmup": 0.01},
    "checkpoint": {"every": 1000},
}
_TRAINED: Sections = {**_RECIPE, "schedule": {"name": "cosine_floored", "warmup": 0.01}}
_SERIAL: dict[str, Any] = {"use_parallel_residual": False, "rotary_pct": 1.0}
_GPT_J: dict[str, Any] = {
    "model_type": "gptj",
    "hidden_act": "gelu_new",
    "rotary_pct": 0.25,
    "use_parallel_residual": True,
    "shared_layer_norm": True,
    "qkv_bias": False,
    "dense_bias": False,
    "head_bias": True,
}
_GPT_NEO: dict[str, Any] = {
    "model_type": "gpt_neo",
    "hidden_act": "gelu_new",
    "position_embedding": "learned",
    "use_parallel_residual": False,
    "qkv_bias": False,
    "tie_word_embeddings": True,
    "attention_scale": 1.0,
    "local_window": 256,
}


def _with(base: Sections, **changes: dict[str, Any]) -> Sections:
    return {s: {**base.get(s, {}), **changes.get(s, {})} for s in {**base, **changes}}


_FAMILIES: dict[str, Sections] = {
    "20b": _with(
        _TRAINED,
        model={"hidden_act": "gelu_fast"},
        optim={"weight_decay": 0.01},
        checkpoint={"every": 500},
        eval={"every": 1000, "batches": 10},
    ),
    "pythia": _TRAINED,
    "pythia-zero0": _with(_TRAINED, optim={"loss_scale_hysteresis": 1}),
    "pythia-normal": _with(_TRAINED, model={"init_method": "normal", "initializer_range": 0.02}),
    "gpt": _with(_RECIPE, model=_SERIAL, optim={"loss_scale": 2.0**16}),
    "gpt-scale12": _with(_RECIPE, model=_SERIAL),
    "gpt-49m": _RECIPE,
    "gpt-760m": _with(_RECIPE, model=_SERIAL, optim={"betas": [0.9, 0.999], "loss_scale": 2.0**16}),
    "gpt-j": {"model": _GPT_J},
    "gpt-neo": {"model": _GPT_NEO},
    "quickstart": _with(
        _RECIPE,
        model={"max_position_embeddings": 256, "rotary_pct": 0.5},
        data={"seq_length": 256},
        tokenizer={"vocab_size": 4096},
        train={"micro_batch_size": 8, "loss_chunk": 512},
        optim={"name": "muon", "muon_lr": 0.03},
        schedule={"warmup": 0.05, "min_lr": 0.0},
    ),
}

_BY_NAME = {row.name: row for row in ROWS}


def names() -> tuple[str, ...]:
    """All preset names, in the table's order."""
    return tuple(_BY_NAME)


def preset(name: str) -> Sections:
    """Sections that a preset sets, as a fresh dict. Raises ValueError."""
    row = _row(name)
    sections = deepcopy(
        _with({"model": {}, "data": {}, "train": {}, "optim": {}, "schedule": {}}, **_FAMILIES[row.family])
    )
    sections["model"] |= {
        "vocab_size": row.vocab,
        "hidden_size": row.hidden,
        "num_hidden_layers": row.layers,
        "num_attention_heads": row.heads,
    }
    sections["model"].setdefault("max_position_embeddings", 2048)
    sections["data"].setdefault("seq_length", 2048)
    if row.family == "gpt-neo":
        sections["model"]["local_layers"] = list(range(1, row.layers, 2))
    if row.lr is not None:
        sections["optim"]["lr"] = row.lr
        # Every published recipe decays to a tenth; rounded, since 6e-4 / 10 is not 6e-5 in binary.
        sections["schedule"].setdefault("min_lr", float(f"{row.lr / 10:.6g}"))
    if row.batch is not None:
        sections["train"]["global_batch_size"] = row.batch
    if row.steps is not None:
        sections["train"]["steps"] = row.steps
    return {s: keys for s, keys in sections.items() if keys}


def notes(name: str) -> tuple[str, ...]:
    """Doubtful points in the record of this model."""
    from neox.config.preset_notes import FAMILY_NOTES, OWN_NOTES

    return OWN_NOTES.get(name) or FAMILY_NOTES[_row(name).family]


def _row(name: str) -> Row:
    if name not in _BY_NAME:
        shown = name if len(name) <= 60 else name[:57] + "..."
        raise ValueError(f"no preset {shown!r}; {did_you_mean(name, _BY_NAME, '`neox show` lists them')}")
    return _BY_NAME[name]

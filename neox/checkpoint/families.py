"""Config keys and weight names of the Hugging Face families: GPT-NeoX and Pythia, GPT-J, GPT-Neo.

Our own names are those of GPT-NeoX without the `gpt_neox.` prefix; for the two relatives a table maps ours to theirs.
Shapes: H heads, D head_dim, C hidden, R rotary dims.
"""

import math
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from neox.config import ModelConfig

# Buffers that old releases stored beside the weights: recomputed here, so ignored.
IGNORED = re.compile(
    r"\.(attention|attn)\.(attention\.)?(bias|masked_bias|rotary_emb\.(inv_freq|cos_cached|sin_cached))$"
)

_GPT_J = {
    "embed_in.weight": ("transformer.wte.weight",),
    "input_layernorm": ("ln_1",),
    "attention.query_key_value": ("attn.q_proj", "attn.k_proj", "attn.v_proj"),
    "attention.dense": ("attn.out_proj",),
    "mlp.dense_h_to_4h": ("mlp.fc_in",),
    "mlp.dense_4h_to_h": ("mlp.fc_out",),
}
_GPT_NEO = {
    "embed_in.weight": ("transformer.wte.weight",),
    "embed_positions.weight": ("transformer.wpe.weight",),
    "input_layernorm": ("ln_1",),
    "post_attention_layernorm": ("ln_2",),
    "attention.query_key_value": ("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"),
    "attention.dense": ("attn.attention.out_proj",),
    "mlp.dense_h_to_4h": ("mlp.c_fc",),
    "mlp.dense_4h_to_h": ("mlp.c_proj",),
}
ARCHITECTURES = {"gpt_neox": "GPTNeoXForCausalLM", "gptj": "GPTJForCausalLM", "gpt_neo": "GPTNeoForCausalLM"}


ROPE_OPTIONS = frozenset(name for name in ModelConfig.model_fields if name.startswith("rope_"))


def their_names(config: ModelConfig, name: str) -> tuple[str, ...]:
    """Stored names of our parameter `name`: one, or those of q, k and v."""
    if config.model_type == "gpt_neox":
        return (name if name.startswith("embed_out.") else f"gpt_neox.{name}",)
    table = _GPT_J if config.model_type == "gptj" else _GPT_NEO
    if name in table:
        return table[name]
    if name.startswith("embed_out."):
        return (name.replace("embed_out", "lm_head"),)
    if name.startswith("final_layer_norm."):
        return (name.replace("final_layer_norm", "transformer.ln_f"),)
    _, layer, rest = name.split(".", 2)
    module, kind = rest.rsplit(".", 1)
    return tuple(f"transformer.h.{layer}.{theirs}.{kind}" for theirs in table[module])


def canonical(config: ModelConfig, stored: Iterable[str]) -> dict[str, str]:
    """Spell stored names in one way: {our spelling: stored name}.

    GPT-NeoX's head is `embed_out`, since transformers 5 also `lm_head`. A model without a head, such as GPTNeoXModel,
    is saved without the prefix.
    """
    stored, prefix = list(stored), "gpt_neox." if config.model_type == "gpt_neox" else "transformer."
    bare = not any(name.startswith(prefix) for name in stored)

    def spelled(name: str) -> str:
        if name.startswith(("embed_out.", "lm_head.")):
            return "embed_out.weight" if config.model_type == "gpt_neox" and name == "lm_head.weight" else name
        return prefix + name if bare else name

    return {spelled(name): name for name in stored}


def _half_rotation_order(config: ModelConfig) -> Tensor:
    """Row order [D] of a head from GPT-J's interleaved rotary pairs to NeoX's two halves."""
    r = config.rotary_dim
    return torch.cat((torch.arange(0, r, 2), torch.arange(1, r, 2), torch.arange(r, config.head_dim)))


def fuse(config: ModelConfig, parts: list[Tensor]) -> Tensor:
    """Fuse q, k, v [H * D, ...] into [H * 3 * D, ...] in the order [head, q|k|v, head_dim].

    H may be some of the heads; a single part passes through.
    """
    if len(parts) == 1:
        return parts[0]
    split = [part.unflatten(0, (-1, config.head_dim)) for part in parts]
    if config.model_type == "gptj":
        order = _half_rotation_order(config).to(parts[0].device)
        split = [split[0][:, order], split[1][:, order], split[2]]
    return torch.stack(split, dim=1).flatten(0, 2)


def unfuse(config: ModelConfig, fused: Tensor) -> list[Tensor]:
    """Split a fused projection [H * 3 * D, ...] into q, k, v [H * D, ...]: the inverse of `fuse`."""
    split = list(fused.unflatten(0, (config.num_attention_heads, 3, config.head_dim)).unbind(1))
    if config.model_type == "gptj":
        order = _half_rotation_order(config).argsort().to(fused.device)
        split = [split[0][:, order], split[1][:, order], split[2]]
    return [part.flatten(0, 1).contiguous() for part in split]


def read_config(raw: dict[str, Any]) -> ModelConfig:
    """Make a ModelConfig from a Hugging Face config.json, old or new spelling. ValueError for what is not supported."""
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise ValueError(f"model_type {kind!r} is not one that neox runs: expected one of {', '.join(ARCHITECTURES)}")
    if not raw.get("is_causal", True):
        raise ValueError("is_causal = false asks for attention in both directions: neox has causal attention only")
    read = {"gpt_neox": _read_gpt_neox, "gptj": _read_gptj, "gpt_neo": _read_gpt_neo}[kind]
    try:
        return ModelConfig(**read(raw))
    except KeyError as missing:
        raise ValueError(f"config.json has no key {missing}, which a {kind} model needs") from None
    except (TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"a value is not what a {kind} model has there ({error})") from None


def _read_gpt_neox(raw: dict[str, Any]) -> dict[str, Any]:
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    bias = raw.get("attention_bias", True)
    return {
        "model_type": "gpt_neox",
        "vocab_size": raw["vocab_size"],
        "hidden_size": raw["hidden_size"],
        "num_hidden_layers": raw["num_hidden_layers"],
        "num_attention_heads": raw["num_attention_heads"],
        "intermediate_size": raw.get("intermediate_size"),
        "hidden_act": raw.get("hidden_act", "gelu"),
        "rotary_pct": float(rope.get("partial_rotary_factor", raw.get("rotary_pct", 0.25))),
        "rotary_emb_base": float(rope.get("rope_theta", raw.get("rotary_emb_base", 10000.0))),
        **_read_rope_scaling(
            rope, raw.get("max_position_embeddings", 2048), raw.get("original_max_position_embeddings")
        ),
        "layer_norm_eps": raw.get("layer_norm_eps", 1e-5),
        "use_parallel_residual": raw.get("use_parallel_residual", True),
        "tie_word_embeddings": raw.get("tie_word_embeddings", False),
        "initializer_range": raw.get("initializer_range", 0.02),
        "qkv_bias": bias,
        "dense_bias": bias,
        **_dropout(raw, "hidden_dropout", "attention_dropout"),
    }


def _read_rope_scaling(rope: dict[str, Any], context: int, original: int | None) -> dict[str, Any]:
    """Read context and rope scaling from the table `rope_parameters`, formerly `rope_scaling`, as transformers does.

    For yarn, `original` is the original context that stands beside the table; it wins over the one inside.
    """
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "linear", "dynamic", "yarn"):
        raise ValueError(f"config.json asks for rope_type {kind!r}: neox has default, linear, dynamic and yarn")
    if kind == "default":
        return {"max_position_embeddings": context}
    factor = rope["factor"]
    if kind == "linear":
        return {"max_position_embeddings": context, "rope_scaling": kind, "rope_factor": float(factor)}
    if kind == "dynamic":  # transformers counts the context from before the scaling
        stretched = int(context * factor)
        read = {"rope_scaling": kind, "rope_factor": float(factor), "rope_original_context": context}
        return {"max_position_embeddings": stretched, **read}
    if not rope.get("truncate", True):
        raise ValueError("config.json asks for yarn with truncate = false, which neox does not have")
    original = original or rope.get("original_max_position_embeddings") or context
    factor = float(context / original if factor is None else factor)
    attention = rope.get("attention_factor")
    if attention is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        one, all_dims = (0.1 * rope[key] * math.log(factor) + 1 for key in ("mscale", "mscale_all_dim"))
        attention = one / all_dims
    return {
        "max_position_embeddings": context,
        "rope_scaling": kind,
        "rope_factor": factor,
        "rope_original_context": original,
        "rope_attention_factor": attention,
        "rope_beta_fast": float(rope.get("beta_fast") or 32),
        "rope_beta_slow": float(rope.get("beta_slow") or 1),
    }


def _write_rope_scaling(config: ModelConfig) -> dict[str, Any]:
    """Write the table `rope_parameters`: the inverse of `_read_rope_scaling`."""
    table: dict[str, Any] = {"rope_type": "default" if config.rope_scaling == "none" else config.rope_scaling}
    if config.rope_scaling != "none":
        table["factor"] = config.rope_factor
    if config.rope_scaling == "yarn":
        table |= {
            "original_max_position_embeddings": config.rope_context,
            "beta_fast": config.rope_beta_fast,
            "beta_slow": config.rope_beta_slow,
        }
        if config.rope_attention_factor is not None:
            table["attention_factor"] = config.rope_attention_factor
    return table | {"rope_theta": config.rotary_emb_base, "partial_rotary_factor": config.rotary_pct}


def _dropout(raw: dict[str, Any], hidden: str, attention: str, embedding: str | None = None) -> dict[str, Any]:
    """Our three dropout probabilities, from keys that may be missing."""
    branches, probabilities = float(raw.get(hidden) or 0), float(raw.get(attention) or 0)
    embedded = float(raw.get(embedding) or 0) if embedding else branches
    return {
        "hidden_dropout": branches,
        "attention_dropout": probabilities,
        "embedding_dropout": None if embedded == branches else embedded,
    }


def _fraction(rotary_dim: int, head_dim: int) -> float:
    """Find rotary_pct such that int(head_dim * rotary_pct) is rotary_dim: 8 / 49 * 49 is below 8 in binary."""
    pct = rotary_dim / head_dim
    return pct if int(head_dim * pct) == rotary_dim else math.nextafter(pct, 1.0)


def _read_gptj(raw: dict[str, Any]) -> dict[str, Any]:
    head_dim = raw["n_embd"] // raw["n_head"]
    rotary_dim = raw["rotary_dim"] if raw.get("rotary_dim") is not None else head_dim
    return {
        "model_type": "gptj",
        "vocab_size": raw["vocab_size"],
        "hidden_size": raw["n_embd"],
        "num_hidden_layers": raw["n_layer"],
        "num_attention_heads": raw["n_head"],
        "intermediate_size": raw.get("n_inner"),
        "hidden_act": raw.get("activation_function", "gelu_new"),
        "max_position_embeddings": raw.get("n_positions", 2048),
        "rotary_pct": _fraction(rotary_dim, head_dim),
        "layer_norm_eps": raw.get("layer_norm_epsilon", 1e-5),
        "tie_word_embeddings": raw.get("tie_word_embeddings", False),
        "initializer_range": raw.get("initializer_range", 0.02),
        "shared_layer_norm": True,
        "qkv_bias": False,
        "dense_bias": False,
        "head_bias": True,
        **_dropout(raw, "resid_pdrop", "attn_pdrop", "embd_pdrop"),
    }


def _read_gpt_neo(raw: dict[str, Any]) -> dict[str, Any]:
    layers = raw.get("attention_layers") or [
        kind for pattern, times in raw["attention_types"] for _ in range(times) for kind in pattern
    ]
    return {
        "model_type": "gpt_neo",
        "vocab_size": raw["vocab_size"],
        "hidden_size": raw["hidden_size"],
        "num_hidden_layers": raw["num_layers"],
        "num_attention_heads": raw["num_heads"],
        "intermediate_size": raw.get("intermediate_size"),
        "hidden_act": raw.get("activation_function", "gelu_new"),
        "max_position_embeddings": raw.get("max_position_embeddings", 2048),
        "position_embedding": "learned",
        "layer_norm_eps": raw.get("layer_norm_epsilon", 1e-5),
        "use_parallel_residual": False,
        "tie_word_embeddings": raw.get("tie_word_embeddings", True),
        "initializer_range": raw.get("initializer_range", 0.02),
        "qkv_bias": False,
        "attention_scale": 1.0,
        "local_window": raw.get("window_size", 256),
        "local_layers": tuple(i for i, kind in enumerate(layers) if kind == "local"),
        **_dropout(raw, "resid_dropout", "attention_dropout", "embed_dropout"),
    }


def write_config(config: ModelConfig, dtype: torch.dtype, eos: int | None) -> dict[str, Any]:
    """Make the config.json that transformers 4 (`rotary_pct`) and 5 (`rope_parameters`) read.

    Raises ValueError where the family's Hugging Face class cannot express the config.
    """
    written = {"gpt_neox": _write_gpt_neox, "gptj": _write_gptj, "gpt_neo": _write_gpt_neo}[config.model_type](config)
    common = {
        "architectures": [ARCHITECTURES[config.model_type]],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": eos,
        "eos_token_id": eos,
        "use_cache": True,
    }
    raw = {**common, **written}
    read_back = read_config(raw)
    # Without influence on the computed function, or written as ffn_size.
    free = {"init_method", "mup_base_width", "intermediate_size"}
    if read_back.rotary_dim == config.rotary_dim:
        free.add("rotary_pct")  # GPT-J writes the number of dims
    if not config.rotary_dim:
        free.add("rotary_emb_base")
    if config.rope_scaling == "none":
        free |= ROPE_OPTIONS
    elif config.rope_scaling == "linear" or read_back.rope_context == config.rope_context:
        free.add("rope_original_context")
    if read_back.dropout == config.dropout:
        free.add("embedding_dropout")  # GPT-NeoX has one number for it and the branches
    for field in type(config).model_fields:
        if field not in free and getattr(read_back, field) != getattr(config, field):
            raise ValueError(
                f"model.{field} = {getattr(config, field)!r} cannot be written as a Hugging Face {config.model_type} "
                f"model, whose own value is {getattr(read_back, field)!r}"
            )
    return raw


def _write_gpt_neox(config: ModelConfig) -> dict[str, Any]:
    return {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.ffn_size,
        "hidden_act": config.hidden_act,
        "max_position_embeddings": (
            config.rope_context if config.rope_scaling == "dynamic" else config.max_position_embeddings
        ),
        "rotary_pct": config.rotary_pct,
        "rotary_emb_base": config.rotary_emb_base,
        "rope_parameters": _write_rope_scaling(config),
        "layer_norm_eps": config.layer_norm_eps,
        "use_parallel_residual": config.use_parallel_residual,
        "attention_bias": config.qkv_bias,
        "attention_dropout": config.attention_dropout,
        "hidden_dropout": config.hidden_dropout,
    }


def _write_gptj(config: ModelConfig) -> dict[str, Any]:
    return {
        "n_embd": config.hidden_size,
        "n_layer": config.num_hidden_layers,
        "n_head": config.num_attention_heads,
        "n_inner": config.intermediate_size,
        "activation_function": config.hidden_act,
        "n_positions": config.max_position_embeddings,
        "rotary_dim": config.rotary_dim,
        "layer_norm_epsilon": config.layer_norm_eps,
        "attn_pdrop": config.attention_dropout,
        "embd_pdrop": config.dropout[0],
        "resid_pdrop": config.hidden_dropout,
    }


def _write_gpt_neo(config: ModelConfig) -> dict[str, Any]:
    layers = ["local" if i in config.local_layers else "global" for i in range(config.num_hidden_layers)]
    return {
        "hidden_size": config.hidden_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
        "activation_function": config.hidden_act,
        "max_position_embeddings": config.max_position_embeddings,
        "layer_norm_epsilon": config.layer_norm_eps,
        "window_size": config.local_window,
        "attention_layers": layers,
        "attention_types": [[[kind], 1] for kind in layers],
        "attention_dropout": config.attention_dropout,
        "embed_dropout": config.dropout[0],
        "resid_dropout": config.hidden_dropout,
    }

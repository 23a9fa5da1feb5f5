"""Tiny random models, built by `transformers` or by us, and the measure that two of them are compared by."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neox.config import ModelConfig
from neox.model.decoder import GPTNeoX

VOCAB = 97
CONTEXT = 64
ATTENTION = {"attn_implementation": "eager"}  # the only one that all three families have, and the plainest


def relative(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, in units of the largest reference value."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter, biases and norms too: zeros and ones would hide a parameter that is left out."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.copy_(torch.empty(parameter.shape).normal_(std=0.2, generator=generator))
        if name.endswith("weight") and ("norm" in name or "ln_" in name):
            parameter.add_(1)
    return model


def ours(seed: int = 0, **changes: Any) -> GPTNeoX:
    """Our own small model with every parameter at random."""
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": CONTEXT,
    }
    model = GPTNeoX(ModelConfig(**(shape | changes)))
    randomise(model, seed)
    return model.eval()


GPT_J = {
    "model_type": "gptj",
    "hidden_act": "gelu_new",
    "rotary_pct": 0.5,
    "shared_layer_norm": True,
    "qkv_bias": False,
    "dense_bias": False,
    "head_bias": True,
}
GPT_NEO = {
    "model_type": "gpt_neo",
    "hidden_act": "gelu_new",
    "position_embedding": "learned",
    "use_parallel_residual": False,
    "qkv_bias": False,
    "tie_word_embeddings": True,
    "attention_scale": 1.0,
    "local_window": 5,
    "local_layers": (1,),
}
"""Flags of the two relatives, for `ours`."""


def theirs(kind: str = "gpt_neox", seed: int = 0, **changes: Any) -> nn.Module:
    """A small model of `transformers` in the same family, with every parameter at random."""
    import transformers

    common = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0}
    shapes = {
        "gpt_neox": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 128,
            "max_position_embeddings": CONTEXT,
        },
        "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8, "n_positions": CONTEXT},
        "gpt_neo": {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 2,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 5,
            "max_position_embeddings": CONTEXT,
        },
    }
    config = transformers.AutoConfig.for_model(kind, **(common | shapes[kind] | changes))
    model = transformers.AutoModelForCausalLM.from_config(config, **ATTENTION)
    return randomise(model, seed).eval()


def read_by_transformers(folder: Path) -> nn.Module:
    """The folder's model as `transformers` reads it, every tensor accounted for."""
    import transformers

    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **ATTENTION)
    assert not any(report.values()), report
    return model.eval()


def rewrite_config(folder: Path, drop: tuple[str, ...] = (), **changes: Any) -> None:
    """Change keys of the folder's config.json."""
    file = folder / "config.json"
    raw = json.loads(file.read_text())
    for key in drop:
        raw.pop(key, None)
    file.write_text(json.dumps(raw | changes))


def tokens(rows: int = 2, length: int = 24, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))

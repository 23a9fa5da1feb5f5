"""The released files of GPT-NeoX-20B and Pythia, rebuilt tiny: same keys, dtypes, shards, configs and buffers.

What is imitated: 20B came as 46 shards of fp16 (the embedding, 44 layers, the final norm with the head) and an index;
Pythia as one file, fp16 (1B: bf16). Both hold three buffers a layer that are no parameters.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from neox.tokenizer import Tokenizer

HIDDEN, HEADS, CONTEXT, ROTARY = 32, 2, 48, 4
VOCAB = 384  # more rows than the tokenizer has ids, as in the released models
END = "<|endoftext|>"
CONFIG_20B = {
    "architectures": ["GPTNeoXForCausalLM"],
    "attention_probs_dropout_prob": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "gelu_fast",
    "hidden_dropout_prob": 0,
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": 4 * HIDDEN,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": CONTEXT,
    "model_type": "gpt_neox",
    "num_attention_heads": HEADS,
    "num_hidden_layers": 44,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.19.0.dev0",
    "use_cache": True,
    "vocab_size": VOCAB,
}
CONFIG_PYTHIA = CONFIG_20B | {
    "hidden_act": "gelu",
    "num_hidden_layers": 3,
    "transformers_version": "4.24.0",
    "use_parallel_residual": True,
}
TOKENIZER_CONFIG = {
    "add_prefix_space": False,
    "bos_token": END,
    "eos_token": END,
    "model_max_length": CONTEXT,
    "name_or_path": "EleutherAI/gpt-neox-20b",
    "tokenizer_class": "GPTNeoXTokenizer",
    "unk_token": END,
}


def state(layers: int, dtype: torch.dtype = torch.float16, buffers: torch.dtype = torch.bool) -> dict[str, Tensor]:
    """Every stored tensor, random where it is a parameter, in the order of the released files."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, mean: float = 0.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * 0.15 + mean).to(dtype)

    def norm(name: str) -> dict[str, Tensor]:
        return {f"{name}.weight": random(HIDDEN, mean=1.0), f"{name}.bias": random(HIDDEN)}

    def linear(name: str, rows: int, columns: int) -> dict[str, Tensor]:
        return {f"{name}.weight": random(rows, columns), f"{name}.bias": random(rows)}

    tensors = {"gpt_neox.embed_in.weight": random(VOCAB, HIDDEN)}
    for i in range(layers):
        layer = f"gpt_neox.layers.{i}"
        tensors |= norm(f"{layer}.input_layernorm") | norm(f"{layer}.post_attention_layernorm")
        tensors |= {
            f"{layer}.attention.bias": torch.ones(1, 1, CONTEXT, CONTEXT).tril().to(buffers),
            f"{layer}.attention.masked_bias": torch.tensor(-1e9, dtype=torch.float16),
            f"{layer}.attention.rotary_emb.inv_freq": (10000 ** (-torch.arange(0, ROTARY, 2) / ROTARY)).half(),
        }
        tensors |= linear(f"{layer}.attention.query_key_value", 3 * HIDDEN, HIDDEN)
        tensors |= linear(f"{layer}.attention.dense", HIDDEN, HIDDEN)
        tensors |= linear(f"{layer}.mlp.dense_h_to_4h", 4 * HIDDEN, HIDDEN)
        tensors |= linear(f"{layer}.mlp.dense_4h_to_h", HIDDEN, 4 * HIDDEN)
    return tensors | norm("gpt_neox.final_layer_norm") | {"embed_out.weight": random(VOCAB, HIDDEN)}


def shards(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The embedding, one layer each, the rest: 46 of a 44-layer model."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        place = ".".join(name.split(".")[:3]) if ".layers." in name else "first" if "embed_in" in name else "last"
        groups.setdefault(place, {})[name] = value
    return list(groups.values())


def write(folder: Path, config: dict, tensors: dict[str, Tensor], layout: str, tokenizer: Tokenizer) -> Path:
    """The folder as downloaded. layout: `single`, `sharded`, `bin`, `bin-sharded` or `bin-legacy`."""
    folder.mkdir(parents=True)
    bare = layout.startswith("bin")
    stem, ending = ("pytorch_model", "bin") if bare else ("model", "safetensors")

    def put(part: dict[str, Tensor], name: str) -> None:
        if bare:
            torch.save(part, folder / name, _use_new_zipfile_serialization=layout != "bin-legacy")
        else:
            save_file(part, folder / name, metadata={"format": "pt"})

    if layout.endswith("sharded"):
        parts = shards(tensors)
        names = [f"{stem}-{i:05d}-of-{len(parts):05d}.{ending}" for i in range(1, len(parts) + 1)]
        for part, name in zip(parts, names, strict=True):
            put(part, name)
        index = {
            "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
            "weight_map": {key: name for part, name in zip(parts, names, strict=True) for key in part},
        }
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index, indent=2))
    else:
        put(tensors, f"{stem}.{ending}")
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
    (folder / "special_tokens_map.json").write_text(
        json.dumps(dict.fromkeys(("bos_token", "eos_token", "unk_token"), END))
    )
    tokenizer.save(folder / "tokenizer.json")
    return folder

"""Parameters and FLOPs of a model, from its shape alone.

Legend: C hidden_size, L layers, F MLP width, V vocab rows, T tokens of context.
"""

from __future__ import annotations

from dataclasses import dataclass

from neox.config import ModelConfig


@dataclass(frozen=True)
class Parameters:
    """Number of parameters, by component."""

    embedding: int
    """Token embedding, V x C, and the table of learned positions."""
    attention: int
    """Query-key-value and output projections, all layers."""
    mlp: int
    """Both MLP projections, all layers."""
    norms: int
    """Layer norms, the final one included."""
    head: int
    """Output head, 0 where it is the embedding's weight."""

    @property
    def total(self) -> int:
        """All parameters; a tied head counts once."""
        return self.embedding + self.non_embedding + self.head

    @property
    def non_embedding(self) -> int:
        """All but embedding and head: what the Pythia and GPT-NeoX-20B papers call by this name."""
        return self.attention + self.mlp + self.norms


def parameters(model: ModelConfig) -> Parameters:
    """Count the parameters. With every bias and F = 4C a block has 12C^2 + 13C of them."""
    c, f, layers, v = model.hidden_size, model.ffn_size, model.num_hidden_layers, model.vocab_size
    positions = model.max_position_embeddings if model.position_embedding == "learned" else 0
    norms_per_layer = 1 if model.shared_layer_norm else 2
    return Parameters(
        embedding=(v + positions) * c,
        attention=layers * (4 * c * c + 3 * c * model.qkv_bias + c * model.dense_bias),
        mlp=layers * (2 * c * f + (f + c) * model.mlp_bias),
        norms=(layers * norms_per_layer + 1) * 2 * c,
        head=(0 if model.tie_word_embeddings else v * c) + v * model.head_bias,
    )


def attention_pairs(model: ModelConfig, tokens: int, past: int = 0, causal: bool = True) -> int:
    """Query-key pairs, summed over layers, when `tokens` new tokens follow `past` cached ones.

    causal counts what the mask keeps; otherwise every query meets every key, which is what most published FLOP
    counts assume. A local layer reaches back local_window tokens at most, in either convention.
    """
    local = len(model.local_layers)
    keys = past + tokens

    def pairs(reach: int) -> int:
        if not causal:
            return tokens * min(keys, reach)
        rising = max(0, min(keys, reach) - past)  # the first queries see fewer than `reach` keys: past+1, past+2, ...
        return rising * past + rising * (rising + 1) // 2 + (tokens - rising) * reach

    return (model.num_hidden_layers - local) * pairs(keys) + (local * pairs(model.local_window) if local else 0)


def forward_flops(
    model: ModelConfig, tokens: int, past: int = 0, scored: int | None = None, causal: bool = True
) -> int:
    """FLOPs of one forward pass over `tokens` tokens of one sequence: 2 per parameter and token, 4C per attention pair.

    The head runs on `scored` positions only (default: all). A multiply-add is 2 FLOPs. Source: Kaplan et al. 2020,
    table 1, with the attention term of PaLM (Chowdhery et al. 2022, appendix B).
    """
    scored = tokens if scored is None else scored
    head = model.vocab_size * (model.hidden_size + model.head_bias)  # a tied head holds no parameters and still runs
    blocks = parameters(model).non_embedding
    pairs = attention_pairs(model, tokens, past, causal)
    return 2 * blocks * tokens + 2 * head * scored + 4 * model.hidden_size * pairs


def train_flops_per_token(model: ModelConfig, seq_length: int, causal: bool = False, recomputed: float = 0.0) -> float:
    """FLOPs of forward and backward per token: 6 (N + head) + 12 L C T; causal halves the attention term.

    N is the non-embedding count; the backward pass costs twice the forward one. The full convention (causal=False) is
    that of the PaLM paper and of most published utilisation figures; causal counts the (T + 1) / 2 keys that a token
    sees on average.

    recomputed: the share of the blocks whose forward pass runs a second time in the backward pass (activation
    checkpointing; the head never does). 0 gives the FLOPs that the model needs (MFU), more those that the hardware
    executes (HFU): 8 N + 6 head + 16 L C T where every block is (Narayanan et al. 2021, equation 3).
    """
    blocks = forward_flops(model, seq_length, scored=0, causal=causal)
    return (3 * forward_flops(model, seq_length, causal=causal) + recomputed * blocks) / seq_length


def recomputed_share(model: ModelConfig, seq_length: int, checkpointing: str) -> float:
    """Share of the blocks' forward FLOPs that train.activation_checkpointing runs again: all, or the MLPs' first
    products (what is kept of a block then ends before their second ones)."""
    if checkpointing != "selective":
        return float(checkpointing == "full")
    first = 2 * model.hidden_size * model.ffn_size * model.num_hidden_layers * seq_length
    return first / forward_flops(model, seq_length, scored=0, causal=False)  # of `mfu`'s convention, as `hfu` is


def generate_flops(model: ModelConfig, prompt: int, new: int) -> int:
    """FLOPs to read a prompt of `prompt` tokens and sample `new` tokens, with a KV cache.

    The head runs once per sampled token; the last sampled token is not fed back.
    """
    read = forward_flops(model, prompt, scored=1)
    return read + sum(forward_flops(model, 1, past=prompt + i) for i in range(new - 1))

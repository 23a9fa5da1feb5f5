"""The decoder: one definition of GPT-NeoX-20B, Pythia, GPT-J and GPT-Neo, from a laptop to a 3D-parallel cluster.

Shapes: B batch, T time, S cached length, V vocab, C hidden, H heads, D head_dim, R rotary dims, F feed-forward.

    tokens [B, T] -> embed_in -> x [B, T, C]
                                 |
              parallel residual  |  x = x + attention(input_layernorm(x)) + mlp(post_attention_layernorm(x))
              serial residual    |  x = x + attention(input_layernorm(x));  x = x + mlp(post_attention_layernorm(x))
                                 |  ... num_hidden_layers times
                                 v
                          final_layer_norm -> embed_out -> logits [B, T, V]

Only nn.Linear, nn.Embedding and nn.LayerNorm hold parameters, so that tensor parallelism is a table of plan entries,
quantization a module swap and export one prefix rule. Parameter names and the fused QKV layout (rows ordered
[head, q|k|v, head_dim]) are those of Hugging Face's GPTNeoX. Sources: GPT-NeoX-20B (arXiv 2204.06745), rotary positions
(arXiv 2104.09864).
"""

import hashlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from neox.config import ModelConfig
from neox.model.cache import Cache
from neox.model.mup import scaling
from neox.model.rotary import rotary_angles, rotate

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_fast": partial(F.gelu, approximate="tanh"),
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


class Context(NamedTuple):
    """Inputs that every layer of one forward pass shares."""

    rotation: tuple[Tensor, Tensor] | None  # cos, sin [3, B, 1, T, R / 2]
    mask: Tensor | None  # which keys each query sees; None: plain causal attention
    local_mask: Tensor | None  # the same for the layers with a local window
    cache: Cache | None


class Attention(nn.Module):
    """Causal self-attention. Heads are inferred from the projection, so a tensor-parallel shard needs no code here."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim, self.scale = layer, config.head_dim, config.attention_scale
        self.local = layer in config.local_layers
        _, _, self.dropout = config.dropout
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=config.dense_bias)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        B, T, _ = x.shape
        qkv = self.query_key_value(x).view(B, T, -1, 3, self.head_dim).permute(3, 0, 2, 1, 4)
        if context.rotation is not None:
            qkv = rotate(qkv, *context.rotation)
        q, k, v = qkv.unbind(0)  # each [B, H, T, D]
        if context.cache is not None:
            out = context.cache.attend(self.layer, q, k, v, self.local, self.attend)
        else:
            out = self.attend(q, k, v, context.local_mask if self.local else context.mask)
        return cast(Tensor, self.dense(out.transpose(1, 2).reshape(B, T, -1)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attention's result [B, H, T, D]; context parallelism puts another in its place, which gathers keys first."""
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, dropout_p=dropout
        )


def dropped(x: Tensor, fraction: float, training: bool) -> Tensor:
    """x with `fraction` of its values zeroed and the rest divided by 1 - fraction; x itself outside training."""
    # Nothing is drawn where nothing is dropped: the random state stays as it is.
    return F.dropout(x, fraction) if fraction and training else x


def recomputed(
    result: Tensor, function: Callable[[Tensor], Tensor], argument: Tensor, wanted: bool = True
) -> AbstractContextManager[Any]:
    """Inside, autograd does not keep `result` = function(argument) for the backward pass but computes it again there.

    For a cheap function whose argument is kept anyway: two fifths of a block's activations for one more GELU and norms.
    A compiler decides this by itself, and a distributed tensor's address says nothing: both keep the result. Under
    activation checkpointing it is not `wanted`: it would hold on to what the checkpoint lets go.
    """
    distributed = is_traceable_wrapper_subclass(result)
    if not wanted or torch.compiler.is_compiling() or not torch.is_grad_enabled() or distributed:
        return nullcontext()
    # The storage's identity: fake tensors (neox.planning.dry_run) have no address.
    storage, size = result.untyped_storage()._cdata, result.numel()

    def pack(saved: Tensor) -> Tensor | torch.Size:
        if is_traceable_wrapper_subclass(saved) or saved.numel() != size:
            return saved
        return saved.shape if saved.untyped_storage()._cdata == storage else saved

    def unpack(packed: Tensor | torch.Size) -> Tensor:
        return packed if isinstance(packed, Tensor) else function(argument).view(packed)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


class MLP(nn.Module):
    recompute = True  # see `recomputed`

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.ffn_size, bias=config.mlp_bias)
        self.dense_4h_to_h = nn.Linear(config.ffn_size, config.hidden_size, bias=config.mlp_bias)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dense_h_to_4h(x)
        activated = self.activation(hidden)
        with recomputed(activated, self.activation, hidden, self.recompute):
            return cast(Tensor, self.dense_4h_to_h(activated))


class Block(nn.Module):
    recompute = True  # see `recomputed`

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.parallel = config.use_parallel_residual
        _, self.dropout, _ = config.dropout
        self.input_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.post_attention_layernorm = (
            None if config.shared_layer_norm else nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        )
        self.attention = Attention(config, layer)
        self.mlp = MLP(config)
        # Residual seams, where a tensor-parallel plan reduces once for both branches (design D4): the gradient of their
        # input, and the sum of their outputs.
        self.branch_input, self.branch_sum = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor, context: Context) -> Tensor:
        read = self.branch_input(x)
        normed = self.input_layernorm(read)
        with recomputed(normed, self.input_layernorm, read, self.recompute):
            attended = dropped(self.attention(normed, context), self.dropout, self.training)
            if self.parallel and self.post_attention_layernorm is None:
                fed = dropped(self.mlp(normed), self.dropout, self.training)
                return x + cast(Tensor, self.branch_sum(fed + attended))
        assert self.post_attention_layernorm is not None
        if not self.parallel:
            x = x + attended
            read = self.branch_input(x)
        normed = self.post_attention_layernorm(read)
        with recomputed(normed, self.post_attention_layernorm, read, self.recompute):
            fed = dropped(self.mlp(normed), self.dropout, self.training)
        return x + (cast(Tensor, self.branch_sum(fed + attended)) if self.parallel else fed)


class GPTNeoX(nn.Module):
    """The language model. Build it anywhere (also on the meta device), then `initialize` it or load weights into it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_in = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.position_embedding == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.embed_out = nn.Linear(config.hidden_size, config.vocab_size, bias=config.head_bias)
        self.masks = attention_masks  # a seam: a process of context parallelism has a part of the row
        self.tie()

    @property
    def heads(self) -> int:
        """Attention heads of this process, where the model is split over several."""
        block = cast(Block, self.layers[0])
        return block.attention.query_key_value.out_features // (3 * self.config.head_dim)

    def prune_to_stage(self, layers: range) -> None:
        """Keep the modules of the pipeline stage that holds `layers`; parameters keep their names.

        The embedding belongs to the first stage, final norm and head to the last one. The forward pass then takes the
        hidden states [B, T, C] of the stage before in place of tokens, and returns its own.
        """
        count = self.config.num_hidden_layers
        for layer in range(count):
            if layer not in layers:
                delattr(self.layers, str(layer))  # unlike del layers[i] this renumbers none
        absent = ["embed_in", "embed_positions"] if layers.start > 0 else []
        absent += ["final_layer_norm", "embed_out"] if layers.stop < count else []
        for name in absent:
            if hasattr(self, name):
                setattr(self, name, None)

    def tie(self) -> None:
        """Make the head share the embedding's weight where the config says so; `to_empty` parts the two."""
        if self.config.tie_word_embeddings and self.embed_out.weight is not self.embed_in.weight:
            self.embed_out.weight = self.embed_in.weight

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        segments: Tensor | None = None,
        head: bool = True,
    ) -> Tensor:
        """Logits [B, T, V] for tokens [B, T], or with `head=False` the final hidden states [B, T, C].

        positions [B, T] default to 0 .. T-1. With a cache the tokens are one packed row [1, N]: the cache says which
        sequence each continues, keeps its keys and values and attends to what is there. segments [B, T] numbers the
        documents of a packed row: attention stays inside one. Cache and segments exclude each other.

        Raises ValueError for a sequence beyond the model's context.
        """
        assert cache is None or segments is None, "a cache has sequences of its own"
        config = self.config
        longest, limit = cache.extent if cache else tokens.shape[1], config.max_position_embeddings
        if longest > limit:
            raise ValueError(
                f"a sequence of {longest} tokens exceeds this model's context of {limit}: "
                f"shorten the prompt, or train with a larger model.max_position_embeddings"
            )
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape[0], -1)
        x = tokens if self.embed_in is None else self.embed(tokens, positions)
        rotation = None
        if config.rotary_dim:
            cos, sin = rotary_angles(config, positions, cached=cache is not None)
            rotation = cos.to(x.dtype), sin.to(x.dtype)
        mask, local_mask = (None, None) if cache else self.masks(config, positions, segments)
        context = Context(rotation, mask, local_mask, cache)
        for layer in self.layers:
            x = layer(x, context)
        if self.final_layer_norm is not None:
            x = self.final_layer_norm(x)
        return cast(Tensor, self.embed_out(x)) if head else x

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Embed tokens: the input [B, T, C] of the first layer."""
        x = self.embed_in(tokens)
        if self.config.position_embedding == "learned":
            x = x + self.embed_positions(positions)
        return dropped(x, self.config.dropout[0], self.training)

    @torch.no_grad()
    def initialize(self, seed: int = 1234) -> "GPTNeoX":
        """Fill every parameter with its `initial_value`."""
        self.tie()
        for name, parameter in self.named_parameters():
            parameter.copy_(initial_value(self.config, seed, name, parameter.shape, parameter.device))
        return self


def initial_value(config: ModelConfig, seed: int, name: str, shape: torch.Size, device: torch.device) -> Tensor:
    """The value, float32, that parameter `name` starts with: a function of (seed, name) alone, whatever the layout.

    small_init: N(0, 2 / (5 C)) (arXiv 1910.05895), residual outputs N(0, (2 / (L sqrt(C)))^2) (wang_init);
    normal: N(0, initializer_range^2), residual outputs divided by sqrt(2 L). Norms start at one, biases at zero.
    Under muP these are of the model of the base width, and `neox.model.mup` says how they follow the width.
    """
    if name.endswith("bias"):
        return torch.zeros(shape, device=device)
    if "norm" in name:
        return torch.full(shape, scaling(config, name).std, device=device)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little"))
    return torch.empty(shape, device=device).normal_(std=init_std(config, name), generator=generator)


def init_std(config: ModelConfig, name: str) -> float:
    """The standard deviation that `initial_value` draws the parameter `name` with."""
    width, factor = config.mup_base_width or config.hidden_size, scaling(config, name).std
    residual_output = name.endswith(("attention.dense.weight", "mlp.dense_4h_to_h.weight"))
    if config.init_method == "normal":
        scale = math.sqrt(2 * config.num_hidden_layers) if residual_output else 1.0
        return factor * config.initializer_range / scale
    if residual_output:
        return factor * 2 / (config.num_hidden_layers * math.sqrt(width))
    return factor * math.sqrt(2 / (5 * width))


def attention_masks(
    config: ModelConfig, positions: Tensor, segments: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Boolean masks [B, 1, T, T], true where a query sees a key: for global layers and for layers with a local window.

    None stands for plain causal attention, which has a faster kernel. Query i of a local layer sees keys j with
    i - window < j <= i (GPT-Neo).
    """
    T = positions.shape[1]
    window = config.local_window if config.local_layers and config.local_window < T else 0
    if segments is None and not window:
        return None, None
    # The order inside the row decides; positions may restart at a document's start.
    order = torch.arange(T, device=positions.device)
    distance = (order[:, None] - order[None])[None]  # [1, T, T]
    mask = distance >= 0
    if segments is not None:
        mask = mask & (segments[:, :, None] == segments[:, None, :])
    local_mask = (mask & (distance < window))[:, None] if window else mask[:, None]
    return (None if segments is None else mask[:, None]), local_mask

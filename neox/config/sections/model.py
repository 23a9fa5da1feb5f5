"""The shape of the model."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from neox.config.options import Section
from neox.config.sections import Fraction, Ints, NotNegative, OptionalFloat, OptionalInt, Positive


class ModelConfig(Section):
    """Shape of the decoder, in Hugging Face's GPTNeoX names, with flags for relatives."""

    model_type: Literal["gpt_neox", "gptj", "gpt_neo"] = "gpt_neox"
    """Family whose parameter names and file layout a Hugging Face export uses."""
    vocab_size: int = Field(default=8192, gt=0, lt=2**31)
    """Rows of the embedding and of the head, padding rows included."""
    hidden_size: int = Field(default=256, gt=0, le=2**24)
    """Width of the residual stream."""
    num_hidden_layers: int = Field(default=4, gt=0, le=10_000)
    """Number of blocks."""
    num_attention_heads: Positive = 4
    """Attention heads per block, a divisor of hidden_size."""
    intermediate_size: OptionalInt = Field(default=None, gt=0)
    """Width inside the MLP; none = 4 * hidden_size."""
    hidden_act: Literal["gelu", "gelu_fast", "gelu_new", "gelu_pytorch_tanh"] = "gelu"
    """Activation of the MLP: gelu is exact (erf); the other three name one tanh approximation."""
    max_position_embeddings: int = Field(default=2048, gt=0, lt=2**31)
    """Longest context, in tokens."""
    rotary_pct: float = Field(default=0.25, ge=0, le=1)
    """Fraction of each head's dims that rotary embedding rotates."""
    rotary_emb_base: float = Field(default=10000.0, gt=0)
    """Base of the geometric sequence of rotary frequencies."""
    rope_scaling: Literal["none", "linear", "dynamic", "yarn"] = "none"
    """Scaling of rotary positions for a context beyond the trained one, as in transformers; dynamic = NTK-aware."""
    rope_factor: float = Field(default=1.0, ge=1)
    """Factor by which rope_scaling stretches the context."""
    rope_original_context: OptionalInt = Field(default=None, gt=0)
    """Context in tokens before rope_scaling; none = max_position_embeddings / rope_factor."""
    rope_attention_factor: OptionalFloat = Field(default=None, gt=0)
    """Factor on rotated queries and keys with rope_scaling = "yarn"; none = 0.1 ln(rope_factor) + 1."""
    rope_beta_fast: float = Field(default=32.0, gt=0)
    """Turns within the original context from which yarn keeps a rotary frequency."""
    rope_beta_slow: float = Field(default=1.0, gt=0)
    """Turns within the original context below which yarn divides a rotary frequency by rope_factor."""
    layer_norm_eps: float = Field(default=1e-5, gt=0)
    """Term added to the variance in every layer norm."""
    use_parallel_residual: bool = True
    """Residual: true = x + attention(ln1(x)) + mlp(ln2(x)); false = attention, then MLP on its sum."""
    tie_word_embeddings: bool = False
    """Use the embedding's weight in the head too."""
    init_method: Literal["small_init", "normal"] = "small_init"
    """Standard deviation of initial weights. small_init: sqrt(2/(5h)), residual outputs 2/(L sqrt(h)). normal:
    initializer_range, residual outputs scaled by 1/sqrt(2L)."""
    initializer_range: float = Field(default=0.02, gt=0)
    """Standard deviation of initial weights with init_method = "normal"."""
    mup_base_width: OptionalInt = Field(default=None, gt=0)
    """muP: width of the base model whose tuned learning rate and initialization carry over to this width; none =
    standard parametrization. See docs/width_transfer.md."""
    position_embedding: Literal["rotary", "learned"] = "rotary"
    """Position information: rotary = rotated queries and keys; learned = a table added to the embedding."""
    shared_layer_norm: bool = False
    """Let attention and MLP read one layer norm, as in GPT-J, in place of two."""
    qkv_bias: bool = True
    """Add a bias to the fused query-key-value projection."""
    dense_bias: bool = True
    """Add a bias to the attention's output projection."""
    mlp_bias: bool = True
    """Add biases to both MLP projections."""
    head_bias: bool = False
    """Add a bias to the output head."""
    attention_scale: OptionalFloat = Field(default=None, gt=0)
    """Factor of the attention scores; none = head_dim ** -0.5."""
    local_window: NotNegative = 0
    """Positions that local layers attend to: position i sees i - local_window < j <= i."""
    local_layers: Ints = ()
    """Numbers, from 0, of the layers with local attention."""
    hidden_dropout: Fraction = 0.0
    """Dropout in training of each branch's output before it joins the residual stream."""
    attention_dropout: Fraction = 0.0
    """Dropout in training of the attention's probabilities."""
    embedding_dropout: OptionalFloat = Field(default=None, ge=0, lt=1)
    """Dropout in training of the embedding's output; none = hidden_dropout."""

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        """Rotated dims per head, rounded down as in Hugging Face; 0 without rotary."""
        return int(self.head_dim * self.rotary_pct) if self.position_embedding == "rotary" else 0

    @property
    def rope_context(self) -> int:
        """Context in tokens before rope_scaling stretched it."""
        return self.rope_original_context or max(1, int(self.max_position_embeddings / self.rope_factor))

    @property
    def rope_attention(self) -> float:
        """Factor on rotated queries and keys under yarn (arXiv 2309.00071, section 3.4)."""
        return self.rope_attention_factor or 0.1 * math.log(self.rope_factor) + 1

    @property
    def ffn_size(self) -> int:
        """Width inside the MLP."""
        return self.intermediate_size or 4 * self.hidden_size

    @property
    def dropout(self) -> tuple[float, float, float]:
        """Dropout of embedding, branch outputs and attention probabilities."""
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
        if self.rope_scaling != "none" and not self.rotary_dim:
            raise ValueError(f"rope_scaling: {self.rope_scaling!r} has no rotary positions to scale in this model")
        if self.rope_scaling == "dynamic" and self.rotary_dim < 4:
            raise ValueError(f"rope_scaling: dynamic needs at least 4 rotary dims per head, not {self.rotary_dim}")
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

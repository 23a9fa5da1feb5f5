"""Rotary positions (arXiv 2104.09864), and their scaling for contexts beyond the trained one.

Shapes: B batch, T time, H heads, D head_dim, R rotary dims. Angle i of position p is p * f_i, f_i = base ** (-2 i / R).

    linear   f_i / factor (arXiv 2306.15595)
    dynamic  base * (factor * L / original - (factor - 1)) ** (R / (R - 2)) in place of base, for a length L > original
    yarn     a blend of f_i and f_i / factor by the turns that f_i makes within the original context, and a factor on
             cos and sin (arXiv 2309.00071)

These are the definitions of transformers' `modeling_rope_utils`.
"""

import math

import torch
from torch import Tensor

from neox.config import ModelConfig


def rotary_angles(config: ModelConfig, positions: Tensor, cached: bool = False) -> tuple[Tensor, Tensor]:
    """Compute cos and sin [3, B, 1, T, R / 2] in float32 for positions [B, T].

    The axis of 3 is q, k, v: values turn by the angle zero, so that one pass over the fused projection rotates it.
    With dynamic scaling the length is the longest of the positions; `cached` takes each position's own, since cached
    keys keep the angle that they were given.
    """
    exponents = torch.arange(0, config.rotary_dim, 2, device=positions.device, dtype=torch.float32) / config.rotary_dim
    places, factor = positions[:, None, :, None].float(), 1.0
    if config.rope_scaling == "none":
        angles = places / config.rotary_emb_base**exponents
    elif config.rope_scaling == "linear":
        angles = places * (1 / config.rotary_emb_base**exponents / config.rope_factor)
    elif config.rope_scaling == "dynamic":
        angles = places * (1 / _dynamic_base(config, positions, cached) ** exponents)
    else:
        angles, factor = places * _yarn_frequencies(config, exponents), config.rope_attention
    turned = torch.stack((angles, angles, torch.zeros_like(angles)))
    if factor == 1:
        return turned.cos(), turned.sin()
    factors = torch.tensor([factor, factor, 1.0], device=positions.device).view(3, 1, 1, 1, 1)
    return turned.cos() * factors, turned.sin() * factors


def _dynamic_base(config: ModelConfig, positions: Tensor, cached: bool) -> Tensor:
    """Base [B or 1, 1, T or 1, 1] of dynamic scaling, without waiting for the device."""
    original, factor = config.rope_context, config.rope_factor
    length = (positions[:, None, :, None] if cached else positions.max().view(1, 1, 1, 1)) + 1
    stretched = factor * length.clamp(min=original) / original - (factor - 1)
    power = config.rotary_dim / (config.rotary_dim - 2)
    return config.rotary_emb_base * stretched**power


def _yarn_frequencies(config: ModelConfig, exponents: Tensor) -> Tensor:
    """Frequencies [R / 2]: those that turn `rope_beta_fast` times within the original context stay as they are."""
    base, dims = config.rotary_emb_base, config.rotary_dim

    def dim_of(turns: float) -> float:
        """The dim whose frequency makes so many turns within the original context."""
        return dims * math.log(config.rope_context / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(dim_of(config.rope_beta_fast)), 0)
    high = min(math.ceil(dim_of(config.rope_beta_slow)), dims - 1)
    numbers = torch.arange(dims // 2, device=exponents.device, dtype=torch.float32)
    kept = 1 - ((numbers - low) / ((high - low) or 0.001)).clamp(0, 1)
    wavelengths = base**exponents
    return 1 / (config.rope_factor * wavelengths) * (1 - kept) + 1 / wavelengths * kept


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first R dims of x [3, B, H, T, D], taken as two halves, by the given angles; the rest passes through.

    Writing q, k and v into one new tensor lets the projection's own output go: a third less is kept for the backward.
    """
    half = cos.shape[-1]
    first, second, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)

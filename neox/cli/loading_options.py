"""Options of the verbs that load a model."""

from __future__ import annotations

from neox.config import Section


class LoadingOptions(Section):
    """Options of loading a model."""

    weights: str = "auto"
    """Form of the weights: auto loses nothing; torch = layers of torch; fp16, bf16, int8, int4, float8 and more: see
    docs/weights.md. int8 and int4 change the output."""
    device: str = "auto"
    """Device: cpu, cuda or mps; auto = an accelerator if there is one."""
    dtype: str | None = None
    """Type of the weights and products: fp32, bf16 or fp16; by default fp32 on a CPU, the stored type elsewhere."""

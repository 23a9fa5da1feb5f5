"""Write a model as a Hugging Face folder: config, safetensors, tokenizer.

neox convert MODEL out=FOLDER [dtype=fp32] [shard_size=5GB]

MODEL is a run directory (its newest step), one of its step folders, a Hugging Face folder or a
hub id. Weights are copied shard by shard: memory holds one file of shard_size.

Examples:
  neox convert runs/mine out=exported
  neox convert runs/mine/step_00001000 out=exported dtype=bf16 shard_size=500MB
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from neox.cli.verb import UsageError, one_model, read_all
from neox.config import Section


class ConvertOptions(Section):
    """Options of `neox convert`."""

    out: str = Field(default="", title="FOLDER")
    """Folder to write."""
    dtype: str | None = None
    """Type of the written weights: fp32, bf16 or fp16; fp32 by default."""
    shard_size: str = "5GB"
    """Largest size of a safetensors file, such as 500MB."""
    overwrite: bool = False
    """Replace a model that FOLDER holds; false refuses."""


OPTIONS = ConvertOptions


def run(targets: list[str], options: list[str]) -> None:
    """Run the verb."""
    chosen, model = read_all("convert", ConvertOptions, options), one_model("convert", targets)
    if not chosen.out:
        raise UsageError("convert needs out=FOLDER")
    from neox.checkpoint.export import convert, parse_bytes
    from neox.checkpoint.steps import folder_kind

    if folder_kind(Path(chosen.out)) not in ("absent", "empty") and not chosen.overwrite:
        raise ValueError(f"{chosen.out}: exists already: choose another out=, or set overwrite=true to replace a model")
    print(f"{chosen.out}: {convert(model, chosen.out, chosen.dtype, parse_bytes(chosen.shard_size)):,} parameters")

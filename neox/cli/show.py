"""Show a config and its cost: parameters, FLOPs, memory, plan for GPUs.

neox show [PRESET] [FILE.toml ...] [key=value ...] [gpu=NAME] [gpus=N] [network=GB/s]
neox show config_schema=FILE.json

Without anything, lists the presets. Later files win over earlier ones, key=value over files.
Where parallel.* asks for several processes, a dry run of each pipeline stage takes about
a minute and no GPU: memory, bytes sent, and with gpu= the time of a step, an estimate.

Examples:
  neox show
  neox show neox-20b
  neox show pythia-160m train.micro_batch_size=8 dtype=bf16
  neox show recipes/neox-20b.toml gpu=a100-40gb
  neox show pythia-6.9b dtype=bf16 gpus=16 gpu=h100
  neox show config_schema=neox.schema.json
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from neox.cli.verb import UsageError, read_options, resolve
from neox.config import Section
from neox.config.sections import OptionalInt


class ShowOptions(Section):
    """Options of `neox show` besides those of the config."""

    gpu: str | None = Field(default=None, title="NAME")
    """GPU to plan for: a100-40gb, a100-80gb, h100 or h200."""
    gpus: OptionalInt = Field(default=None, gt=0)
    """Number of GPUs: proposes layouts on them, best first, and plans the best one."""
    network: float | None = Field(default=None, gt=0, title="GB/s")
    """Bandwidth from a GPU to other hosts in GB/s, one way; by default that of the vendor's hosts."""
    config_schema: str | None = Field(default=None, title="FILE.json")
    """JSON schema of run files to write, for completion and checks in editors."""


OPTIONS = ShowOptions


def run(targets: list[str], options: list[str]) -> None:
    """Run the verb."""
    from neox import planning

    if not targets and not options:
        print(planning.table())
        return
    chosen, rest = read_options(ShowOptions, options)
    if chosen.gpu is None and (others := chosen.model_fields_set - {"config_schema"}):
        raise UsageError(f"{' and '.join(sorted(others))} also needs gpu=, the name of the GPU")
    if chosen.config_schema is not None:
        from neox.cli.reference import json_schema
        from neox.system.files import write_atomic

        write_atomic(Path(chosen.config_schema), json_schema().encode())
        print(
            f"{chosen.config_schema}: written; the first line of a run file names it: #:schema {chosen.config_schema}"
        )
        return
    config = resolve(targets, rest)
    print(planning.show(config))
    if chosen.gpu is None and config.parallel.processes == 1:
        return
    from neox.planning.hardware import gpu
    from neox.planning.propose import propose
    from neox.planning.run_plan import plan

    device = gpu(chosen.gpu, chosen.network) if chosen.gpu else None
    if chosen.gpu and device and chosen.gpus:
        print("", propose(config, chosen.gpus, chosen.gpu, device), sep="\n")
    else:
        print("", plan(config, chosen.gpu, device), sep="\n")

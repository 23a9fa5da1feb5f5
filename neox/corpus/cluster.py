"""The shards of `prepare` as tasks of datatrove's executors: one machine, SLURM or Ray.

    begin(sources, out, tokenizer)                                   # where all hosts see the sources and the output
    SlurmPipelineExecutor([TokenizeShards(out)], tasks=500, ...).run()
    neox prepare SOURCE... out=OUT tokenizer=...                     # makes what is missing still, and joins

A part is a file with a marker (see `plan`), so a task that is killed, or run twice, does no harm, and the output does
not depend on the number of tasks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from neox.config import PrepareConfig
from neox.corpus.encode import Backend
from neox.corpus.plan import Plan, ShardOutputs
from neox.corpus.preparation import settings_of
from neox.corpus.readers import ErrorPolicy, OnError, find_sources
from neox.corpus.worker import Work, write_shard
from neox.system.optional import optional
from neox.tokenizer import Tokenizer

PipelineStep: Any = optional("datatrove.pipeline.base", "neox.corpus.cluster", "cluster").PipelineStep


def begin(
    sources: Sequence[str | Path],
    out_prefix: str | Path,
    tokenizer: Tokenizer,
    options: PrepareConfig | None = None,
    **keywords: Any,
) -> int:
    """Write the plan of the tasks, or continue one; return its number of shards.

    Raises what `prepare` raises on its sources, on parts of other settings, and while another run holds the output.
    """
    options = options or PrepareConfig(**keywords)
    plan = Plan.of(find_sources(sources, options.text_key, options.on_error), settings_of(tokenizer, options))
    outputs = ShardOutputs(out_prefix)
    with outputs.locked():
        outputs.begin(plan, tokenizer, ErrorPolicy(options.on_error))
    return len(plan.shards)


class TokenizeShards(PipelineStep):
    """Tokenize every `world_size`-th shard, from shard `rank` on; complete ones are skipped."""

    name = "tokenize shards"
    type = "TOKENIZER"

    def __init__(self, out_prefix: str | Path, on_error: OnError = "fail", backend: Backend = "auto") -> None:
        super().__init__()
        self.out_prefix, self.on_error, self.backend = str(out_prefix), on_error, backend

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Tokenize this rank's shards; pass `data` on unchanged.

        Raises what `write_shard` raises, and ValueError where there is no plan.
        """
        yield from data or ()
        outputs = ShardOutputs(self.out_prefix)
        if not outputs.plan_file.exists():
            raise ValueError(f"{outputs.plan_file}: no such plan; call neox.corpus.cluster.begin first")
        with outputs.locked(shared=True):
            plan = Plan.read(outputs.plan_file)
            tokenizer = Tokenizer.from_file(outputs.folder / "tokenizer.json")
            work = Work.of(plan, tokenizer, self.backend)
            for shard in plan.shards[rank::world_size]:
                with self.track_time("shard"):
                    write_shard(outputs, work, shard, self.on_error, lambda done: None)
                self.stat_update("shards")
                self.stat_update("bytes", value=shard.size, unit="shard")

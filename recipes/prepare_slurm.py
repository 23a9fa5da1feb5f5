"""A corpus to tokens by SLURM: python recipes/prepare_slurm.py SOURCE OUT TOKENIZER [tasks=N] [partition=cpu]

All hosts see SOURCE (a folder, or a URL) and OUT. Each task makes its share of the parts; the same command sent again
makes only what is missing. When the jobs are done: neox prepare SOURCE out=OUT tokenizer=TOKENIZER joins the parts.
"""

import sys
from pathlib import Path

from datatrove.executor import SlurmPipelineExecutor

from neox.corpus.cluster import TokenizeShards, begin
from neox.tokenizer import Tokenizer

if __name__ == "__main__":
    source, out, tokenizer = sys.argv[1:4]
    options = dict(option.split("=", 1) for option in sys.argv[4:])
    shards = begin([source], out, Tokenizer.from_file(tokenizer))
    SlurmPipelineExecutor(
        pipeline=[TokenizeShards(out)],
        tasks=min(shards, int(options.get("tasks", 100))),
        time="12:00:00",
        partition=options.get("partition", "cpu"),
        cpus_per_task=1,
        mem_per_cpu_gb=2,
        job_name="neox-prepare",
        venv_path=str(Path(sys.prefix) / "bin" / "activate"),
        logging_dir=f"{out}.jobs",
    ).run()

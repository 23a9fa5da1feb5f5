"""Evaluate a model on tasks of lm-evaluation-harness, or of your own.

neox eval MODEL tasks=NAME[,NAME ...] [key=value ...]
neox eval MODEL pile=FILE [key=value ...]   bits per byte by component and group of the Pile

MODEL is a run directory, one of its step folders, a Hugging Face folder or a hub id (OWNER/MODEL,
OWNER/MODEL@REVISION), run by our engine; to compare with, hf:ID is any model of transformers in
lm-eval's own backend, lm-eval:BACKEND any of its backends, an OpenAI-compatible API for one.

With steps=, each checkpoint of a run or each revision stepN of a hub id is evaluated into
OUT/step_N, and each task's curve over the steps drawn: OUT/curves.png, .html and .json.
Started by torchrun, processes share the requests; their number does not change the results.

Every answer is kept in OUT/answers.jsonl as it comes: interrupted or killed, the same command
asks the rest; finished, it asks nothing. OUT also gets results.json (lm-eval's schema),
results.md and results.html; those of other tasks or options are replaced with overwrite=true only.

Examples:
  neox eval EleutherAI/pythia-160m tasks=lambada_openai,arc_easy
  neox eval runs/first tasks=sums include_path=tasks limit=100
  neox eval runs/first tasks=sums include_path=tasks watch=true device=cpu
  neox eval EleutherAI/pythia-160m pile=pile/test.jsonl.zst limit=1000
  neox eval EleutherAI/pythia-160m tasks=lambada_openai steps=1000,16000,143000
  torchrun --standalone --nproc-per-node 8 -m neox eval runs/first tasks=mmlu
  neox eval hf:KoboldAI/fairseq-dense-6.7B tasks=lambada_openai dtype=bf16
  neox eval lm-eval:local-completions tasks=arc_easy \\
    model_args=model=EleutherAI/pythia-160m,base_url=http://localhost:8000/v1/completions
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from pydantic import Field

from neox.cli.loading_options import LoadingOptions
from neox.cli.verb import UsageError, one_model, read_all
from neox.config.sections import Names
from neox.config.sections.usage import EvalTasksConfig


class EvalOptions(EvalTasksConfig, LoadingOptions):
    """Options of `neox eval`."""

    out: str = Field(default="", title="DIR")
    """Folder of results and answers; by default evals/MODEL/TASKS."""
    overwrite: bool = False
    """Replace results of other tasks or options in DIR; false refuses. The answers in it are kept and reused."""
    pile: str | None = Field(default=None, title="FILE")
    """File of the Pile, such as test.jsonl.zst, in place of tasks; writes OUT/bits_per_byte.md and .json."""
    steps: Names = Field(default=(), title="STEPS")
    """Checkpoints of a run, or revisions of a hub id, to evaluate: 1000,2000, or all."""
    watch: bool = False
    """Evaluate each checkpoint of a running run as it comes; ends with the run."""
    model_args: str = Field(default="", title="A=B,C=D")
    """Arguments of a backend of lm-evaluation-harness (hf:, lm-eval:), as it writes them."""


OPTIONS = EvalOptions


def run(targets: list[str], options: list[str]) -> None:
    """Run the verb."""
    chosen, model = read_all("eval", EvalOptions, options), one_model("eval", targets)
    what = "pile" if chosen.pile is not None else ",".join(chosen.tasks)
    named = [re.sub(r"[^\w.,@-]+", "__", name.strip("./"))[:100] for name in (model, what)]
    out = Path(chosen.out) if chosen.out else Path("evals", *named)
    loading = {key: getattr(chosen, key) for key in LoadingOptions.model_fields}
    _check_folder(out)
    if chosen.pile is not None:
        _pile(model, chosen, loading, out)
        return
    if not chosen.tasks:
        raise UsageError("eval needs tasks=NAME, such as tasks=lambada_openai,arc_easy")
    steps = ",".join(chosen.steps)
    if not re.fullmatch(r"|all|\d+(,\d+)*", steps):
        raise UsageError(f"steps={steps}: must be all, or steps as 1000,2000")
    if chosen.watch and steps:
        raise UsageError("give steps= for the checkpoints that are there or watch=true for those that come, not both")

    from neox.evaluation import evaluate
    from neox.evaluation.curves import checkpoints, evaluate_steps, follow_checkpoints
    from neox.evaluation.report import markdown
    from neox.system.device import local_device
    from neox.system.processes import joined_processes

    try:
        with joined_processes(chosen.device) as processes:
            if processes.world > 1:
                loading["device"] = str(local_device(chosen.device))
                if chosen.watch:
                    raise UsageError("watch=true is for one process: leave torchrun away")
            arguments = {**chosen.asked, **loading, "processes": processes, "progress": not processes.rank}
            arguments["model_args"] = chosen.model_args
            if steps or chosen.watch:
                numbers = None if steps in ("", "all") else [int(step) for step in chosen.steps]
                models = follow_checkpoints(model) if chosen.watch else checkpoints(model, numbers)
                curves = evaluate_steps(models, out, **arguments)
            else:
                results = evaluate(model, out=out, overwrite=chosen.overwrite, **arguments)
    except KeyboardInterrupt:
        if out.is_dir():
            print(f"neox: interrupted; the same command asks what {out} does not answer yet", file=sys.stderr)
        raise
    if processes.rank:  # the first one speaks for all
        return
    if steps or chosen.watch:
        for name, points in curves.items():
            print(f"{name}: " + ", ".join(f"{step}: {value:.4f}" for step, value, _ in points))
        print(f"{out}: curves.png, curves.html, curves.json")
        return
    print(markdown(results), end="")
    print(f"{out}: results.json, results.md, results.html")


def _check_folder(out: Path) -> None:
    """Raise ValueError where the folder holds something else than an evaluation."""
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    ours = {"answers.jsonl", "results.json", "curves.json", "bits_per_byte.json"}
    foreign = [name for name in names if not name.startswith((".", "step_"))]
    if out.is_file() or (foreign and not names & ours):
        raise ValueError(f"{out}: holds files that no evaluation wrote: choose another out=, a new folder")


def _pile(source: str, chosen: EvalOptions, loading: dict[str, str], out: Path) -> None:
    """Bits per byte on a file of the Pile."""
    if others := sorted(chosen.model_fields_set - {"pile", "limit", "out", "overwrite", *loading}):
        raise UsageError(
            f"pile= does not go with {', '.join(others)}; its options are limit, out, {', '.join(loading)}"
        )
    if chosen.limit is not None and chosen.limit != int(chosen.limit):
        raise UsageError(f"limit={chosen.limit}: pile= takes a number of documents")
    from neox.corpus.pile.statistics import likelihood_page
    from neox.evaluation.bits_per_byte import score_files
    from neox.generate.loading import load_engine

    assert chosen.pile is not None
    engine = load_engine(source, **loading)
    if engine.tokenizer is None:
        raise ValueError(f"{source}: has no tokenizer: put its tokenizer.json into the folder")
    model = engine.model
    scores = score_files(
        lambda rows: model(rows.to(engine.weight.device)),
        engine.tokenizer,
        source,
        chosen.pile,
        out,
        model.config.max_position_embeddings,
        None if chosen.limit is None else int(chosen.limit),
    )
    print(likelihood_page(scores, source), end="")
    print(f"{out}: bits_per_byte.md, bits_per_byte.json")

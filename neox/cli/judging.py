"""The verb that says how good a model is: eval."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from neox.cli.verb import UsageError

if TYPE_CHECKING:
    from neox.config import EvalConfig

OWN = ("out", "device", "dtype", "weights", "model_args")
LOADING = ("device", "dtype", "weights")


def eval_(targets: list[str], options: list[str]) -> None:
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
    results.md and results.html, which the next evaluation with this out= replaces.

    Options:
      tasks=NAMES        tasks, groups or tags of lm-eval, or YAML files of your own
      include_path=DIR   a folder of YAML files with tasks of your own
      limit=N            the first N documents of each task; 0.1: a tenth of them
      num_fewshot=N      examples before each question; default: as many as the task says
      seed=N             of examples and of everything else drawn; default: lm-eval's seeds
      log_samples=true   also write OUT/samples_TASK.jsonl: documents, prompts, answers
      out=DIR            default: evals/MODEL
      pile=FILE          in place of tasks: a file of the Pile, such as test.jsonl.zst; to
                         OUT/bits_per_byte.md and .json; limit=N documents
      steps=all          every checkpoint of a run; or those of these steps: steps=1000,2000
      watch=true         each checkpoint of a run that is going on, as it comes; ends with the run
      weights=auto       as in `neox generate`; auto loses nothing
      device=auto        cpu, cuda or mps
      dtype=fp32         fp32, bf16 or fp16; default: fp32 on a CPU, the stored type elsewhere
      batch_size=8       of hf: and lm-eval: backends; none: as many as fit
      model_args=A=B,C=D arguments of hf: and lm-eval: backends, as lm-eval writes them

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
    from neox.config import EvalConfig, load_config
    from neox.config.options import parse_override

    own: dict[str, str] = {}
    overrides = []
    for option in options:
        key, _, value = option.partition("=")
        if key in (*OWN, "steps", "watch", "pile"):
            own[key] = value
            continue
        full = key if "." in key else f"eval.{key}"
        section, name, *_ = parse_override(f"{full}={value}")
        if section != "eval" or name not in EvalConfig().asked:
            raise UsageError(f"eval has no option {key}, see `neox eval --help`")
        overrides.append(f"{full}={value}")
    if len(targets) != 1:
        raise UsageError("eval needs one MODEL")
    config = load_config(overrides=overrides).eval
    out = Path(own.pop("out", "") or Path("evals") / re.sub(r"[^\w.@-]+", "__", targets[0].strip("./")))
    if "pile" in own:
        _pile(targets[0], own, [option.partition("=")[0].removeprefix("eval.") for option in overrides], config, out)
        return
    if not config.tasks:
        raise UsageError("eval needs tasks=NAME, such as tasks=lambada_openai,arc_easy")

    steps, watch = own.pop("steps", ""), own.pop("watch", "false")
    if not re.fullmatch(r"|all|\d+(,\d+)*", steps):
        raise UsageError(f"steps={steps}: must be all, or steps as 1000,2000")
    if watch not in ("true", "false"):
        raise UsageError(f"watch={watch}: must be true or false")
    if watch == "true" and steps:
        raise UsageError("give steps= for the checkpoints that are there or watch=true for those that come, not both")

    from neox.evaluation import evaluate
    from neox.evaluation.curves import checkpoints, coming, evaluate_steps
    from neox.evaluation.report import markdown
    from neox.system.device import local_device
    from neox.system.processes import joined_processes

    try:
        with joined_processes(own.get("device", "auto")) as processes:
            if processes.world > 1:
                own["device"] = str(local_device(own.get("device", "auto")))
                if watch == "true":
                    raise UsageError("watch=true is for one process: leave torchrun away")
            wanted = {**config.asked, **own, "processes": processes, "progress": not processes.rank}
            if steps or watch == "true":
                numbers = None if steps in ("", "all") else [int(step) for step in steps.split(",")]
                found = coming(targets[0]) if watch == "true" else checkpoints(targets[0], numbers)
                curves = evaluate_steps(found, out, **wanted)
            else:
                results = evaluate(targets[0], out=out, **wanted)
    except KeyboardInterrupt:
        if out.is_dir():
            print(f"neox: interrupted; the same command asks what {out} does not answer yet", file=sys.stderr)
        raise
    if processes.rank:  # the first one speaks for all
        return
    if steps or watch == "true":
        for name, points in curves.items():
            print(f"{name}: " + ", ".join(f"{step}: {value:.4f}" for step, value, _ in points))
        print(f"{out}: curves.png, curves.html, curves.json")
        return
    print(markdown(results), end="")
    print(f"{out}: results.json, results.md, results.html")


def _pile(target: str, own: dict[str, str], asked: list[str], config: EvalConfig, out: Path) -> None:
    """Bits per byte on a file of the Pile."""
    if strange := sorted({*own, *asked} - {"pile", "limit", *LOADING}):
        raise UsageError(
            f"pile= does not go with {', '.join(strange)}; its options are limit, out, {', '.join(LOADING)}"
        )
    if config.limit is not None and config.limit != int(config.limit):
        raise UsageError(f"limit={config.limit}: pile= takes a number of documents")
    from neox.corpus.pile.statistics import likelihood_page
    from neox.evaluation.bits_per_byte import score_files
    from neox.generate.loading import load_engine

    engine = load_engine(target, **{key: own[key] for key in LOADING if key in own})
    if engine.tokenizer is None:
        raise ValueError(f"{target}: has no tokenizer: put its tokenizer.json into the folder")
    model = engine.model
    limit = None if config.limit is None else int(config.limit)
    found = score_files(
        lambda rows: model(rows.to(engine.weight.device)),
        engine.tokenizer,
        target,
        own["pile"],
        out,
        model.config.max_position_embeddings,
        limit,
    )
    print(likelihood_page(found, target), end="")
    print(f"{out}: bits_per_byte.md, bits_per_byte.json")

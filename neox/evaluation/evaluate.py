"""Evaluate a model on tasks of lm-evaluation-harness, cache every answer, and write the results."""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.loggers.evaluation_tracker import GeneralConfigTracker

from neox.config import EvalConfig
from neox.evaluation import report
from neox.evaluation.adapter import EngineLM
from neox.evaluation.answers import AnswerCache, cached_answers
from neox.evaluation.asked import describe, is_answered, write_note
from neox.evaluation.backends import load_model
from neox.evaluation.sharing import distributed
from neox.evaluation.tasks import load_tasks
from neox.generate import Engine
from neox.system.console import one_line
from neox.system.processes import Processes

ANSWERS = "answers.jsonl"
ALONE = Processes()


def evaluate(
    model: str | Path | Engine,
    tasks: Sequence[str] | str,
    out: str | Path | None = None,
    progress: bool = True,
    device: str = "auto",
    dtype: str | None = None,
    weights: str = "auto",
    model_args: str = "",
    processes: Processes = ALONE,
    overwrite: bool = True,
    **options: Any,
) -> report.Results:
    """Evaluate `model` on `tasks`; returns the results as `lm_eval.simple_evaluate` does.

    `model`, `device`, `dtype`, `weights` and `model_args` are described at `backends.load_model`; `options` are those
    of the config's section `eval`. With `out`, a folder, every answer is cached in OUT/answers.jsonl at once and not
    computed again; at the end results.json, .md, .html and, on request, samples are written.

    Results in `out` of another model, other documents or other options are replaced; without `overwrite` refused.

    With several `processes`, all of them call this function. Each answers its share of the requests and caches the
    answers; rank 0 writes the results, the others return {}.

    Raises ValueError, one line, for tasks and models that cannot be loaded, and for a backend that fails.
    """
    config = EvalConfig(**{"tasks": tasks, **options})
    if not config.tasks:
        raise ValueError("eval.tasks: name at least one task, such as tasks=lambada_openai,arc_easy")
    batch_size = config.batch_size or "auto"
    loaded, manager = load_tasks(config.tasks, config.include_path)
    backend, identity, named = load_model(model, device, dtype, weights, model_args, batch_size, progress)
    if processes.world > 1 and not isinstance(backend, EngineLM):
        raise ValueError(f"{model}: several processes share the requests of our own engine only: leave torchrun away")
    told = {key: value for key, value in config.asked.items() if key not in ("log_samples", "batch_size")}
    asked = describe(json.dumps(named, default=str), identity, loaded, told)
    kept = None if out is None or overwrite else Path(out)
    if kept and (kept / "results.json").is_file() and not is_answered(kept, asked):
        raise ValueError(
            f"{out}: holds results of another model, other tasks or other options: choose another out=, or set "
            "overwrite=true to replace them"
        )
    tracker = GeneralConfigTracker()
    tracker.log_experiment_args(named["model"], named["model_args"], None, None, True)
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    with ExitStack() as stack:
        answers: AnswerCache | None = None
        if out is not None:
            answers = stack.enter_context(AnswerCache(Path(out) / ANSWERS, identity))
            stack.enter_context(cached_answers(backend, answers))
        stack.enter_context(distributed(backend, processes))
        try:
            results: report.Results = lm_eval.simple_evaluate(
                model=backend,
                model_args=named["model_args"],
                tasks=loaded,
                task_manager=manager,
                num_fewshot=config.num_fewshot,
                batch_size=batch_size,
                limit=config.limit,
                log_samples=config.log_samples,
                **({} if config.seed is None else dict.fromkeys(seeds, config.seed)),
            )
        except Exception as error:
            if isinstance(backend, EngineLM):
                raise
            resume = f"; {answers.path} keeps the answers so far, the same command continues" if answers else ""
            raise ValueError(f"{model}: failed: {one_line(error)}{resume}") from error
    if processes.rank:
        return {}
    if not any(report.scores(results)):
        raise ValueError(
            f"{', '.join(config.tasks)}: nothing was measured: lm-eval knows none of the metrics in metric_list"
        )
    results["config"] |= named
    tracker.log_end_time()
    results |= {"task_hashes": report.task_hashes(results.get("samples") or {}), **asdict(tracker)}
    if out is not None:
        report.write(results, Path(out))
        write_note(Path(out), asked)
    return results

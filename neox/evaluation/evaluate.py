"""An evaluation: tasks asked of a model by lm-evaluation-harness, every answer kept, and what came of it."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.loggers.evaluation_tracker import GeneralConfigTracker

from neox.config import EvalConfig
from neox.corpus.readers.errors import one_line
from neox.evaluation import report
from neox.evaluation.adapter import EngineLM
from neox.evaluation.answers import Answers, remembered
from neox.evaluation.backends import load_model
from neox.evaluation.sharing import shared
from neox.evaluation.tasks import load_tasks
from neox.generate import Engine
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
    **options: Any,
) -> report.Results:
    """The results of `model` on `tasks`, as `lm_eval.simple_evaluate` returns and its result files hold them.

    `model`, `device`, `dtype`, `weights` and `model_args` are described at `backends.load_model`; `options` are those
    of the config's section `eval`. With `out`, a folder, every answer is kept in OUT/answers.jsonl as it comes, and
    what it holds already is not asked again; at the end results.json, .md, .html and, on request, samples are written.

    With several `processes`, all of which make this call, each asks its share and keeps the answers; the first one
    writes the results, and the others return nothing, {}.

    Raises ValueError, one line, for tasks and models that cannot be loaded, and for a backend that fails on the way.
    """
    config = EvalConfig(**{"tasks": tasks, **options})
    if not config.tasks:
        raise ValueError("eval.tasks: name at least one task, such as tasks=lambada_openai,arc_easy")
    batch_size = config.batch_size or "auto"
    found, manager = load_tasks(config.tasks, config.include_path)
    asked, identity, named = load_model(model, device, dtype, weights, model_args, batch_size, progress)
    if processes.world > 1 and not isinstance(asked, EngineLM):
        raise ValueError(f"{model}: several processes share the requests of our own engine only: leave torchrun away")
    tracker = GeneralConfigTracker()
    tracker.log_experiment_args(named["model"], named["model_args"], None, None, True)
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    with ExitStack() as stack:
        answers: Answers | None = None
        if out is not None:
            answers = stack.enter_context(Answers(Path(out) / ANSWERS, identity))
            stack.enter_context(remembered(asked, answers))
        stack.enter_context(shared(asked, processes))
        try:
            results: report.Results = lm_eval.simple_evaluate(
                model=asked,
                model_args=named["model_args"],
                tasks=found,
                task_manager=manager,
                num_fewshot=config.num_fewshot,
                batch_size=batch_size,
                limit=config.limit,
                log_samples=config.log_samples,
                **({} if config.seed is None else dict.fromkeys(seeds, config.seed)),
            )
        except Exception as error:
            if isinstance(asked, EngineLM):
                raise
            kept = f"; {answers.path} keeps what was answered, the same command asks the rest" if answers else ""
            raise ValueError(f"{model}: failed: {one_line(error)}{kept}") from error
    if processes.rank:
        return {}
    results["config"] |= named
    tracker.log_end_time()
    results |= {"task_hashes": report.task_hashes(results.get("samples") or {}), **asdict(tracker)}
    if out is not None:
        report.write(results, Path(out))
    return results

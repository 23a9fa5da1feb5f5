"""Trainer hook that evaluates tasks during training, without any effect on the run."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from neox.config import Config
from neox.evaluation.asked import describe, is_answered, write_note
from neox.evaluation.curves import write
from neox.evaluation.evaluate import evaluate
from neox.evaluation.report import scores
from neox.evaluation.tasks import load_tasks
from neox.generate import Engine
from neox.model.decoder import GPTNeoX
from neox.system.fingerprint import fingerprint
from neox.tokenizer import Tokenizer
from neox.train import Trainer


class TaskHook:
    """Evaluate `eval.tasks` before the first step, every `eval.tasks_every` steps, and after the last.

    `Trainer(config, hooks=(TaskHook(config),))`. Results and curves are in RUN/evals, scores go to the trainer's sinks.
    Rank 0 evaluates, the other processes wait. The losses are bit-identical to those of a run without the hook.
    Raises ValueError on construction for tasks that cannot be loaded.
    """

    def __init__(self, config: Config) -> None:
        if not config.eval.tasks:
            raise ValueError("eval.tasks_every is set, but there are no tasks: name them, eval.tasks=lambada_openai")
        self.tasks, _ = load_tasks(config.eval.tasks, config.eval.include_path)
        self.config, self.begun = config, False

    def __call__(self, trainer: Trainer, step: int) -> None:
        """Evaluate where it is due. Raises ValueError if the run has no tokenizer."""
        if not (begun := self.begun):
            self.begun = True
            if not (trainer.run / "tokenizer.json").exists():
                raise ValueError(
                    f"eval.tasks_every is set, but {trainer.run} has no tokenizer: set tokenizer.path, or "
                    "eval.tasks_every=0"
                )
        if step % self.config.eval.tasks_every and step != self.config.train.steps:
            return
        folder = trainer.run / "evals" / f"step_{step:08d}"
        with trainer.watchdog.paused():
            model = trainer.whole_model()
            if model is not None:  # on rank 0
                with _state_restored(model):
                    self._evaluate(trainer, model, step, folder, resumed=bool(step) and not begun)
            trainer.processes.all_reduce_max(0)  # the other processes wait here for rank 0

    def _evaluate(self, trainer: Trainer, model: GPTNeoX, step: int, folder: Path, resumed: bool) -> None:
        """Write results and scores; a resumed run keeps the results of these weights, documents and options."""
        asked = describe("run", fingerprint(model.state_dict()), self.tasks, self.config.eval.asked)
        if resumed and is_answered(folder, asked):
            return
        trainer.sinks.write({"step": step, **self._scores(trainer, model, folder)})
        write_note(folder, asked)
        write(folder.parent)

    def _scores(self, trainer: Trainer, model: GPTNeoX, folder: Path) -> dict[str, float]:
        engine = Engine(model, Tokenizer.from_file(trainer.run / "tokenizer.json"))
        results = evaluate(engine, out=folder, progress=not trainer.quiet, **self.config.eval.asked)
        return {f"tasks/{name}": float(value) for name, value, _ in scores(results)}


@contextmanager
def _state_restored(model: GPTNeoX) -> Iterator[None]:
    """Restore the model's mode and the random states, which lm-eval seeds."""
    training, streams = model.training, (random.getstate(), np.random.get_state())
    try:
        with torch.random.fork_rng():
            yield
    finally:
        model.train(training)
        random.setstate(streams[0])
        np.random.set_state(streams[1])

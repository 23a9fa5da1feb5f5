"""Train a model on text or prepared tokens; continue a stopped run.

neox train [PRESET or MODEL] [FILE.toml ...] data.train=SOURCE [out=RUN_DIR] [key=value ...]
neox train resume=RUN_DIR[/step_N] [key=value ...]
neox train ... out=RUN_DIR resume=auto

MODEL is a run, a step or a Hugging Face folder to start from, as with train.init= (which takes hub
ids too): shape, vocabulary and tokenizer are the model's.
SOURCE is a prefix that `neox prepare` wrote, or text, which is tokenized first: everything that
`neox prepare` reads.
Ctrl-C and SIGTERM save after the current step; a run that was killed loses the steps since its
last checkpoint. resume= continues both, bit for bit as if nothing had happened; with resume=auto
the same command begins a run or continues it.
Several processes share the work: one for each CUDA device, or as many as parallel.* multiplies
to, are started here; torchrun starts them on several hosts. Their number may change on resume.

`neox show` lists all options; docs/options.md describes them.

Examples:
  neox train data.train=corpus.txt out=runs/first steps=200
  neox train pythia-14m data.train=data/corpus out=runs/14m dtype=bf16
  neox train exported/ data.train=more.txt out=runs/tuned lr=1e-5
  neox train recipes/small.toml data.train=data/corpus parallel.dp_shard=2
  torchrun --standalone --nproc-per-node 2 -m neox train recipes/small.toml data.train=data/corpus
  neox train resume=runs/first
  neox train resume=runs/first steps=400
"""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from neox.cli.verb import UsageError, read_options, resolve
from neox.config import Section
from neox.config.options import parse_override

if TYPE_CHECKING:
    from neox.checkpoint import WeightSource
    from neox.config import Config
    from neox.train import Trainer


class TrainOptions(Section):
    """Options of `neox train` besides those of the config."""

    resume: str = Field(default="", title="RUN_DIR")
    """Run, or one of its steps, to go on from by its own config; auto = begin the run in out=, or continue it."""


OPTIONS = (
    TrainOptions,
    *("data.train", "data.valid", "log.out", "train.steps", "train.init", "checkpoint.every", "eval.every"),
    *("eval.tasks", "eval.tasks_every", "train.grace", "train.timeout", "train.restarts"),
    *("log.sample_every", "log.sample_prompt", "log.tensorboard", "log.wandb"),
)


def run(targets: list[str], options: list[str]) -> int:
    """Run the verb."""
    from neox.checkpoint import complete_steps, is_valid, step_number
    from neox.cli.launch import end_with_launcher, launch, processes_here
    from neox.system.processes import OtherProcessFailed, first_of_host, is_launched
    from neox.train import Trainer
    from neox.train.run_directory import refuse_existing

    end_with_launcher()
    try:
        config, resumed, step = _asked(targets, options)
        hooks: list[Callable[[Trainer, int], None]] = []
        if config.log.sample_every:
            from neox.analysis.sample_hook import SampleHook

            hooks.append(SampleHook(config))
        if config.eval.tasks_every:
            from neox.evaluation.task_hook import TaskHook

            hooks.append(TaskHook(config))
        trainer = Trainer(config, resume=resumed, from_step=step, hooks=tuple(hooks))
    except (UsageError, ValueError):
        if not first_of_host():
            raise OtherProcessFailed("the first process of this host prints the error") from None
        raise
    folder, steps = Path(config.log.out), config.train.steps
    again = f"neox train resume={shlex.quote(str(folder))}"
    done_steps = [one for one in complete_steps(folder) if step is None or step_number(one) <= step]
    if resumed and done_steps:
        done = step_number(done_steps[-1])
        if done >= steps and is_valid(done_steps[-1]):  # a damaged checkpoint is written again
            if first_of_host():
                print(f"{folder}: finished at step {done}; train on: {again} steps={2 * done}")
            return 0
    if not is_launched() and (number := processes_here(config)) > 1:
        if not resumed:
            refuse_existing(folder)  # here, once, and not in each process at each restart
        return launch(["train", *targets, *options], number, config.train)
    try:
        result = trainer.fit()
    except KeyboardInterrupt:
        if (folder / "config.toml").exists():
            print(f"neox: interrupted; continue from the last checkpoint: {again}", file=sys.stderr)
        raise
    if trainer.processes.rank:  # rank 0 speaks for all
        return 128 + result.signal if result.signal else 0
    loss = "" if result.loss is None else f", loss {result.loss:.4f}"
    if result.finished:
        print(f"{folder}: {result.step} steps done{loss}; next: neox generate {shlex.quote(str(folder))} prompt='The'")
        return 0
    name = signal.Signals(result.signal).name
    after = "" if result.seconds is None else f", {result.seconds:.1f} s after the signal"
    print(f"{folder}: stopped by {name}, saved at step {result.step} of {steps}{loss}{after}; continue: {again}")
    return 128 + result.signal


def _new(targets: list[str], overrides: list[str]) -> Config:
    """The config of a new run; shape and tokenizer follow from the model that it starts from, or from its tokens."""
    from neox.checkpoint.steps import folder_kind

    models = [one for one in targets if folder_kind(Path(one)) in ("run", "step", "huggingface")]
    if len(models) > 1:
        raise UsageError(f"one model to start from at a time, not {' and '.join(models)}")
    rest = [one for one in targets if one not in models]
    overrides = [*(f"train.init={one}" for one in models), *overrides]
    config = resolve(rest, overrides)
    if config.train.init and config.preset is None:
        return resolve(rest, [*_of_model(config.train.init), *overrides])
    if "vocab_size" not in config.model.model_fields_set and config.data.train:
        from neox.corpus.for_training import padded_vocabulary

        if size := padded_vocabulary(config):
            return resolve(rest, [*overrides, f"model.vocab_size={size}"])
    return config


def _of_model(source: str) -> list[str]:
    """Options that give a run the shape and the tokenizer of a model to start from; those of the command win."""
    from neox.checkpoint import use_weights
    from neox.config import DataConfig, ModelConfig
    from neox.config.options import spell

    def read(weights: WeightSource) -> list[str]:
        default, config = ModelConfig(), weights.config
        changed = [key for key in ModelConfig.model_fields if getattr(config, key) != getattr(default, key)]
        options = [f"model.{key}={spell(getattr(config, key))}" for key in changed]
        folder = weights.config_file.parent
        files = [path for path in (folder / "tokenizer.json", folder.parent / "tokenizer.json") if path.is_file()]
        context = config.max_position_embeddings
        short = [f"data.seq_length={context}"] if context < DataConfig().seq_length else []
        return options + short + [f"tokenizer.path={path}" for path in files[:1]]

    return use_weights(source, read)


def _asked(targets: list[str], options: list[str]) -> tuple[Config, bool, int | None]:
    """The config of a command, whether it may continue its run, and from which step if not from the newest."""
    from neox.checkpoint.steps import folder_kind
    from neox.train.run_directory import run_config, step_to_resume

    chosen, overrides = read_options(TrainOptions, options)
    if "resume" not in chosen.model_fields_set:
        return _new(targets, overrides), False, None
    placed = [override for override in overrides if parse_override(override)[:2] == ("log", "out")]
    if chosen.resume == "auto":
        begun = _new(targets, overrides)
        run = Path(begun.log.out)
        if folder_kind(run) != "run" or not (run / "config.toml").is_file():
            return begun, True, None
        return run_config(run, [override for override in overrides if override not in placed], begun), True, None
    if targets:
        raise UsageError(f"resume= continues the run with its own config: leave out {targets[0]}")
    if placed:
        raise UsageError("a run is resumed in its own directory: leave out out=, or set resume=auto")
    run, step = step_to_resume(Path(chosen.resume))
    return run_config(run, overrides), True, step

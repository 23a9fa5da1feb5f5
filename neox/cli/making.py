"""Verbs that make a model: quickstart, prepare, train."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from neox.cli.verb import UsageError, resolve

if TYPE_CHECKING:
    from neox.config import Config


def quickstart(targets: list[str], options: list[str]) -> int:
    """Train a small GPT-NeoX in minutes, offline: measure, train, score, draw.

    neox quickstart [key=value ...]

    Its text is the source and documentation of packages that the installation brought. Writes
    runs/quickstart (out= for another folder): the run, hf/ (the model for Hugging Face), loss.png
    and flipbook.html. Interrupted and called again, it continues where it was.

    Examples:
      neox quickstart
      neox quickstart out=runs/tiny train.steps=50
    """
    if targets:
        raise UsageError("quickstart takes key=value options only")
    from neox.quickstart import quickstart as run

    result = run(["log.out=runs/quickstart", *options])
    return 128 + result.signal if result.signal else 0


PREPARE_KEYS = ("text_key", "append_eod", "on_error", "special_in_text", "workers", "backend", "dedup", "decontaminate")


def prepare(targets: list[str], options: list[str]) -> None:
    """Turn text into tokens: SOURCES in, one .bin/.idx pair out.

    neox prepare SOURCE... out=PREFIX [tokenizer=tokenizer.json] [key=value ...]
    neox prepare pile FOLDER out=FOLDER [tokenizer=tokenizer.json] [key=value ...]

    pile is the release of the Pile: FOLDER has 00.jsonl.zst to 29.jsonl.zst, or some of them, val and
    test; train, val and test are prepared, with statistics by component and a datasheet beside them.
    Open data in its stead goes by name: pile-uncopyrighted, pile-deduplicated, common-pile,
    fineweb-10bt, fineweb-100bt, fineweb-edu-10bt (data sets of the hub).

    SOURCE is a file (.txt, .jsonl, .json with a document a line; each also .gz or .zst; .parquet,
    .arrow), a glob, a folder of such files, the URL of any of these (s3://, gs://, http://), a folder
    that Hugging Face's save_to_disk wrote, or a data set of the hub,
    hf:OWNER/NAME[:CONFIG][@REVISION][#SPLIT]. What was read, and what was left out, is in
    PREFIX.json.

    The work is cut into shards of about 64 MiB, whose parts lie in PREFIX.parts until all are done.
    Interrupted and called again, it makes the parts that are missing; finished and called again, it
    reads no more than evaluation sets. The output is the same from any number of processes.

    Options:
      out=PREFIX                writes PREFIX.bin and PREFIX.idx
      tokenizer=tokenizer.json  encode with this tokenizer; without it, one is trained on the sources
                                and saved as PREFIX-tokenizer.json
      vocab_size=8192           tokens of the tokenizer that is trained; special_tokens=, space_runs=,
                                digits= and normalizer= shape it too, see `neox show`
      text_key=text             key of the text in JSON lines; column in Parquet and data sets
      special_in_text=token     text: <|endoftext|> spelled out in a document is text, and ends nothing
      append_eod=true           end each document with the end-of-document token
      on_error=fail             skip: leave out what cannot be read, and report it in
                                PREFIX.skipped.jsonl
      dedup=none                exact: leave out documents of the same text as an earlier one; minhash:
                                of nearly the same words. What went is in PREFIX.removed.jsonl
      decontaminate=SETS        cut the text of evaluation sets out: .jsonl or .txt files, or tasks of
                                lm-evaluation-harness; also in PREFIX.removed.jsonl
      workers=0                 processes; 0 = one a core
      backend=auto              library that encodes: gigatoken or tokenizers; auto = gigatoken where
                                it is installed and gives the same ids, which samples keep checking

    Examples:
      neox prepare corpus.txt out=data/corpus
      neox prepare a.jsonl.zst b.parquet out=data/ab tokenizer=tokenizer.json text_key=content
      neox prepare crawl/ out=data/crawl on_error=skip
      neox prepare 's3://bucket/crawl/*.jsonl.zst' out=data/crawl tokenizer=tokenizer.json
      neox prepare hf:roneneldan/TinyStories#validation out=data/stories
      neox prepare crawl/ out=data/clean dedup=minhash decontaminate=lambada_test.jsonl
      neox prepare pile the-pile/ out=data/pile tokenizer=20B_tokenizer.json
    """
    from neox.config import load_config
    from neox.config.options import parse_override

    out, trained, overrides = "", "", []
    for option in options:
        key, _, value = option.partition("=")
        if key == "out":
            out = value
            continue
        full = {"tokenizer": "tokenizer.path", "vocab_size": "tokenizer.vocab_size"}.get(key, key) + "=" + value
        section, name, _ = parse_override(full)
        if section != "tokenizer" and name not in PREPARE_KEYS:
            known = ", ".join(("out", "tokenizer", "vocab_size", *PREPARE_KEYS))
            raise UsageError(f"prepare has no option {key}; it has {known}")
        if section == "tokenizer" and name != "path":
            trained = key
        overrides.append(full)
    if not targets:
        raise UsageError("prepare needs a SOURCE")
    if not out:
        raise UsageError("prepare needs out=PREFIX")
    config = load_config(overrides=overrides)
    path, data = config.tokenizer.path, config.data
    if path and trained:
        raise UsageError(f"give tokenizer= to use one or {trained}= to train one, not both")

    from neox.config.pile import stand_in
    from neox.corpus.preparation import prepare as run
    from neox.corpus.train_tokenizer import trained_tokenizer
    from neox.tokenizer import Tokenizer

    pile = targets[0] == "pile"
    if pile:
        from neox.corpus.pile.release import find_release, prepare_pile

        if len(targets) != 2:
            raise UsageError("prepare pile needs the FOLDER of the release, and nothing else")
        sources = find_release(Path(targets[1])).splits["train"]
    else:
        # What lies here by a name comes before what stands for it.
        sources = [target if Path(target).exists() else stand_in(target) for target in targets]
    if path:
        tokenizer = Tokenizer.from_file(path)
    else:
        trained_to = f"{out}/train" if pile else out
        tokenizer = trained_tokenizer(sources, trained_to, config.tokenizer.training, data.text_key, data.on_error)
        print(f"{trained_to}-tokenizer.json: {tokenizer.vocab_size} tokens")
    if pile:
        reports = list(prepare_pile(targets[1], out, tokenizer, data).values())
    else:
        reports = [run(sources, out, tokenizer, data)]
    for report in reports:
        how = "done before" if report.done_before else f"{report.seconds:.1f} s"
        print(
            f"{report.prefix}.bin: {report.tokens:,} tokens of {report.documents:,} documents, "
            f"{report.bytes / max(report.tokens, 1):.2f} bytes a token, {how}"
        )
        for line in report.left_out():
            print(line)
    if pile:
        print(
            f"{out}/statistics.md, statistics.json: what there is of each component; {out}/datasheet.md: what to know"
        )


def train(targets: list[str], options: list[str]) -> int:
    """Train a model on text or on prepared tokens; continue a run that was stopped.

    neox train [PRESET] [FILE.toml ...] data.train=SOURCE [out=RUN_DIR] [key=value ...]
    neox train resume=RUN_DIR [key=value ...]
    neox train ... out=RUN_DIR resume=auto

    SOURCE is a prefix that `neox prepare` wrote, or text, which is tokenized first: all that `neox
    prepare` reads.
    Ctrl-C and SIGTERM save after the current step; a run that was killed loses the steps since its
    last checkpoint. Both are continued by resume=, bit for bit as if nothing had happened; with
    resume=auto the same command begins a run or goes on with it.
    Several processes share the work: one for each CUDA device, or as many as parallel.* multiplies
    to, are started here; torchrun starts them on several hosts. Their number may change on resume.

    Options (`neox show` lists them all):
      data.train=SOURCE    or '["a", "b"]'; data.valid= the same, held out
      out=RUN_DIR          config.toml, metrics.jsonl and step_NNNNNNNN/ go here
      steps=1000           optimizer steps
      checkpoint.every=N   steps between checkpoints
      eval.every=N         steps between evaluations on data.valid
      eval.tasks_every=N   steps between evaluations of eval.tasks=NAME,.. of lm-evaluation-harness
      train.grace=30       seconds from SIGTERM until the process is gone, saved or not
      train.timeout=1800   seconds without a finished step until a run that hangs says where and ends
      train.restarts=3     how often processes that die are started again, from the newest checkpoint
      log.sample_every=N   steps between samples of what the model writes; log.sample_prompt=TEXT
      log.tensorboard=true write RUN_DIR/tensorboard too; log.wandb=PROJECT reports to W&B

    Examples:
      neox train data.train=corpus.txt out=runs/first steps=200
      neox train pythia-14m data.train=data/corpus out=runs/14m dtype=bf16
      neox train recipes/small.toml data.train=data/corpus parallel.dp_shard=2
      torchrun --standalone --nproc-per-node 2 -m neox train recipes/small.toml data.train=data/corpus
      neox train resume=runs/first
      neox train resume=runs/first steps=400
    """
    from neox.analysis.sample_hook import SampleHook
    from neox.checkpoint import complete_steps, is_valid, step_number
    from neox.cli.launch import launch, processes_here
    from neox.system.processes import OtherProcessFailed, first_of_host, is_launched
    from neox.train import Trainer
    from neox.train.run_directory import refuse_existing

    try:
        config, resumed = _asked(targets, options)
        hooks: list[Callable[[Trainer, int], None]] = [SampleHook(config)] if config.log.sample_every else []
        if config.eval.tasks_every:
            from neox.evaluation.task_hook import TaskHook

            hooks.append(TaskHook(config))
        trainer = Trainer(config, resume=resumed, hooks=tuple(hooks))
    except (UsageError, ValueError):
        if not first_of_host():
            raise OtherProcessFailed("the first process of this host says so") from None
        raise
    run, steps = Path(config.log.out), config.train.steps
    again = f"neox train resume={shlex.quote(str(run))}"
    if resumed and (kept := complete_steps(run)):
        done = step_number(kept[-1])
        if done >= steps and is_valid(kept[-1]):  # a damaged one is made again
            if first_of_host():
                print(f"{run}: finished at step {done}; train on: {again} steps={2 * done}")
            return 0
    if not is_launched() and (number := processes_here(config)) > 1:
        if not resumed:
            refuse_existing(run)  # here, once, and not in each process at each restart
        return launch(["train", *targets, *options], number, config.train)
    try:
        result = trainer.fit()
    except KeyboardInterrupt:
        if (run / "config.toml").exists():
            print(f"neox: interrupted; continue from the last checkpoint: {again}", file=sys.stderr)
        raise
    if trainer.processes.rank:  # rank 0 speaks for all
        return 128 + result.signal if result.signal else 0
    loss = "" if result.loss is None else f", loss {result.loss:.4f}"
    if result.finished:
        print(f"{run}: {result.step} steps done{loss}; next: neox generate {shlex.quote(str(run))} prompt='The'")
        return 0
    name = signal.Signals(result.signal).name
    after = "" if result.seconds is None else f", {result.seconds:.1f} s after the signal"
    print(f"{run}: stopped by {name}, saved at step {result.step} of {steps}{loss}{after}; continue: {again}")
    return 128 + result.signal


def _asked(targets: list[str], options: list[str]) -> tuple[Config, bool]:
    """The config that a command of `train` adds up to, and whether it may go on with what its run directory holds."""
    from neox.checkpoint import complete_steps
    from neox.config.options import parse_override
    from neox.train import run_config

    overrides = [option for option in options if not option.startswith("resume=")]
    resumed = [option.partition("=")[2] for option in options if option not in overrides]
    if not resumed:
        return resolve(targets, overrides), False
    placed = [override for override in overrides if parse_override(override)[:2] == ("log", "out")]
    if resumed[-1] == "auto":
        begun = resolve(targets, overrides)
        run = Path(begun.log.out)
        if not ((run / "config.toml").is_file() or complete_steps(run)):
            return begun, True
        return run_config(run, [override for override in overrides if override not in placed]), True
    if targets:
        raise UsageError(f"resume= goes on with the run's own config; {targets[0]} does not belong beside it")
    if placed:
        raise UsageError("a run is resumed where it is: leave out= away, or take resume=auto")
    return run_config(Path(resumed[-1]), overrides), True

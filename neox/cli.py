"""The command line: ``neox VERB [TARGET...] key=value ...``.

A verb is one function of (targets, options) whose docstring is its help; it imports what it needs when it runs, so
that ``neox --help`` answers at once. It returns nothing (or an exit status), prints results to stdout, and raises
ValueError or OSError with one line for the user.
"""

from __future__ import annotations

import difflib
import itertools
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from inspect import getdoc
from pathlib import Path
from typing import TYPE_CHECKING

import neox

if TYPE_CHECKING:
    from neox.config import Config

Verb = Callable[[list[str], list[str]], int | None]
VERBS: dict[str, Verb] = {}
TOPICS: dict[str, Verb] = {}  # of inspect


class UsageError(Exception):
    """The command itself is wrong, not what it was given: exit status 2."""


def verb(function: Verb) -> Verb:
    """Enter a function in the table under its own name."""
    VERBS[function.__name__] = function
    return function


@verb
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


@verb
def generate(targets: list[str], options: list[str]) -> None:
    """Continue prompts with a model: one as you watch, a file of them, or at a terminal.

    neox generate MODEL prompt=TEXT [key=value ...]
    neox generate MODEL prompts=FILE out=FILE.jsonl [key=value ...]
    neox generate MODEL                       asks for prompts, on a terminal

    MODEL is a Hugging Face folder, a run directory, one of its step folders, or a hub id
    (OWNER/MODEL, OWNER/MODEL@REVISION).

    Options:
      prompt=TEXT       the text to continue; prompt=- reads it from standard input, prompt= (empty)
                        starts from nothing
      prompts=FILE      a .txt with one a line, or a .jsonl with key prompt or context
      out=FILE.jsonl    a line of JSON each; interrupted, the same command continues it
      n=1               samples of each prompt
      max_tokens=128    new tokens, at most
      temperature=1.0   0 takes the most likely token
      top_k=0           sample from the k most likely tokens; 0: from all
      top_p=1.0         sample from the most likely tokens that hold this probability
      min_p=0.0         sample from tokens at least this fraction as likely as the most likely one
      repetition_penalty=1.0   above 1, tokens that the text holds already become less likely
      stop=TEXT         end before this text; several: stop='["\\n\\n", "Q:"]'
      logprobs=none     record log-probabilities, and those of so many alternatives; with out=
      seed=1234         the same seed gives the same text; the next sample draws with the next one
      slots=8           sequences that run at a time
      device=auto       cpu, cuda or mps
      dtype=fp32        fp32, bf16 or fp16; default: fp32 on a CPU, the stored type elsewhere

    Examples:
      neox generate runs/quickstart/hf prompt='def'
      neox generate EleutherAI/pythia-160m prompt='Once upon a time' temperature=0
      neox generate runs/first prompts=prompts.txt out=answers.jsonl n=4 top_p=0.9
      neox generate runs/first prompt= n=100 out=samples.jsonl
    """
    from neox.config import load_config
    from neox.options import parse_override

    own: dict[str, str] = {}
    overrides = []
    for option in options:
        key, _, value = option.partition("=")
        if key in ("prompt", "prompts", "out", "device", "dtype"):
            own[key] = value
            continue
        full = key if "." in key else f"generate.{key}"
        section, *_ = parse_override(f"{full}={value}")
        if section != "generate":
            raise UsageError(f"generate has no option {key}, see `neox generate --help`")
        overrides.append(f"{full}={value}")
    if len(targets) != 1:
        raise UsageError("generate needs one MODEL")
    if "prompt" in own and "prompts" in own:
        raise UsageError("give prompt= for one or prompts= for a file of them, not both")
    out = own.get("out")
    if "prompts" in own and not out:
        raise UsageError("prompts= needs out=FILE.jsonl")
    if out is not None and not out.endswith(".jsonl"):
        raise UsageError(f"out={out} must end in .jsonl: it gets a line of JSON for each sample")
    if out and not own.keys() & {"prompt", "prompts"}:
        raise UsageError("out= needs prompt=TEXT or prompts=FILE")
    config = load_config(overrides=overrides).generate
    if config.logprobs is not None and not out:
        raise UsageError("log-probabilities go to a file: give out=FILE.jsonl")
    if not own.keys() & {"prompt", "prompts"} and not sys.stdin.isatty():
        raise UsageError("generate needs prompt=TEXT or prompts=FILE; it asks for prompts on a terminal only")

    from neox.checkpoint import load
    from neox.generate import Engine, Sampling
    from neox.generate.batch import complete, partial_name, refuse_existing, write_completions
    from neox.generate.interactive import converse
    from neox.generate.prompts import read_prompts

    # Loading may take minutes: what is wrong with the files is said before.
    prompt = sys.stdin.read() if own.get("prompt") == "-" else own.get("prompt")
    prompts = read_prompts(own["prompts"]) if "prompts" in own else [(prompt or "", "")]
    if out:
        refuse_existing(out)
    engine = Engine(*load(targets[0], own.get("device", "auto"), own.get("dtype")), slots=config.slots)
    sampling = Sampling.of(config)
    if out:
        try:
            count = write_completions(engine, prompts, sampling, out, config.n)
        except KeyboardInterrupt:
            if (partial := partial_name(out)).exists():
                print(f"neox: interrupted; the same command continues {partial}", file=sys.stderr)
            raise
        print(f"{out}: {count:,} samples")
    elif prompt is None:
        converse(engine, config)
    elif config.n == 1:
        pieces = engine.stream(prompt, sampling)
        first = next(pieces, "")
        print(prompt, end="")
        for piece in itertools.chain([first], pieces):
            print(piece, end="", flush=True)
        print()
    else:
        # All of them first: rich's bar would take what is printed meanwhile to stderr.
        for record in list(complete(engine, prompts, sampling, config.n)):
            print(f"== {record['sample'] + 1} of {config.n}, seed {record['seed']}, {record['finish_reason']} ==")
            print(prompt + record["text"])


@verb
def convert(targets: list[str], options: list[str]) -> None:
    """Write a model as a Hugging Face folder: config, safetensors, tokenizer.

    neox convert MODEL out=FOLDER [dtype=fp32]

    MODEL is a run directory (its newest step), one of its step folders, a Hugging Face folder or a
    hub id.

    Examples:
      neox convert runs/mine out=exported
      neox convert runs/mine/step_00001000 out=exported dtype=bf16
    """
    plain = dict(option.split("=", 1) for option in options)
    out, dtype = plain.pop("out", None), plain.pop("dtype", None)
    if len(targets) != 1 or not out or plain:
        raise UsageError("convert needs one MODEL and out=FOLDER; its only other option is dtype")
    from neox.checkpoint import load, save

    model, tokenizer = load(targets[0], "cpu", dtype)
    save(model, out, tokenizer)
    print(f"{out}: {sum(p.numel() for p in model.parameters()):,} parameters")


@verb
def show(targets: list[str], options: list[str]) -> None:
    """Show a config and what it costs: parameters, FLOPs, memory, notes on the record.

    neox show [PRESET] [FILE.toml ...] [key=value ...]

    Without anything, lists the presets. Later files win over earlier ones, key=value over files.

    Examples:
      neox show
      neox show neox-20b
      neox show pythia-160m train.micro_batch_size=8 dtype=bf16
      neox show recipe.toml
    """
    from neox import estimate

    print(estimate.show(resolve(targets, options)) if targets or options else estimate.table())


@verb
def prepare(targets: list[str], options: list[str]) -> None:
    """Turn text into tokens: SOURCES in, one .bin/.idx pair out.

    neox prepare SOURCE... out=PREFIX [tokenizer=tokenizer.json] [key=value ...]

    SOURCE is a file (.txt, .jsonl, .json with a document a line; each also .gz or .zst; .parquet), a
    folder of such files, a folder that Hugging Face's save_to_disk wrote, or a data set of the hub,
    hf:OWNER/NAME[:CONFIG][@REVISION][#SPLIT]. What was read, and what was left out, is in
    PREFIX.json.

    Options:
      out=PREFIX                writes PREFIX.bin and PREFIX.idx
      tokenizer=tokenizer.json  encode with this tokenizer; without it, one is trained on the sources
                                and saved as PREFIX-tokenizer.json
      vocab_size=8192           tokens of the tokenizer that is trained; special_tokens=, space_runs=,
                                digits= and normalizer= shape it too, see `neox show`
      text_key=text             key of the text in JSON lines; column in Parquet and data sets
      special_in_text=token     text: <|endoftext|> spelled out in a document is text, and ends nothing
      append_eod=true           end each document with the end-of-document token
      on_error=fail             skip: leave out what cannot be read, and report it

    Examples:
      neox prepare corpus.txt out=data/corpus
      neox prepare a.jsonl.zst b.parquet out=data/ab tokenizer=tokenizer.json text_key=content
      neox prepare crawl/ out=data/crawl on_error=skip
      neox prepare hf:roneneldan/TinyStories#validation out=data/stories
    """
    from neox.config import load_config
    from neox.options import parse_override

    out, trained, overrides = "", "", []
    for option in options:
        key, _, value = option.partition("=")
        if key == "out":
            out = value
            continue
        full = {"tokenizer": "tokenizer.path", "vocab_size": "tokenizer.vocab_size"}.get(key, key) + "=" + value
        section, name, _ = parse_override(full)
        if section != "tokenizer" and name not in ("text_key", "append_eod", "on_error", "special_in_text"):
            known = "out, tokenizer, vocab_size, text_key, append_eod, on_error, special_in_text"
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

    from neox.data.prepare import prepare as run
    from neox.data.readers import read_documents
    from neox.tokenizer import Tokenizer, train_bpe

    if path:
        tokenizer = Tokenizer.from_file(path)
    else:
        texts = read_documents(targets, data.text_key, data.on_error)
        tokenizer = train_bpe(texts, **config.tokenizer.training)
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        tokenizer.save(f"{out}-tokenizer.json")
        print(f"{out}-tokenizer.json: {tokenizer.vocab_size} tokens")
    report = run(
        targets,
        out,
        tokenizer,
        data.text_key,
        data.append_eod,
        on_error=data.on_error,
        special_in_text=data.special_in_text,
    )
    print(
        f"{report.prefix}.bin: {report.tokens:,} tokens of {report.documents:,} documents, "
        f"{report.bytes / max(report.tokens, 1):.2f} bytes a token, {report.seconds:.1f} s"
    )
    for line in report.left_out():
        print(line)


@verb
def train(targets: list[str], options: list[str]) -> int:
    """Train a model on text or on prepared tokens; continue a run that was stopped.

    neox train [PRESET] [FILE.toml ...] data.train=SOURCE [out=RUN_DIR] [key=value ...]
    neox train resume=RUN_DIR [key=value ...]

    SOURCE is a prefix that `neox prepare` wrote, or text, which is tokenized first: all that `neox
    prepare` reads.
    Ctrl-C and SIGTERM save after the current step; a run that was killed loses the steps since its
    last checkpoint. Both are continued by resume=, bit for bit as if nothing had happened.
    Several processes share the work when torchrun starts them; a run may change their number.

    Options (`neox show` lists them all):
      data.train=SOURCE    or '["a", "b"]'; data.valid= the same, held out
      out=RUN_DIR          config.toml, metrics.jsonl and step_NNNNNNNN/ go here
      steps=1000           optimizer steps
      checkpoint.every=N   steps between checkpoints
      eval.every=N         steps between evaluations on data.valid
      log.sample_every=N   steps between samples of what the model writes; log.sample_prompt=TEXT
      log.tensorboard=true write RUN_DIR/tensorboard too; log.wandb=PROJECT reports to W&B

    Examples:
      neox train data.train=corpus.txt out=runs/first steps=200
      neox train pythia-14m data.train=data/corpus out=runs/14m dtype=bf16
      torchrun --standalone --nproc-per-node 2 -m neox train recipes/small.toml data.train=data/corpus
      neox train resume=runs/first
      neox train resume=runs/first steps=400
    """
    from neox.checkpoint import complete_steps, read_step
    from neox.inspect.samples import SampleHook
    from neox.options import parse_override
    from neox.train import Trainer, run_config

    overrides = [option for option in options if not option.startswith("resume=")]
    resumed = [option.partition("=")[2] for option in options if option not in overrides]
    if resumed and targets:
        raise UsageError(f"resume= goes on with the run's own config; {targets[0]} does not belong beside it")
    if resumed and any(parse_override(override)[:2] == ("log", "out") for override in overrides):
        raise UsageError("a run is resumed where it is: leave out= away")

    config = run_config(Path(resumed[-1]), overrides) if resumed else resolve(targets, overrides)
    run, steps = Path(config.log.out), config.train.steps
    again = f"neox train resume={shlex.quote(str(run))}"
    if resumed and (kept := complete_steps(run)):
        done = read_step(kept[-1])[1]["step"]
        if done >= steps:
            print(f"{run}: finished at step {done}; train on: {again} steps={2 * done}")
            return 0
    trainer = Trainer(config, resume=bool(resumed), hooks=(SampleHook(config),))
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
    print(f"{run}: stopped by {name}, saved at step {result.step} of {steps}{loss}; continue: {again}")
    return 128 + result.signal


@verb
def doctor(targets: list[str], options: list[str]) -> int:
    """Examine this machine: versions, speeds, disk, traps, and what mends them.

    neox doctor [out=RUN_DIR]

    Takes some seconds; out= is where runs are to be written (runs). Exit status 1 where something
    that neox needs is broken, else 0.

    Examples:
      neox doctor
      neox doctor out=/scratch/runs
    """
    from neox.doctor import examine

    if targets or any(not option.startswith("out=") for option in options):
        raise UsageError("doctor takes out=RUN_DIR only")
    return examine(Path(options[-1].partition("=")[2] if options else "runs"))


@verb
def inspect(targets: list[str], options: list[str]) -> int | None:
    """Look into runs and tokenizers.

    neox inspect TOPIC ... [key=value ...]

    Topics (`neox inspect TOPIC --help` says more):
      run         curves of one or more runs, and where their options differ, as a page or a picture
      tokenizer   what a tokenizer makes of a text, beside others

    Examples:
      neox inspect run runs/first
      neox inspect run runs/a runs/b out=report.png
    """
    if not targets or targets[0] not in TOPICS:
        raise UsageError(f"inspect needs a topic first: {', '.join(TOPICS)}")
    return TOPICS[targets[0]](targets[1:], options)


def inspect_run(targets: list[str], options: list[str]) -> None:
    """Lay the curves of runs beside each other, while they go on or after.

    neox inspect run RUN_DIR... [out=report.html] [key=value ...]

    Loss (held-out too), gradient norm, learning rate, throughput, and the options in which the
    runs differ. report.html is one file that needs no network: point at a curve to read it, drag
    to look closer. A name that ends in .png makes a picture.

    Options:
      out=report.html   .html or .png
      x=steps           or tokens, or hours of training
      y=log             or linear: loss and gradient norm
      smooth=0.02       share of the x axis that a smoothed point takes in; 0: as logged

    Examples:
      neox inspect run runs/first
      neox inspect run runs/a runs/b x=tokens
      neox inspect run runs/a runs/b out=report.png smooth=0.05
    """
    given = dict(option.split("=", 1) for option in options)
    plain = {"out": "report.html", "x": "steps", "y": "log", "smooth": "0.02"} | given
    if not targets or len(plain) > 4:
        raise UsageError("inspect run needs a RUN_DIR; its options are out, x, y, smooth")
    for key, words in (("x", ("steps", "tokens", "hours")), ("y", ("log", "linear"))):
        if plain[key] not in words:
            raise ValueError(f"{key}={plain[key]}: must be {' or '.join(words)}")
    try:
        share = float(plain["smooth"])
    except ValueError:
        share = -1
    if not 0 <= share <= 1:
        raise ValueError(f"smooth={plain['smooth']}: must be a number from 0 to 1")
    out = Path(plain["out"])
    if out.suffix not in (".html", ".png"):
        raise ValueError(f"out={out}: must end in .html (a page) or .png (a picture)")

    from neox.inspect.runs import read_runs, summary

    runs = read_runs(targets)
    if out.suffix == ".html":
        from neox.inspect.page import write_page as write
    else:
        from neox.inspect.picture import write_picture as write
    write(out, runs, plain["x"], plain["y"], share)
    for run in runs:
        print(f"{run.name}: {summary(run)}")
    print(f"{out}: {'open it in a browser' if out.suffix == '.html' else 'written'}")


def inspect_tokenizer(targets: list[str], options: list[str]) -> None:
    """What a tokenizer makes of texts, beside other tokenizers.

    neox inspect tokenizer TOKENIZER [OTHER...] text=SOURCE [text=SOURCE...] [text_key=text]

    TOKENIZER is a tokenizer.json or a folder with one; SOURCE whatever `neox prepare` reads.
    Bytes and characters a token, tokens a word, the share of the vocabulary that was used, whether
    decoding gives the text back, the longest tokens.

    Examples:
      neox inspect tokenizer runs/first text=corpus.txt
      neox inspect tokenizer runs/first other/tokenizer.json text=a.jsonl text=b.txt
    """
    texts = [option.partition("=")[2] for option in options if option.startswith("text=")]
    rest = dict(option.split("=", 1) for option in options if not option.startswith("text="))
    text_key = rest.pop("text_key", "text")
    if not targets or not texts or rest:
        raise UsageError("inspect tokenizer needs a TOKENIZER and text=SOURCE; its only other option is text_key")
    from neox.inspect.tokenizer import tokenizer_report

    print(tokenizer_report(targets, texts, text_key))


TOPICS.update(run=inspect_run, tokenizer=inspect_tokenizer)


def resolve(targets: Sequence[str], options: Sequence[str]) -> Config:
    """The config that a preset's name, TOML files and key=value options add up to."""
    from neox import presets
    from neox.config import load_config

    files = [t for t in targets if t not in presets.names() and (t.endswith(".toml") or os.path.isfile(t))]
    named = [t for t in targets if t not in files]
    if len(named) > 1:
        raise UsageError(f"one preset at a time, not {' and '.join(named)}")
    return load_config(named[0] if named else None, files, options)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, 1 for an error, 2 for bad usage, 128 + n if signal n stopped it."""
    try:
        status = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except UsageError as error:
        return _fail(str(error), 2)
    except BrokenPipeError:
        # The reader has gone (`neox show | head`). Without this, Python complains when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error), 1)
    except ValueError as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return 130
    except RuntimeError as error:
        if type(error).__name__ != "OtherProcessFailed":  # by name: its module imports torch
            raise
        return 1  # that process has said why
    return status


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("--help", "-h", "help"):
        print(_usage())
        return 0
    if argv[0] == "--version":
        print(f"neox {neox.__version__}")
        return 0
    name, arguments = argv[0], argv[1:]
    if name not in VERBS:
        near = difflib.get_close_matches(name, VERBS, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(VERBS)}"
        raise UsageError(f"no verb {name!r}; {hint}")
    if "--help" in arguments or "-h" in arguments:
        topic = TOPICS.get(arguments[0]) if name == "inspect" else None
        print(getdoc(topic or VERBS[name]))
        return 0
    targets: list[str] = []
    options: list[str] = []
    for argument in arguments:
        if argument.startswith("-") and argument != "-":
            raise UsageError(f"no flag {argument}; options are written key=value, see `neox {name} --help`")
        # A path may hold an equals sign; a key holds no slash and does not start with a dot.
        is_option = re.match(r"[A-Za-z_][\w.]*=", argument)
        (options if is_option else targets).append(argument)
    return VERBS[name](targets, options) or 0


def _usage() -> str:
    lines = [
        "neox VERB [TARGET...] key=value ...",
        "",
        "Train, run and study GPT-NeoX language models.",
        "",
        "Verbs:",
        *(f"  {name:<12}{(getdoc(function) or '').partition(chr(10))[0]}" for name, function in VERBS.items()),
        "",
        "Examples:",
        "  neox show neox-20b",
        "  neox prepare corpus.txt out=data/corpus",
        "  neox train pythia-14m data.train=data/corpus out=runs/first",
        "",
        "neox VERB --help says more; neox --version prints the version.",
    ]
    return "\n".join(lines)


def _fail(message: str, status: int) -> int:
    print(f"neox: error: {' '.join(message.splitlines())}", file=sys.stderr)
    return status

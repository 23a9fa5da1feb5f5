"""Verbs that use a model: generate, convert."""

from __future__ import annotations

import itertools
import sys
from typing import TYPE_CHECKING

from neox.cli.launch import launch
from neox.cli.verb import UsageError

if TYPE_CHECKING:
    from neox.config import GenerateConfig
    from neox.generate import Engine, Sampling

MODEL = ("device", "dtype", "weights", "speculate", "draft")
"""Options of `neox generate` that say how its model is loaded and run."""


def generate(targets: list[str], options: list[str]) -> int | None:
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
      presence_penalty=0.0     taken from the logits of tokens that the output holds already
      frequency_penalty=0.0    the same, for each time that it does
      logit_bias=TABLE  added to the logits of tokens, by text or id: '{" the" = -100, 262 = 5}'
      stop=TEXT         end before this text; several: stop='["\\n\\n", "Q:"]'
      stop_tokens=LIST  end before one of these tokens: stop_tokens='[187, 535]'
      stop_at_eod=true  false: go on after an end-of-document token
      json_schema=FILE  the output is JSON of this schema; the schema itself too: '{"type": ...}'
      regex=PATTERN     the output as a whole matches
      grammar=FILE      the output follows this grammar (Lark, as llguidance reads it)
      logprobs=none     record log-probabilities, and those of so many alternatives; with out=
      echo=false        true: text and log-probabilities begin with the prompt's
      seed=1234         the same seed gives the same text; the next sample draws with the next one
      slots=8           sequences that run at a time
      weights=auto      how weights are held: auto loses nothing; torch leaves the layers to torch;
                        bf16, int8, int4 and the other kinds of docs/weights.md; float8 on CUDA
      speculate=prompt  guess from the text so far; draft=MODEL lets a smaller model guess: the same
                        tokens, several a step where guesses are right
      device=auto       cpu, cuda or mps
      dtype=fp32        fp32, bf16 or fp16; default: fp32 on a CPU, the stored type elsewhere
      tp=1              processes that share each matrix, one a device; they are started here, or by
                        torchrun

    Examples:
      neox generate runs/quickstart/hf prompt='def'
      neox generate EleutherAI/pythia-160m prompt='Once upon a time' temperature=0
      neox generate runs/first prompts=prompts.txt out=answers.jsonl n=4 top_p=0.9
      neox generate runs/first prompt= n=100 out=samples.jsonl
      neox generate EleutherAI/gpt-neox-20b prompt='Once upon a time' tp=2
      neox generate runs/first prompt='Colour: ' json_schema='{"enum": ["red", "green"]}'
    """
    from neox.config import ParallelConfig, TrainConfig, load_config
    from neox.config.options import parse_override

    own: dict[str, str] = {}
    overrides = []
    tp = 1
    for option in options:
        key, _, value = option.partition("=")
        if key in ("tp", "parallel.tp"):
            tp = ParallelConfig(tp=parse_override(f"parallel.tp={value}")[2]).tp
            continue
        if key in ("prompt", "prompts", "out", *MODEL):
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
    if tp > 1 and not own.keys() & {"prompt", "prompts"}:
        raise UsageError("tp= needs prompt=TEXT or prompts=FILE")

    from neox.generate import Sampling
    from neox.generate.batch import refuse_existing
    from neox.generate.loading import shared_engine
    from neox.generate.prompts import read_prompts
    from neox.system.processes import is_first, is_launched

    # Loading may take minutes: what is wrong with the files is said before.
    sampling = Sampling.of(config)
    prompts = read_prompts(own["prompts"]) if "prompts" in own else None
    if out and is_first():
        refuse_existing(out)
    if tp > 1 and not is_launched():
        return launch(["generate", *targets, *options], tp, TrainConfig(restarts=0))
    if prompts is None and own.get("prompt") == "-" and is_first():
        own["prompt"] = sys.stdin.read()
    model = {key: own[key] for key in MODEL if key in own}
    with shared_engine(targets[0], tp, slots=config.slots, **model) as engine:
        if engine is not None:
            _answer(engine, own.get("prompt"), prompts, sampling, config, out)
    return 0


def _answer(
    engine: Engine,
    prompt: str | None,
    prompts: list[tuple[str, str]] | None,
    sampling: Sampling,
    config: GenerateConfig,
    out: str | None,
) -> None:
    """What `generate` was asked for, with the engine there."""
    from neox.generate.batch import complete, partial_name, write_completions
    from neox.generate.rate import Rate
    from neox.generate.repl import converse

    prompts = [(prompt or "", "")] if prompts is None else prompts
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
        rate = Rate(engine)
        events = engine.events([prompt], [sampling])
        first = list(itertools.islice(events, 1))
        print("" if config.echo else prompt, end="")
        for event in itertools.chain(first, events):
            rate.count(event)
            print(event.text, end="", flush=True)
        print()
        print(rate.line(), file=sys.stderr)
    else:
        # All of them first: rich's bar would take what is printed meanwhile to stderr.
        for record in list(complete(engine, prompts, sampling, config.n)):
            print(f"== {record['sample'] + 1} of {config.n}, seed {record['seed']}, {record['finish_reason']} ==")
            print(record["text"] if config.echo else prompt + record["text"])


def bench(targets: list[str], options: list[str]) -> None:
    """Measure a model on this CPU, its weights held in fewer and fewer bits.

    neox bench MODEL [weights=torch,fp16,int8,int4]

    MODEL is what `neox generate` takes. For each way: the weights that a token reads, tokens/s of a
    prompt of 128 and of writing with one sequence, and the share of the machine's read speed that
    this uses; then which one weights=auto takes, and why. The model is loaded once for each.

    Examples:
      neox bench runs/quickstart/hf
      neox bench EleutherAI/pythia-1.4b weights=int8,int4
    """
    plain = dict(option.split("=", 1) for option in options)
    from neox.quantization.kinds import KINDS

    kinds = plain.pop("weights", ",".join(("torch", *KINDS))).split(",")
    if len(targets) != 1 or plain:
        raise UsageError("bench needs one MODEL; its option is weights")
    from neox.generate.benchmark import report

    print(report(targets[0], kinds))


def convert(targets: list[str], options: list[str]) -> None:
    """Write a model as a Hugging Face folder: config, safetensors, tokenizer.

    neox convert MODEL out=FOLDER [dtype=fp32] [shard_size=5GB]

    MODEL is a run directory (its newest step), one of its step folders, a Hugging Face folder or a
    hub id. A run's weights go over shard by shard: memory holds one file of shard_size.

    Examples:
      neox convert runs/mine out=exported
      neox convert runs/mine/step_00001000 out=exported dtype=bf16 shard_size=500MB
    """
    plain = dict(option.split("=", 1) for option in options)
    out, dtype, shard_size = plain.pop("out", None), plain.pop("dtype", None), plain.pop("shard_size", "5GB")
    if len(targets) != 1 or not out or plain:
        raise UsageError("convert needs one MODEL and out=FOLDER; its other options are dtype and shard_size")
    from neox.checkpoint.export import convert, parse_bytes

    print(f"{out}: {convert(targets[0], out, dtype, parse_bytes(shard_size)):,} parameters")

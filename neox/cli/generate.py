"""Continue prompts: one streamed, a file of them, or at a terminal.

neox generate MODEL prompt=TEXT [key=value ...]
neox generate MODEL prompts=FILE out=FILE.jsonl [key=value ...]
neox generate MODEL                       asks for prompts, on a terminal

MODEL is a Hugging Face folder, a run directory, one of its step folders, or a hub id
(OWNER/MODEL, OWNER/MODEL@REVISION).

Examples:
  neox generate runs/quickstart/hf prompt='def'
  neox generate EleutherAI/pythia-160m prompt='Once upon a time' temperature=0
  neox generate runs/first prompts=prompts.txt out=answers.jsonl n=4 top_p=0.9
  neox generate runs/first prompt= n=100 out=samples.jsonl
  neox generate EleutherAI/gpt-neox-20b prompt='Once upon a time' tp=2
  neox generate runs/first prompt='Colour: ' json_schema='{"enum": ["red", "green"]}'
"""

from __future__ import annotations

import itertools
import sys
from typing import TYPE_CHECKING

from pydantic import Field

from neox.cli.launch import end_with_launcher, launch
from neox.cli.loading_options import LoadingOptions
from neox.cli.verb import UsageError, one_model, read_all
from neox.config import GenerateConfig, TrainConfig
from neox.config.sections import Positive

if TYPE_CHECKING:
    from neox.generate import Engine, Sampling


class GenerateOptions(GenerateConfig, LoadingOptions):
    """Options of `neox generate`."""

    prompt: str | None = None
    """Text to continue; - reads it from standard input, an empty one starts from nothing."""
    prompts: str | None = Field(default=None, title="FILE")
    """File of prompts: .txt with one a line, or .jsonl with key prompt or context."""
    out: str | None = Field(default=None, title="FILE.jsonl")
    """File to write, a line of JSON per sample; after an interruption the same command continues it."""
    speculate: str = "none"
    """Speculative decoding: prompt = draft tokens from the text so far; the output is the same tokens; none = off."""
    draft: str | None = Field(default=None, title="MODEL")
    """Smaller model that drafts tokens for speculative decoding; the output is the same tokens."""
    tp: Positive = 1
    """Tensor parallelism: processes that share each matrix, one a device; started here, or by torchrun."""


OPTIONS = GenerateOptions


def run(targets: list[str], options: list[str]) -> int | None:
    """Run the verb."""
    chosen = read_all("generate", GenerateOptions, [option.removeprefix("parallel.") for option in options])
    model, out, asked = one_model("generate", targets), chosen.out, chosen.model_fields_set & {"prompt", "prompts"}
    if len(asked) == 2:
        raise UsageError("give prompt= for one or prompts= for a file of them, not both")
    if chosen.prompts and not out:
        raise UsageError("prompts= needs out=FILE.jsonl")
    if out is not None and not out.endswith(".jsonl"):
        raise UsageError(f"out={out} must end in .jsonl: it gets a line of JSON for each sample")
    if out and not asked:
        raise UsageError("out= needs prompt=TEXT or prompts=FILE")
    if chosen.logprobs is not None and not out:
        raise UsageError("log-probabilities go to a file: give out=FILE.jsonl")
    if not asked and not sys.stdin.isatty():
        raise UsageError("generate needs prompt=TEXT or prompts=FILE; it asks for prompts on a terminal only")
    if chosen.tp > 1 and not asked:
        raise UsageError("tp= needs prompt=TEXT or prompts=FILE")

    from neox.generate import Sampling
    from neox.generate.batch import refuse_existing
    from neox.generate.loading import shared_engine
    from neox.generate.prompts import read_prompts
    from neox.system.processes import is_first, is_launched

    end_with_launcher()
    # Loading may take minutes: wrong files are refused before.
    sampling = Sampling.of(chosen)
    prompts = None if chosen.prompts is None else read_prompts(chosen.prompts)
    if out and is_first():
        refuse_existing(out)
    if chosen.tp > 1 and not is_launched():
        return launch(["generate", *targets, *options], chosen.tp, TrainConfig(restarts=0))
    prompt = chosen.prompt
    if prompt == "-" and is_first():
        try:
            prompt = sys.stdin.read()
            prompt.encode("utf-8")  # under some locales bad bytes pass as lone surrogates
        except (UnicodeDecodeError, UnicodeEncodeError) as error:
            raise ValueError(f"standard input: not UTF-8 (at {error.start}): convert it") from None
    loading = {key: getattr(chosen, key) for key in (*LoadingOptions.model_fields, "slots", "speculate", "draft")}
    with shared_engine(model, chosen.tp, **loading) as engine:
        if engine is not None:
            _answer(engine, prompt, prompts, sampling, chosen, out)
    return 0


def _answer(
    engine: Engine,
    prompt: str | None,
    prompts: list[tuple[str, str]] | None,
    sampling: Sampling,
    config: GenerateConfig,
    out: str | None,
) -> None:
    """Generate to a file, to standard output or at a terminal."""
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

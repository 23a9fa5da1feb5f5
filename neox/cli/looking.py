"""Verbs that look: show, inspect and its topics, doctor."""

from __future__ import annotations

import re
from pathlib import Path

from neox.cli.verb import UsageError, Verb, resolve


def show(targets: list[str], options: list[str]) -> None:
    """Show a config and what it costs: parameters, FLOPs, memory, a plan for many GPUs.

    neox show [PRESET] [FILE.toml ...] [key=value ...] [gpu=NAME] [gpus=N] [network=GB/s]

    Without anything, lists the presets. Later files win over earlier ones, key=value over files.
    Where parallel.* asks for several processes, each pipeline stage is rehearsed without a GPU, in
    about a minute: memory, bytes sent, and with gpu= the time of a step, an estimate.

    Options:
      gpu=NAME       a100-40gb, a100-80gb, h100 or h200
      gpus=N         propose layouts on N of them, best first, and plan the best one
      network=GB/s   of a GPU to other hosts, one way, where it is not what the vendor's hosts have

    Examples:
      neox show
      neox show neox-20b
      neox show pythia-160m train.micro_batch_size=8 dtype=bf16
      neox show neox-20b parallel.tp=2 parallel.pp=4 parallel.dp_shard=12 gpu=a100-40gb
      neox show pythia-6.9b dtype=bf16 gpus=16 gpu=h100
    """
    from neox import estimate
    from neox.estimate import layouts

    own, rest = _taken(options, ("gpu", "gpus", "network"))
    if not targets and not options:
        print(estimate.table())
        return
    for key in ("gpus", "network"):
        if key in own and not re.fullmatch(r"[1-9]\d*" if key == "gpus" else r"\d+\.?\d*", own[key]):
            raise ValueError(f"{key}={own[key]}: must be a number above 0")
    if "gpu" not in own and own:
        raise UsageError(f"{' and '.join(own)} also needs gpu=, the name of the GPU")
    config = resolve(targets, rest)
    print(estimate.show(config))
    if "gpu" not in own and layouts.processes(config) == 1:
        return
    from neox.estimate.hardware import gpu
    from neox.estimate.plan import plan
    from neox.estimate.propose import propose

    name = own.get("gpu")
    device = gpu(name, float(own.get("network", 0))) if name else None
    if name and device and "gpus" in own:
        print("", propose(config, int(own["gpus"]), name, device), sep="\n")
    else:
        print("", plan(config, name, device), sep="\n")


def _taken(options: list[str], keys: tuple[str, ...]) -> tuple[dict[str, str], list[str]]:
    """The options with these keys, which are the verb's own, and the others."""
    own = dict(option.split("=", 1) for option in options if option.partition("=")[0] in keys)
    return own, [option for option in options if option.partition("=")[0] not in keys]


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


TOPICS: dict[str, Verb] = {"run": inspect_run, "tokenizer": inspect_tokenizer}
"""Of inspect, in the order of its help."""

"""Verbs that look: show, inspect and its topics, doctor."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from neox.cli.inspect_data import inspect_data
from neox.cli.verb import UsageError, Verb, resolve, taken


def show(targets: list[str], options: list[str]) -> None:
    """Show a config and what it costs: parameters, FLOPs, memory, a plan for many GPUs.

    neox show [PRESET] [FILE.toml ...] [key=value ...] [gpu=NAME] [gpus=N] [network=GB/s]

    Without anything, lists the presets. Later files win over earlier ones, key=value over files.
    Where parallel.* asks for several processes, a dry run of each pipeline stage takes about
    a minute and no GPU: memory, bytes sent, and with gpu= the time of a step, an estimate.

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
    from neox import planning as estimate
    from neox.planning import layouts

    own, rest = taken(options, ("gpu", "gpus", "network"))
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
    from neox.planning.hardware import gpu
    from neox.planning.propose import propose
    from neox.planning.run_plan import plan

    name = own.get("gpu")
    device = gpu(name, float(own.get("network", 0))) if name else None
    if name and device and "gpus" in own:
        print("", propose(config, int(own["gpus"]), name, device), sep="\n")
    else:
        print("", plan(config, name, device), sep="\n")


def inspect(targets: list[str], options: list[str]) -> int | None:
    """Look into runs, their data, tokenizers and parametrisations.

    neox inspect TOPIC ... [key=value ...]

    Topics (`neox inspect TOPIC --help` says more):
      run         curves of one or more runs, and where their options differ, as a page or a picture
      tokenizer   what a tokenizer makes of a text, beside others
      data        the documents of a step, a string in the training data, the steps of a document
      coordinates whether what a model computes keeps its size as the model grows wider (muP)

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

    from neox.analysis.runs import read_runs, summary

    runs = read_runs(targets)
    if out.suffix == ".html":
        from neox.analysis.run_page import write_page as write
    else:
        from neox.analysis.run_picture import write_picture as write
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
    from neox.analysis.tokenizer_report import tokenizer_report

    print(tokenizer_report(targets, texts, text_key))


def inspect_coordinates(targets: list[str], options: list[str]) -> None:
    """Coordinate check: does what a model computes keep its size as the model grows wider?

    neox inspect coordinates [PRESET] [FILE.toml ...] [key=value ...]

    Trains the model at several widths for a few steps, as the standard parametrisation and as muP
    have it, and lays the mean absolute value of its outputs against the width. Where that depends on
    the width, so do the settings that train the model well. Depth and the width of a head stay;
    tokens are random. The base width is model.mup_base_width, or else the smallest of the widths.

    Options:
      widths=64,128,256,512  default: 1, 2, 4 and 8 heads of the model's head_dim
      steps=4                optimizer steps, on one batch at the rate optim.lr
      only=mup               or standard: one of the two
      out=coordinates.png    the picture

    Examples:
      neox inspect coordinates
      neox inspect coordinates pythia-70m widths=64,128,256,512 seq_length=128 optim.lr=1e-2
      neox inspect coordinates recipe.toml only=mup steps=10
    """
    defaults = {"widths": "", "steps": "4", "only": "", "out": "coordinates.png"}
    chosen, rest = taken(options, defaults)
    own, config = defaults | chosen, resolve(targets, rest)
    out, head_dim = Path(own["out"]), config.model.head_dim
    if out.suffix != ".png":
        raise ValueError(f"out={out}: must end in .png")
    if own["only"] not in ("", "mup", "standard"):
        raise ValueError(f"only={own['only']}: must be mup or standard")
    if own["widths"] and not re.fullmatch(r"[1-9]\d{0,8}(,[1-9]\d{0,8})+", own["widths"]):
        raise ValueError(f"widths={own['widths']}: must be two or more whole numbers, such as 64,128,256,512")
    given = own["widths"].split(",") if own["widths"] else [head_dim * heads for heads in (1, 2, 4, 8)]
    widths = sorted({int(width) for width in given})
    if len(widths) < 2:
        raise ValueError(f"widths={own['widths']}: are all the same, a slope needs two")
    if not re.fullmatch(r"[1-9]\d{0,5}", own["steps"]):
        raise ValueError(f"steps={own['steps']}: must be a whole number above 0")
    steps = int(own["steps"])

    import numpy as np

    from neox.analysis.coordinates import at_width, coordinates, table, write_coordinates

    base = config.model.mup_base_width or min(widths)
    kinds = {"standard": None, "mup": base}
    kinds = {kind: width for kind, width in kinds.items() if own["only"] in ("", kind)}
    for width in widths:
        at_width(config.model, width, base)  # what is wrong is said before any is trained
    found = {}
    for kind, start in kinds.items():
        measured = []
        for width in widths:
            sizes, losses = coordinates(config, width, start, steps)
            measured.append(sizes)
            print(f"{kind}, width {width}: loss {losses[0]:.3f}, after {steps} steps {losses[-1]:.3f}", file=sys.stderr)
        found[kind] = np.stack(measured)
    print("Slopes of log(mean absolute value) over log(width); 0: the width does not matter")
    print(table(widths, found))
    write_coordinates(out, widths, found, steps)
    print(f"{out}: written")


def doctor(targets: list[str], options: list[str]) -> int:
    """Examine this machine: versions, speeds, disk, traps, and what mends them.

    neox doctor [out=RUN_DIR]

    Takes some seconds; out= is where runs are to be written (runs). Exit status 1 where something
    that neox needs is broken, else 0.

    Examples:
      neox doctor
      neox doctor out=/scratch/runs
    """
    from neox.system.diagnosis import examine

    if targets or any(not option.startswith("out=") for option in options):
        raise UsageError("doctor takes out=RUN_DIR only")
    return examine(Path(options[-1].partition("=")[2] if options else "runs"))


TOPICS: dict[str, Verb] = {
    "run": inspect_run,
    "tokenizer": inspect_tokenizer,
    "data": inspect_data,
    "coordinates": inspect_coordinates,
}
"""Of inspect, in the order of its help."""

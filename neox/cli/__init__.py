"""The command line: ``neox VERB [TARGET...] key=value ...``.

A verb is a module of this package, and the first line of its docstring its line in ``neox --help``. It has `OPTIONS`,
of which its help is made, and `run(targets, options)`, which returns nothing or an exit status, prints results to
stdout, and raises ValueError or OSError with one line for the user. Nothing is imported but the verb that runs.
"""

from __future__ import annotations

import os
import pkgutil
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import neox
from neox.cli.verb import UsageError

VERBS = ("quickstart", "prepare", "train", "eval", "generate", "convert", "show", "inspect", "bench", "doctor")


OUT_OF_MEMORY = (
    "out of memory: take a smaller model, a shorter context, fewer sequences at a time, dtype=bf16, or packed weights "
    "(weights=int8, weights=int4)"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    0; 1 for an error; 2 for a wrong command; 128 + n after signal n.
    """
    # OpenMP threads spin for milliseconds while they wait, and keep the core from other processes: beside a busy
    # process a token took 80 ms, and takes 12 ms with this (docs/log.md, pythia-160m in int4). GNU's OpenMP reads the
    # variable once, when torch loads it.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        status = _run(list(sys.argv[1:] if argv is None else argv))
        if sys.stdout:  # None where it was closed before the start
            sys.stdout.flush()
    except UsageError as error:
        return _fail(str(error), 2)
    except BrokenPipeError:
        # The reader of the pipe ended (`neox show | head`): without this, Python complains when it flushes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error), 1)
    except ValueError as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return 130
    except MemoryError:
        return _fail(OUT_OF_MEMORY, 1)
    except RuntimeError as error:
        from neox.system.device import is_out_of_memory

        if is_out_of_memory(error):
            asked = re.search(r"[Tt]ried to allocate ([\d.]+ ?\w+)", str(error))
            return _fail(OUT_OF_MEMORY + (f" (tried to allocate {asked[1]})" if asked else ""), 1)
        # By name: their module imports torch.
        if type(error).__name__ == "OtherProcessLost":
            return _fail(str(error), 1)
        if type(error).__name__ != "OtherProcessFailed":
            raise
        return 1  # that process printed the reason
    return status


def _run(argv: list[str]) -> int:
    if argv[:2] == ["help", "options"]:
        from neox.cli.reference import all_options

        print(all_options())
        return 0
    if argv[:1] == ["help"] and len(argv) > 1:
        argv = [*argv[1:], "--help"]
    if not argv or argv[0] in ("--help", "-h", "help"):
        print(_usage())
        return 0
    if argv[0] == "--version":
        print(f"neox {neox.__version__}")
        return 0
    name, arguments = argv[0], argv[1:]
    if name not in VERBS:
        from neox.config.options import did_you_mean

        raise UsageError(f"no verb {name!r}; {did_you_mean(name, VERBS)}")
    verb = _module(name)
    if "--help" in arguments or "-h" in arguments:
        from neox.cli.reference import help_text

        topic = arguments[0] if arguments[0] in getattr(verb, "TOPICS", ()) else ""
        print(help_text(_module(f"{name}_{topic}") if topic else verb))
        return 0
    targets: list[str] = []
    options: list[str] = []
    for argument in arguments:
        if argument.startswith("-") and argument != "-":
            raise UsageError(f"no flag {argument}; options are written key=value, see `neox {name} --help`")
        # A path may hold an equals sign; a key holds no slash and does not start with a dot.
        is_option = re.match(r"[A-Za-z_][\w.]*=", argument)
        (options if is_option else targets).append(argument)
    return verb.run(targets, options) or 0


def _module(name: str) -> Any:
    return import_module(f"neox.cli.{name}")


def _summary(name: str) -> str:
    """First line of a verb's docstring, without importing the verb."""
    source = pkgutil.get_data("neox.cli", f"{name}.py")
    assert source, "verbs are files"
    return source.decode().partition("\n")[0].strip('r"')


def _usage() -> str:
    lines = [
        "neox VERB [TARGET...] key=value ...",
        "",
        "Train, run and study GPT-NeoX language models.",
        "",
        "Verbs:",
        *(f"  {name:<12}{_summary(name)}" for name in VERBS),
        "",
        "Examples:",
        "  neox show neox-20b",
        "  neox prepare corpus.txt out=data/corpus",
        "  neox train pythia-14m data.train=data/corpus out=runs/first",
        "",
        "neox help VERB says more, neox help options lists all options; neox --version prints the version.",
    ]
    return "\n".join(lines)


def _fail(message: str, status: int) -> int:
    # A file's name may hold a terminal's control sequences.
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(message.splitlines()))
    print(f"neox: error: {shown}", file=sys.stderr)
    return status

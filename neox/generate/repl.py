"""Prompts at a terminal, each continued on its own."""

import contextlib
import sys
from collections.abc import Callable

from neox.config import GenerateConfig, load_config
from neox.config.options import spell
from neox.generate.engine import Engine
from neox.generate.sampling import Sampling

HELP = """Type a prompt and Enter; a line that ends in a backslash goes on in the next one.
Ctrl-C stops the answer, Ctrl-D or /quit leaves. /temperature 0.7 sets an option, /help shows all of them;
a prompt that itself begins with / is written with two."""
WITHOUT_MEANING = {"logprobs", "slots"}


def converse(engine: Engine, config: GenerateConfig, read: Callable[[str], str] = input) -> None:
    """Read prompts with `read` (as `input` does) and print their continuations, until EOFError.

    The k-th answer samples with seed + k. An error in a prompt or a command is one line, and the loop continues.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() line editing and a history)
    print(HELP)
    answers = 0
    while True:
        try:
            prompt = _read(read)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        if prompt.strip() in ("/quit", "/exit", "/q"):
            return
        try:
            if prompt.startswith("/") and not prompt.startswith("//"):
                before, config = config, _command(config, prompt)
                answers = answers if config.seed == before.seed else 0
            elif prompt:
                sampling = Sampling.of(config)
                for _ in range(config.n):
                    _answer(engine, prompt.removeprefix("/"), sampling.replace(seed=sampling.seed + answers))
                    answers += 1
        except ValueError as error:
            print(f"neox: error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            answers += 1
            print()


def _read(read: Callable[[str], str]) -> str:
    lines = [read("> ")]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(read(". "))
    return "\n".join(lines)


def _answer(engine: Engine, prompt: str, sampling: Sampling) -> None:
    for piece in engine.stream(prompt, sampling):
        print(piece, end="", flush=True)
    print()


def _command(config: GenerateConfig, line: str) -> GenerateConfig:
    """The options after `/KEY VALUE`; shows them all for /help. Raises ValueError."""
    key, _, value = line[1:].partition(" ")
    names = [name for name in GenerateConfig.model_fields if name not in WITHOUT_MEANING]
    if key == "help":
        print(HELP)
        for name in names:
            print(f"  /{name} {spell(getattr(config, name))}")
        return config
    if key not in names or not value.strip():
        raise ValueError(f"no command {line!r}: it is /help, or /KEY VALUE with one of {', '.join(names)}")
    changed = load_config(overrides=[f"generate.{key}={value}"]).generate
    return config.model_copy(update={key: getattr(changed, key)})

"""Prompts typed at a terminal: by a script of lines, and through a real pseudo-terminal."""

import os
import pty
import select
import signal
import sys
import time

import pytest

import neox
from neox.config import GenerateConfig
from neox.generate import Sampling
from neox.generate.repl import HELP, converse
from tests.generate.conftest import random_engine

CONFIG = GenerateConfig(max_tokens=10, seed=50)


@pytest.fixture
def talk(engine, capsys):
    """Answers and complaints to typed lines; an exception among them is raised in place of a line."""

    def call(*lines, config=CONFIG, engine=engine):
        script = iter([*lines, EOFError()])
        asked = []

        def read(prompt: str) -> str:
            asked.append(prompt)
            line = next(script)
            if isinstance(line, BaseException):
                raise line
            return line

        converse(engine, config, read)
        assert next(script, None) is None
        out, err = capsys.readouterr()
        assert out.startswith(HELP + "\n")
        assert out.endswith("\n")
        return out.removeprefix(HELP + "\n")[:-1], err, asked

    return call


def answers(engine, *pairs) -> str:
    """The engine's answers to (prompt, sampling), a line each."""
    return "".join(engine.generate(prompt, sampling)[0].text + "\n" for prompt, sampling in pairs)


SAMPLING = Sampling.of(CONFIG)


def seeded(number: int) -> Sampling:
    return SAMPLING.replace(seed=50 + number)


def test_each_prompt_is_answered_on_its_own_with_the_next_seed(engine, talk):
    out, err, asked = talk("the quick", "", "the quick", "//the")
    assert out == answers(engine, ("the quick", seeded(0)), ("the quick", seeded(1)), ("/the", seeded(2)))
    assert (err, asked) == ("", ["> "] * 5)


def test_quit_leaves(engine, capsys):
    for word in ("/quit", "/exit", " /q"):
        script = iter(["the", word, "never asked"])
        converse(engine, CONFIG, lambda prompt, script=script: next(script))
        assert next(script) == "never asked", word
        assert capsys.readouterr().out == HELP + "\n" + answers(engine, ("the", seeded(0))), word


def test_n_answers_a_prompt(engine, talk):
    out, _, _ = talk("the", "quick", config=CONFIG.model_copy(update={"n": 2}))
    expected = [("the", seeded(0)), ("the", seeded(1)), ("quick", seeded(2)), ("quick", seeded(3))]
    assert out == answers(engine, *expected)


def test_a_backslash_at_the_end_goes_on_in_the_next_line(engine, talk):
    out, _, asked = talk("the\\", "\\", "quick")
    assert out == answers(engine, ("the\n\nquick", seeded(0)))
    assert asked == ["> ", ". ", ". ", "> "]


def test_ctrl_c_at_the_prompt_starts_over(engine, talk):
    out, err, _ = talk("the\\", KeyboardInterrupt(), "quick")
    assert out == "\n" + answers(engine, ("quick", seeded(0)))
    assert err == ""


def test_ctrl_c_stops_an_answer_and_not_the_program(engine, talk, monkeypatch):
    class Interrupted:
        def stream(self, prompt, sampling):
            if prompt == "the":
                yield "begun"
                raise KeyboardInterrupt
            yield from engine.stream(prompt, sampling)

    out, err, _ = talk("the", "quick", engine=Interrupted())
    assert out == "begun\n" + answers(engine, ("quick", seeded(1)))
    assert err == ""


def test_commands_change_options(engine, talk):
    lines = ["/temperature 0", "the", '/stop ["e", "\\n"]', "/repetition_penalty 1.5", "the", "/seed 9", "fox"]
    out, err, _ = talk(*lines)
    changed = seeded(1).replace(temperature=0.0, stop=("e", "\n"), repetition_penalty=1.5)
    assert out == answers(
        engine, ("the", SAMPLING.replace(temperature=0.0)), ("the", changed), ("fox", changed.replace(seed=9))
    )
    assert err == ""
    out, _, _ = talk("/stop [\"a b\", 'c']", '/logit_bias {" the" = -1}', "/regex [a-c]+", "/stop_tokens [3]", "/help")
    assert out.startswith(HELP)
    assert '  /stop ["a b", "c"]\n' in out
    assert '  /logit_bias [[" the", -1.0]]\n' in out
    assert "  /regex [a-c]+\n" in out
    assert "  /stop_tokens [3]\n" in out
    assert "  /json_schema none\n" in out
    assert "  /temperature 1.0\n" in out
    assert "slots" not in out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/temprature 1", "no command '/temprature 1': it is /help, or /KEY VALUE with one of max_tokens, temperature"),
        ("/temperature", "no command '/temperature'"),
        ("/slots 3", "no command '/slots 3'"),
        ("/temperature -1", "generate.temperature: must be greater than or equal to 0, got -1"),
        ("the " * 80, "tokens, the context 64: shorten the prompt"),
    ],
)
def test_what_is_wrong_is_one_line_and_it_goes_on(engine, talk, line, message):
    out, err, _ = talk(line, "the")
    assert out == answers(engine, ("the", seeded(0)))
    assert err.startswith("neox: error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.slow
def test_at_a_terminal(tmp_path):
    """Line editing, Ctrl-C at the prompt and during an answer, Ctrl-D: through a pseudo-terminal."""
    engine = random_engine(max_position_embeddings=4096)
    neox.save(engine.model, tmp_path / "hf", engine.tokenizer)
    options = ["max_tokens=4", "temperature=0"]
    process, terminal = pty.fork()
    if process == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        command = [sys.executable, "-m", "neox", "generate", str(tmp_path / "hf"), *options]
        os.execve(sys.executable, command, {**os.environ, "TERM": "dumb"})
    seen = b""

    def until(text: str) -> str:
        nonlocal seen
        end = time.monotonic() + 60
        while text.encode() not in seen:
            assert time.monotonic() < end, seen
            if select.select([terminal], [], [], 1)[0]:
                seen += os.read(terminal, 65536)
        before, _, seen = seen.partition(text.encode())
        return before.decode(errors="replace")

    def type_in(keys: str, echo: str | None = None) -> None:
        os.write(terminal, keys.encode())
        until(keys.rstrip("\n") if echo is None else echo)

    def answer(prompt: str) -> str:
        text = engine.generate(prompt, Sampling(max_tokens=4, temperature=0))[0].text
        return text.replace("\n", "\r\n")

    try:
        until("> ")
        type_in("foxx\x7f\n", echo="\r\n")  # a backspace: the line is edited before it is read
        assert answer("fox") in until("> ")
        type_in("the")
        time.sleep(0.3)  # until readline waits again: a signal before that is noticed at the next key only
        type_in("\x03", echo="> ")
        type_in("/max_tokens 4000\n")
        until("> ")
        type_in("/temperature 1\n")
        until("> ")
        type_in("quick\n", echo="quick\r\n")
        assert select.select([terminal], [], [], 60)[0]
        type_in("\x03", echo="^C")
        assert len(until("\r\n> ").encode()) < 3000  # 4000 tokens would be more bytes than that
        type_in("/max_tokens 4\n")
        until("> ")
        type_in("/temperature 0\n")
        until("> ")
        type_in("brown\n", echo="brown\r\n")
        assert answer("brown") in until("> ")
        os.write(terminal, b"\x04")
        assert os.waitpid(process, 0)[1] == 0
        process = 0
    finally:
        if process:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        os.close(terminal)

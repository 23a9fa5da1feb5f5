"""`neox generate` as it is typed: its three modes, and each thing that can be wrong with the command."""

import io
import json

import pytest

import neox
from neox import cli
from neox.generate import Sampling


@pytest.fixture(scope="module")
def folder(engine, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model") / "hf"
    neox.save(engine.model, folder, engine.tokenizer)
    return str(folder)


@pytest.fixture
def generate(folder, capsys):
    """Run the verb on the folder: (exit status, stdout, stderr)."""

    def call(*options: str, model: str = folder) -> tuple[int, str, str]:
        status = cli.main(["generate", model, *options])
        return (status, *capsys.readouterr())

    return call


def test_one_prompt_is_printed_with_its_continuation(engine, generate, monkeypatch):
    text = engine.generate("the quick", Sampling(max_tokens=9, seed=3, top_p=0.9))[0].text
    assert generate("prompt=the quick", "max_tokens=9", "seed=3", "generate.top_p=0.9")[:2] == (0, f"the quick{text}\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("the quick"))
    assert generate("prompt=-", "max_tokens=9", "seed=3", "top_p=0.9")[:2] == (0, f"the quick{text}\n")


def test_the_end_of_document_token_ends_the_text_or_not(generate):
    """With a bias that makes it certain: nothing, or its spelling so often."""
    asked = ["prompt=the", "max_tokens=3", "logit_bias={0 = 100}"]
    assert generate(*asked)[:2] == (0, "the\n")
    assert generate(*asked, "stop_at_eod=false")[:2] == (0, f"the{3 * '<|endoftext|>'}\n")
    assert generate(*asked, "stop_at_eod=false", "stop_tokens=[0]")[:2] == (0, "the\n")


def test_several_samples_are_printed_one_after_another(engine, generate):
    status, out, _ = generate("prompt=", "n=2", "max_tokens=9", "stop=e")
    first, second = (engine.generate("", Sampling(max_tokens=9, seed=seed, stop="e"))[0] for seed in (1234, 1235))
    assert status == 0
    assert out == (
        f"== 1 of 2, seed 1234, {first.finish_reason} ==\n{first.text}\n"
        f"== 2 of 2, seed 1235, {second.finish_reason} ==\n{second.text}\n"
    )


def test_a_file_of_prompts_to_a_file_of_records(engine, generate, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"context": "the"}\n{"prompt": "quick"}\n')
    out = tmp_path / "out.jsonl"
    options = [f"prompts={tmp_path / 'p.jsonl'}", f"out={out}", "n=2", "max_tokens=5", "logprobs=1", 'stop=["x", "e"]']
    assert generate(*options)[:2] == (0, f"{out}: 4 samples\n")
    records = [json.loads(line) for line in out.read_text().splitlines()]
    for record, prompt, seed in zip(records, ["the", "the", "quick", "quick"], range(1234, 1238), strict=True):
        alone = engine.generate(prompt, Sampling(max_tokens=5, seed=seed, stop=["x", "e"]))[0]
        assert (record["prompt"], record["text"], record["seed"]) == (prompt, alone.text, seed)
        assert len(record["logprobs"]) == record["tokens"] == len(alone.tokens)
    status, _, err = generate(*options)
    assert (status, err.partition(": ")[0]) == (1, "neox")
    assert "out.jsonl: exists already" in err


def test_unconditional_samples_go_to_a_file(engine, generate, tmp_path):
    out = tmp_path / "out.jsonl"
    assert generate("prompt=", f"out={out}", "n=5", "max_tokens=5")[:2] == (0, f"{out}: 5 samples\n")
    texts = [json.loads(line)["text"] for line in out.read_text().splitlines()]
    assert texts == [done.text for done in engine.generate([""] * 5, Sampling(max_tokens=5))]


def test_an_interrupt_says_how_to_go_on(generate, tmp_path, monkeypatch):
    from neox.generate import Engine

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_forward", interrupted)
        status, _, err = generate("prompt=the", f"out={tmp_path / 'out.jsonl'}")
    assert status == 130
    assert f"neox: interrupted; the same command continues {tmp_path / 'out.jsonl.partial'}\n" in err
    assert generate("prompt=the", f"out={tmp_path / 'out.jsonl'}")[0] == 0


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ([], 2, "generate needs prompt=TEXT or prompts=FILE; it asks for prompts on a terminal only"),
        (["prompt=a", "prompts=b.txt", "out=c.jsonl"], 2, "prompt= for one or prompts= for a file of them, not both"),
        (["prompts=b.txt"], 2, "prompts= needs out=FILE.jsonl"),
        (["prompt=a", "out=c.txt"], 2, "out=c.txt must end in .jsonl"),
        (["out=c.jsonl"], 2, "out= needs prompt=TEXT or prompts=FILE"),
        (["prompt=a", "logprobs=2"], 2, "log-probabilities go to a file: give out=FILE.jsonl"),
        (["prompt=a", "train.steps=3"], 2, "generate has no option train.steps"),
        (["prompt=a", "temprature=1"], 2, "generate has no option temprature; did you mean temperature?"),
        (["prompt=a", "temperature=-1"], 1, "generate.temperature: must be greater than or equal to 0, got -1"),
        (["prompt=a", "min_p=2"], 1, "generate.min_p: must be less than or equal to 1"),
        (["prompt=a", "repetition_penalty=0"], 1, "generate.repetition_penalty: must be greater than or equal to 0.01"),
        (["prompt=a", "stop="], 1, "generate.stop: a stop text must not be empty"),
        (["prompt=a", "logprobs=-1"], 1, "generate.logprobs: must be greater than or equal to 0"),
        (["prompt=a", 'logit_bias={"the quick" = 1}'], 1, "generate.logit_bias: 'the quick' is 2 tokens ["),
        (["prompt=a", "logit_bias=3"], 1, 'generate.logit_bias: must be a table such as {" the" = -100, 262 = 5}'),
        (["prompt=a", "stop_tokens=[999]"], 1, "generate.stop_tokens: 999 is no token: they are 0 to"),
        (["prompt=a", "regex=a("], 1, "generate.regex: character 2: unclosed group"),
        (["prompt=a", 'json_schema={"type": "x"}'], 1, "generate.json_schema: Invalid type: x (at #)"),
        (["prompt=a", "grammar=absent.lark"], 1, "generate.grammar: absent.lark: No such file or directory; give a"),
        (["prompt=a", "regex=a", "json_schema={}"], 1, "generate.json_schema and generate.regex: give one of them"),
        (["prompt=a", "n=0"], 1, "generate.n: must be greater than 0"),
        (["prompt=a", "slots=0"], 1, "generate.slots: must be greater than 0"),
        (["prompts=absent.txt", "out=c.jsonl"], 1, "absent.txt: no such file"),
        ([f"prompt={'the ' * 80}"], 1, "tokens, the context 64: shorten the prompt"),
    ],
)
def test_errors_are_one_line(generate, monkeypatch, options, status, message):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    found, out, err = generate(*options)
    assert (found, out) == (status, "")
    assert err.startswith("neox: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_the_files_are_looked_at_before_the_model(generate, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "out.jsonl").write_text("mine")
    absent = str(tmp_path / "no-model")
    out = f"out={tmp_path / 'out.jsonl'}"
    assert "no prompt in it" in generate(f"prompts={tmp_path / 'empty.txt'}", out, model=absent)[2]
    assert "out.jsonl: exists already" in generate("prompt=a", out, model=absent)[2]


def test_one_model_is_needed(capsys):
    assert cli.main(["generate", "prompt=a"]) == cli.main(["generate", "a", "b", "prompt=a"]) == 2
    assert capsys.readouterr().err.count("generate needs one MODEL") == 2

"""What a model writes while it learns: at the right steps, the engine's own text, and training does not notice."""

import random

import numpy as np
import pytest
import torch

from neox import cli
from neox.analysis.sample_hook import SampleHook
from neox.config import load_config
from neox.generate import Engine, Sampling
from neox.tokenizer import Tokenizer
from neox.train import Trainer
from neox.train.metrics import read_rows
from tests.parallel.helpers import together
from tests.train.helpers import TINY, assert_same_run, cut_back, token_pair


@pytest.fixture
def options(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("".join(f"{i} times {i} is {i * i}\n" for i in range(600)))
    return (*TINY, "model.vocab_size=512", "tokenizer.vocab_size=300", f"data.train={text}", "checkpoint.every=2")


SAMPLED = ("log.sample_every=3", "log.sample_prompt=3 times", "log.sample_tokens=6", "generate.seed=5")


def fit(tmp_path, name, *options, before=(), after=()):
    config = load_config(overrides=[*options, f"out={tmp_path / name}"])
    Trainer(config, hooks=(*before, SampleHook(config), *after), quiet=True).fit()
    return tmp_path / name


def test_training_with_the_sample_hook_is_bit_identical(tmp_path, options):
    """Losses, weights and optimizer state bit for bit; torch's random stream and the model's mode as they were."""
    states = []

    def look(trainer, step):
        modes = [module.training for module in trainer.model.modules()]
        states.append((torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist(), modes))

    plain = fit(tmp_path, "plain", *options, "steps=6")
    sampled = fit(tmp_path, "sampled", *options, "steps=6", *SAMPLED, before=(look,), after=(look,))
    assert [row["step"] for row in read_rows(sampled / "samples.jsonl")] == [0, 3, 6]
    assert not (plain / "samples.jsonl").exists()
    assert_same_run(sampled, plain, tmp_path)
    assert len(states) == 2 * 7
    for (stream, *before), (stream_after, *after) in zip(states[::2], states[1::2], strict=True):
        assert torch.equal(stream, stream_after)
        assert before == after


def test_sample_text_is_that_of_the_engine(tmp_path, options):
    made = []

    def engine(trainer, step):
        if step % 3 == 0 or step == 4:
            tokenizer = Tokenizer.from_file(trainer.run / "tokenizer.json")
            sampling = Sampling(max_tokens=6, temperature=0.7, top_k=20, top_p=0.9, seed=5)
            made.append((step, Engine(trainer.model, tokenizer).generate("3 times", sampling)[0].text))

    drawn = ("temperature=0.7", "top_k=20", "top_p=0.9")
    run = fit(tmp_path, "run", *options, "steps=4", *SAMPLED, *drawn, after=(engine,))
    found = read_rows(run / "samples.jsonl")
    assert [(row["step"], row["text"]) for row in found] == made
    assert {row["prompt"] for row in found} == {"3 times"}


def many(options, out):
    config = load_config(overrides=[*options, f"out={out}"])
    Trainer(config, hooks=(SampleHook(config),), quiet=True).fit()


@pytest.mark.parametrize(
    "parallel", [pytest.param("parallel.zero=1", marks=pytest.mark.slow), "parallel.zero=3", "parallel.pp=2"]
)
def test_sample_hook_on_several_processes(tmp_path, options, parallel):
    """Also before the first step, when a sharded parameter is gathered for the first time."""
    options = (*options, "steps=4", "optim.eps=1e-3")
    alone = fit(tmp_path, "alone", *options, *SAMPLED)
    options = (*options, parallel)
    together(2, tmp_path / "ranks", many, (*options, *SAMPLED), tmp_path / "two")
    together(2, tmp_path / "ranks", many, options, tmp_path / "plain")
    assert read_rows(tmp_path / "two" / "samples.jsonl") == read_rows(alone / "samples.jsonl")
    assert_same_run(tmp_path / "two", tmp_path / "plain", tmp_path)


def test_an_empty_sample_prompt_begins_a_document(tmp_path, options):
    run = fit(tmp_path, "run", *options, "steps=1", "log.sample_every=1", "log.sample_tokens=3")
    assert [(row["step"], row["prompt"]) for row in read_rows(run / "samples.jsonl")] == [(0, ""), (1, "")]


@pytest.mark.parametrize("kept", [0, 4])
def test_a_resumed_run_has_the_samples_of_an_undisturbed_one(tmp_path, options, kept, capsys):
    saves = ("checkpoint.early=0", f"checkpoint.every={kept}")  # 0: none was due when it was killed
    run = fit(tmp_path, "run", *options, *saves, "steps=6", "log.sample_every=2", "log.sample_tokens=5")
    cut = cut_back(run, tmp_path / "cut", kept)
    assert cli.main(["train", f"resume={cut}"]) == 0
    assert (cut / "samples.jsonl").read_bytes() == (run / "samples.jsonl").read_bytes()
    assert [row["step"] for row in read_rows(cut / "samples.jsonl")] == [0, 2, 4, 6]
    told = [line for line in capsys.readouterr().err.splitlines() if "a sample: " in line]
    assert [line.split(",")[0] for line in told] == [f"step {s}" for s in (0, 2, 4, 6) if s > kept or not kept]


def test_sample_hook_without_tokenizer_or_room_fails_before_the_first_step(tmp_path, options):
    pair = token_pair(tmp_path / "pair")
    with pytest.raises(ValueError, match=r"no tokenizer to write text with: set tokenizer.path, or log.sample_every=0"):
        fit(tmp_path, "a", *TINY, f"data.train={pair}", "steps=2", "log.sample_every=1")
    short = ("max_position_embeddings=32", f"log.sample_prompt={'seven ' * 50}")
    with pytest.raises(ValueError, match=r"log.sample_prompt: has \d+ tokens, the context 32: shorten it"):
        fit(tmp_path, "b", *options, "steps=2", "log.sample_every=1", *short)
    for name in "ab":
        assert read_rows(tmp_path / name / "metrics.jsonl") == []

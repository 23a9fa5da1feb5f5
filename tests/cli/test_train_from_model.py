"""A new run from an existing model or from tokens: nothing has to be typed again."""

import pytest
import torch

import neox
from neox import cli
from neox.config import load_config
from neox.tokenizer import train_bpe
from tests.tiny import ours
from tests.train.helpers import TINY, one_line

TEXT = "".join(f"{i} and {i} is {2 * i}\n" for i in range(900))
FAST = ("steps=1", "micro_batch_size=2", "global_batch_size=2", "device=cpu", "log.every=1", "schedule.warmup=0")


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    tokenizer = train_bpe([TEXT], 288, progress=False)
    neox.save(ours(vocab_size=300, num_hidden_layers=3, hidden_act="gelu_fast"), "model", tokenizer)
    return tokenizer


@pytest.mark.parametrize("how", ["target", "train.init", "run", "step"])
def test_a_run_from_a_model_has_its_shape_vocabulary_and_tokenizer(place, how, capsys):
    source = "model"
    if how in ("run", "step"):
        assert cli.main(["train", "model", "data.train=text.txt", "out=before", *FAST]) == 0
        source = "before" if how == "run" else "before/step_00000001"
    target = [source] if how != "train.init" else [f"train.init={source}"]
    still = ("optim.lr=1e-12", "schedule.min_lr=0")
    assert cli.main(["train", *target, "data.train=text.txt", "out=run", *FAST, *still]) == 0, capsys.readouterr().err
    model, tokenizer = neox.load("run")
    assert model.config == neox.load(source)[0].config
    assert tokenizer.sha256 == place.sha256
    start = neox.load(source)[0].state_dict()
    assert all(torch.allclose(value, start[name], atol=1e-9) for name, value in model.state_dict().items())
    assert load_config(files=["run/config.toml"]).train.init == source


def test_options_of_the_command_win_over_those_of_the_model(place):
    more = ("model.rope_scaling=linear", "model.rope_factor=2", "model.hidden_dropout=0.1")
    assert cli.main(["train", "model", "data.train=text.txt", "out=run", *FAST, *more]) == 0
    config = neox.load("run")[0].config
    assert (config.rope_scaling, config.hidden_dropout, config.hidden_act) == ("linear", 0.1, "gelu_fast")


def test_tokens_of_another_tokenizer_than_the_models_are_an_error(place, capsys):
    other = train_bpe(["quite another text than that"], 284, progress=False)
    other.save("other.json")
    assert cli.main(["prepare", "text.txt", "out=tokens", "tokenizer=other.json"]) == 0
    capsys.readouterr()
    assert cli.main(["train", "model", "data.train=tokens", "out=run", *FAST]) == 1
    one_line(capsys.readouterr().err, "tokens: made with another tokenizer than")


def test_the_vocabulary_follows_from_the_tokens_unless_given(place):
    place.save("tokenizer.json")
    assert cli.main(["prepare", "text.txt", "out=tok.v1", "tokenizer=tokenizer.json"]) == 0
    shape = [one for one in TINY if "vocab_size" not in one]
    for out, more, size in (
        ("a", ("data.train=tok.v1",), 384),
        ("b", ("data.train=text.txt", "tokenizer.path=tokenizer.json"), 384),
        ("c", ("data.train=tok.v1.bin", "model.vocab_size=512"), 512),
    ):
        assert cli.main(["train", *shape, *more, f"out={out}", "steps=1"]) == 0, out
        model, tokenizer = neox.load(out)
        assert model.config.vocab_size == size, out
        assert tokenizer.sha256 == place.sha256, out

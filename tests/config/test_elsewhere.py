"""Words of other programs: the error names the option that means them."""

import pytest

from neox.cli import main
from neox.config import ConfigError, load_config
from neox.config.elsewhere import KEYS, NOTES, VALUES
from neox.config.options import SECTIONS

OPTIONS = {f"{section}.{key}" for section, cls in SECTIONS.items() for key in cls.model_fields}


def error(override: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=[override])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_word_from_elsewhere_is_answered_with_our_option():
    assert set(KEYS.values()) <= OPTIONS
    assert set(NOTES) <= set(KEYS)
    for word, option in KEYS.items():
        assert f"no such key; here it is {option}" in error(f"{word}=1"), word
        section = option.partition(".")[0]
        if f"{section}.{word}" not in OPTIONS:
            assert f"here it is {option}" in error(f"{section}.{word}=1"), word
    for word in ("learning_rate", "max_steps", "num_train_epochs", "gradient_accumulation_steps", "output_dir",
                 "train_iters", "epochs", "optimizer", "pipe_parallel_size", "block_size", "temp"):  # fmt: skip
        assert word in KEYS, word


def test_values_from_elsewhere_are_answered_or_taken():
    for word, ours in VALUES.items():
        assert f"; write {ours} (from " in error(f"train.dtype={word}"), word
    assert load_config(overrides=["train.guard=False"]).train.guard is False
    assert load_config(overrides=["log.tensorboard=True"]).log.tensorboard is True
    assert "log.wandb: true names no project: log.wandb=my-project" in error("log.wandb=true")
    assert load_config(overrides=["log.wandb=my-project"]).log.wandb == "my-project"
    assert load_config(overrides=["log.wandb=none"]).log.wandb is None
    for override in ("schedule=linear", "lr_scheduler=linear"):
        assert "schedule.name" in error(override), override


def test_white_space_counts_in_texts_only():
    for override, expected in {
        "stop= quick": (" quick",),
        "stop=\n": ("\n",),
        r"stop=\n": ("\n",),
        r"stop=\n\n": ("\n\n",),
        r"stop=\nabla": (r"\nabla",),
        'stop=[" a", "b "]': (" a", "b "),
        "regex= a": " a",
        "log.sample_prompt=The ": "The ",
    }.items():
        key = override.partition("=")[0].rpartition(".")[2]
        config = load_config(overrides=[override])
        section = config.log if key == "sample_prompt" else config.generate
        assert getattr(section, key) == expected, override
    assert load_config(overrides=["steps= 5 "]).train.steps == 5
    assert load_config(overrides=["lr= 1e-3"]).optim.lr == 1e-3


def test_text_given_as_a_run_file_names_the_option(tmp_path, capsys):
    (tmp_path / "corpus.txt").write_text("words")
    assert main(["train", str(tmp_path / "corpus.txt")]) == 2
    assert f"text to train on is data.train={tmp_path / 'corpus.txt'}" in capsys.readouterr().err


def test_help_of_a_verb_and_of_all_options(capsys):
    assert main(["help", "train"]) == 0
    said = capsys.readouterr().out
    assert main(["train", "--help"]) == 0
    assert capsys.readouterr().out == said
    assert main(["help", "options"]) == 0
    said = capsys.readouterr().out
    assert all(f"`{option.partition('.')[2]}`" in said or option in said for option in OPTIONS)

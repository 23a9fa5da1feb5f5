"""Options of a verb: text as it was typed, lists in parts, keys of the config's sections, errors with their source."""

import sys

import pytest

from neox import cli
from neox.cli.generate import GenerateOptions
from neox.cli.inspect_tokenizer import InspectTokenizerOptions
from neox.cli.prepare import PrepareOptions
from neox.cli.verb import UsageError, read_all, read_options
from neox.config import ConfigError


def test_text_options_of_a_verb_are_taken_verbatim():
    for text in ("", " a ", '"quoted"', "none", "3", "[1]", "a=b", "2024-01-01", "true", "\n"):
        assert read_all("generate", GenerateOptions, [f"prompt={text}"]).prompt == text
    assert read_all("generate", GenerateOptions, []).prompt is None


def test_a_list_option_of_a_verb_comes_whole_or_in_parts():
    for texts, expected in (
        (["text=a"], ("a",)),
        (["text=a", "text=b"], ("a", "b")),
        (['text=["a", "b"]', "text=c"], ("a", "b", "c")),
    ):
        assert read_all("inspect tokenizer", InspectTokenizerOptions, texts).text == expected


def test_keys_of_a_section_are_read_with_and_without_its_name():
    texts = ["data.text_key=body", "tokenizer.vocab_size=300", "digits=single", "workers=2", "out=x"]
    chosen = read_all("prepare", PrepareOptions, texts)
    assert (chosen.text_key, chosen.vocab_size, chosen.digits, chosen.workers) == ("body", 300, "single", 2)
    others = ["data.vocab_size=3", "tokenizer.text_key=x", "train.steps=3", "generate.out=x", "stepz=3"]
    assert read_options(PrepareOptions, others)[1] == others


def test_errors_name_the_section_and_what_was_typed():
    for text, expected in (
        ("vocab_size=none", "tokenizer.vocab_size: must be a valid integer, got 'none' (from vocab_size=none)"),
        ("workers=-1", "data.workers: must be greater than or equal to 0, got -1 (from workers=-1)"),
        ("dedup=fuzzy", "data.dedup: must be 'exact' or 'minhash', got 'fuzzy' (from dedup=fuzzy)"),
    ):
        with pytest.raises(ConfigError) as caught:
            read_all("prepare", PrepareOptions, [text])
        assert str(caught.value) == expected
    with pytest.raises(UsageError, match=r"^prepare has no option worker; did you mean workers\?$"):
        read_all("prepare", PrepareOptions, ["worker=3"])


def test_train_imports_the_sample_hook_only_where_it_is_asked_for(monkeypatch, tmp_path, capsys):
    """The hook brings engine, kernels and grammar with it."""
    monkeypatch.setitem(sys.modules, "neox.analysis.sample_hook", None)
    monkeypatch.setattr("neox.train.Trainer.fit", lambda trainer: pytest.fail("made"))
    command = ["train", "data.train=corpus", "train.device=cpu", f"out={tmp_path / 'run'}"]
    with pytest.raises(pytest.fail.Exception, match="made"):
        cli.main(command)
    with pytest.raises(ImportError):
        cli.main([*command, "log.sample_every=5"])

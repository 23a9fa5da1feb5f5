"""One description an option: help, the guides' tables and the JSON schema are made from the fields."""

import importlib
import json
import re
import tomllib
from pathlib import Path

import pytest

from neox import cli
from neox.cli import reference
from neox.cli.inspect import TOPICS
from neox.config import SECTIONS, Config, load_config, presets
from neox.config.options import section_of

ROOT = Path(__file__).resolve().parents[2]
GUIDES = sorted((ROOT / "docs").glob("*.md"))
MODULES = [importlib.import_module(f"neox.cli.{name}") for name in (*cli.VERBS, *(f"inspect_{t}" for t in TOPICS))]


def groups(module) -> tuple:
    return module.OPTIONS if isinstance(module.OPTIONS, tuple) else (module.OPTIONS,)


def test_option_tables_of_the_guides_are_fresh():
    marked = 0
    for path in GUIDES:
        text = path.read_text()
        marked += len(reference.MARKED.findall(text))
        assert text.count("<!-- options ") == text.count("<!-- end of options -->"), path
        assert reference.with_tables(text) == text, f"{path} is stale: run `make reference`"
    assert marked >= 4
    assert reference.all_options() == (ROOT / "docs" / "options.md").read_text(), "run `make reference`"


def test_a_stale_table_is_made_anew():
    text = "a\n<!-- options generate: top_k n -->\n| stale |\n<!-- end of options -->\nb\n"
    fresh = reference.with_tables(text)
    assert "stale" not in fresh
    assert re.findall(r"^\| `(\w+)` \|", fresh, flags=re.M) == ["top_k", "n"]
    assert fresh.startswith("a\n<!-- options generate: top_k n -->\n| option |")
    assert fresh.endswith("\n<!-- end of options -->\nb\n")
    with pytest.raises(KeyError):
        reference.with_tables(text.replace("top_k", "top_q"))


def test_help_describes_each_option_of_a_verb():
    for module in MODULES:
        text = " ".join(reference.help_text(module).split())
        for group in groups(module):
            if isinstance(group, str):
                section, _, key = group.partition(".")
                options = [(group, SECTIONS[section].model_fields[key])]
            else:
                options = list(group.model_fields.items())
            for key, field in options:
                assert f" {key}=" in text, (module, key)
                assert " ".join(field.description.split()) in text, (module, key)


FRAGMENT = re.compile(r"(The same|Same|Also|How|Of|What|Which|Whether|Those|These|They|It|Its|Where|Who|And|None|As)\b")


def test_each_description_makes_sense_alone():
    """No fragment, no reference to the option above it; neither in a section nor in a verb's own options."""
    classes = [
        *SECTIONS.values(),
        *(group for module in MODULES for group in groups(module) if isinstance(group, type)),
    ]
    for cls in classes:
        for key, field in cls.model_fields.items():
            assert field.description, (cls, key)
            text = " ".join(field.description.split())
            assert re.match(r"[A-Z0-9]|muP", text), f"{key}: {text}"
            assert not FRAGMENT.match(text), f"{key}: {text}"
            assert text.endswith("."), f"{key}: {text}"
            assert "so many" not in text, f"{key}: {text}"


def test_the_pattern_of_fragments_finds_them():
    for text in (
        "The same, held out.",
        "How many steps are.",
        "Of initialisation, data order and dropout.",
        "What they share.",
    ):
        assert FRAGMENT.match(text), text


def test_no_verb_option_hides_one_of_the_config():
    """An option of a verb that takes the config's too: the config's bare key of that name would be out of reach."""
    hidden = {
        (module.__name__.rpartition(".")[2], key)
        for module in MODULES
        for group in groups(module)
        if isinstance(group, type)
        for key in group.model_fields
        if not section_of(group, key) and any(key in cls.model_fields for cls in SECTIONS.values())
    }
    takes_config = {"show", "train", "inspect_data", "inspect_coordinates"}
    known = {
        ("inspect_data", "limit"),
        ("inspect_data", "out"),
        ("inspect_coordinates", "steps"),
        ("inspect_coordinates", "out"),
    }
    assert {one for one in hidden if one[0] in takes_config} == known


def test_config_schema_takes_every_preset_and_refuses_an_unknown_key(tmp_path, capsys):
    jsonschema = pytest.importorskip("jsonschema")
    path = tmp_path / "schema.json"
    assert cli.main(["show", f"config_schema={path}"]) == 0
    assert str(path) in capsys.readouterr().out
    schema = json.loads(path.read_text())
    assert {s: set(schema["$defs"][cls.__name__]["properties"]) for s, cls in SECTIONS.items()} == {
        s: set(cls.model_fields) for s, cls in SECTIONS.items()
    }
    check = jsonschema.Draft7Validator(schema)
    for name in presets.names():
        check.validate(tomllib.loads(load_config(name).to_toml()))
    check.validate(tomllib.loads(Config().to_toml()))
    for recipe in (ROOT / "recipes").glob("*.toml"):
        check.validate(tomllib.loads(recipe.read_text()))
    check.validate({"generate": {"logit_bias": {" the": -100}}})
    for wrong in (
        {"train": {"stepz": 3}},
        {"train": {"steps": "3"}},
        {"preset": "neox-21b"},
        {"model": {"hidden_act": "x"}},
    ):
        assert not check.is_valid(wrong), wrong

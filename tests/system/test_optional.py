"""Optional packages: one message that names the extra, and the name of the distribution in every text."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from neox.system.optional import DISTRIBUTION, check_installed, optional

ROOT = Path(__file__).parents[2]


def test_a_missing_package_of_an_extra_names_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert optional("json", "a test", "data").loads("1") == 1
    check_installed("json", "a test", "data")
    command = re.escape("pip install 'neox-lm[data]'")
    with pytest.raises(ValueError, match=rf"^a test: needs the package no-such-thing \(.*\): {command}$"):
        optional("no_such_thing.part", "a test", "data")
    with pytest.raises(ValueError, match=rf"^a test: needs the package no-such-thing \(not installed\): {command}$"):
        check_installed("no_such_thing", "a test", "data")
    # A package that is there and lacks one of its own.
    monkeypatch.setitem(sys.modules, "json.decoder", None)
    monkeypatch.delitem(sys.modules, "json")
    with pytest.raises(ValueError, match="needs the package json \\(.*json.decoder"):
        optional("json", "a test", "data")


def test_no_text_names_the_distribution_of_another_project() -> None:
    """`neox` on the package index is a robotics package: its extras would install a stranger's code."""
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["name"] == DISTRIBUTION == "neox-lm"
    wrong = re.compile(rb"\bneox" + rb"\[[a-z{]|pip3? install (-U |--upgrade )?['\"]?neox(?![-/\w])")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    files = [ROOT / name.decode() for name in names if name]
    assert [str(path) for path in files if path.is_file() and wrong.search(path.read_bytes())] == []

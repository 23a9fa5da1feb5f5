"""The README's commands run as they stand, in order, in a copy of the repository's text."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_it_is_short_and_its_links_lead_somewhere():
    assert len(README.splitlines()) <= 150
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / target).exists(), target
    for path in re.findall(r"`((?:neox|tests|benchmarks|docs|recipes)/[\w./]*)`", README):
        assert (ROOT / path).exists(), path


def test_its_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_its_examples_run(tmp_path):
    (commands,) = blocks("bash")
    (program,) = blocks("python")
    shutil.copy(ROOT / "README.md", tmp_path)
    for folder in ("docs", "recipes"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    binaries = tmp_path / "bin"
    binaries.mkdir()
    script = binaries / "neox"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m neox "$@"\n')
    script.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
    }
    lines = [line for line in commands.splitlines() if line]
    assert len(lines) == 7
    outputs = {}
    for line in lines:
        done = subprocess.run(
            ["sh", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        outputs[line.split()[1]] = done.stdout
    assert "162,322,944" in outputs["show"]
    assert outputs["generate"].startswith("The model ")
    assert re.search(r"\| sums .* acc ", outputs["eval"])
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "exported-again" / "tokenizer.json").exists()


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda path: path.name)
def test_every_recipe_is_short_and_valid(recipe):
    from neox.config import load_config

    assert len(recipe.read_text().splitlines()) <= 30
    load_config(files=[recipe])

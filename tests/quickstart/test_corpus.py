"""The corpus: the same bytes everywhere, a split by file, and one line where an install differs."""

import base64
import csv
import hashlib
import importlib.metadata
import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

from neox.quickstart import corpus as module
from neox.quickstart.corpus import (
    PACKAGES,
    build_corpus,
    docstring_bytes,
    is_heldout,
    is_readable,
    locate_packages,
    manifest_lines,
    read_manifest,
)

# sha256 over all texts and the split: what "byte-identical on every machine" means.
DIGEST = "b07b4ac33d08ede3ea9157821c9e264cc736ec9e3b5e8cc8baa12b9fe1f4d19c"


@pytest.fixture(scope="module")
def corpus():
    return build_corpus()


@pytest.fixture
def copies(tmp_path):
    """A copy of every file that the manifest names, and the folders to read them from."""
    folders = locate_packages()
    for _, _, path in read_manifest()[1]:
        package, rest = path.split("/", 1)
        target = tmp_path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((folders[package] / rest).read_bytes())
    return {package: tmp_path / package for package in PACKAGES}


def test_pinned_install_gives_the_pinned_bytes(corpus):
    assert corpus.note is None
    assert corpus.changed == corpus.missing == []
    assert corpus.digest == DIGEST
    assert corpus.pinned_files == len(corpus.train) + len(corpus.heldout) == 678


@pytest.mark.slow
def test_manifest_is_the_rule_applied_to_this_install():
    shipped = Path(module.__file__).with_name("corpus_manifest.txt").read_text(encoding="utf-8")
    assert "\n".join(manifest_lines()) + "\n" == shipped
    assert len(shipped) < 120_000


def test_manifest_agrees_with_what_pip_recorded():
    versions, entries = read_manifest()
    assert set(versions) == set(PACKAGES)
    recorded = {}
    for package in PACKAGES:
        assert importlib.metadata.version(package) == versions[package]
        record = importlib.metadata.distribution(package).read_text("RECORD")
        assert record is not None
        recorded.update({path: (digest, size) for path, digest, size in csv.reader(record.splitlines())})
    for prefix, size, path in entries:
        digest, recorded_size = recorded[path]
        sha = base64.urlsafe_b64decode(digest.removeprefix("sha256=") + "=").hex()
        assert (sha[: len(prefix)], str(size)) == (prefix, recorded_size), path


def test_corpus_sizes(corpus):
    assert 10e6 < len(corpus.train_bytes) < 15e6
    assert 400e3 < len(corpus.heldout_bytes) < 500e3
    assert sum(corpus.package_bytes.values()) == len(corpus.train_bytes) + len(corpus.heldout_bytes)
    assert {path.split("/")[0] for path, _ in corpus.heldout} == set(PACKAGES)


def test_split_is_by_file_and_each_text_is_the_file(corpus):
    train, heldout = dict(corpus.train), dict(corpus.heldout)
    assert not train.keys() & heldout.keys()
    assert len(train) == len(corpus.train)
    folders = locate_packages()
    for path, text in random.Random(0).sample(corpus.train, 20) + corpus.heldout:
        raw = (folders[path.split("/")[0]].parent / path).read_bytes()
        assert text == unicodedata.normalize("NFC", raw.decode())
        assert (path in heldout) == is_heldout(path)
    assert not set(train.values()) & set(heldout.values())


def test_split_does_not_depend_on_order_or_on_other_files(corpus, copies):
    for package in ("sympy", "mpmath"):
        del copies[package]
    rest = build_corpus(copies)
    assert rest.heldout == [(path, text) for path, text in corpus.heldout if path.split("/")[0] in copies]
    assert rest.train == [(path, text) for path, text in corpus.train if path.split("/")[0] in copies]
    paths = [path for path, _ in corpus.train]
    assert paths == sorted(paths)


def test_tests_tables_and_generated_parsers_are_left_out(corpus):
    paths = [path for path, _ in corpus.train + corpus.heldout]
    assert not [path for path in paths if {"tests", "test", "_antlr"} & set(path.split("/")) or "/test_" in path]
    assert "sympy/polys/numberfields/resolvent_lookup.py" not in paths
    assert "mpmath/functions/zetazeros.py" not in paths
    assert "sympy/core/expr.py" in paths


def test_a_changed_a_missing_and_an_undecodable_file(corpus, copies):
    paths = [path for path, _ in corpus.train]
    changed, missing, broken = paths[3], paths[50], paths[-1]
    root = copies["sympy"].parent
    (root / changed).write_text("something else\n", encoding="utf-8")
    (root / missing).unlink()
    (root / broken).write_bytes(b"\xff\xfe not UTF-8")
    found = build_corpus(copies)
    assert found.changed == [changed]
    assert found.missing == [missing, broken]
    texts = dict(found.train)
    assert texts[changed] == "something else\n"
    assert texts.keys() == set(paths) - {missing, broken}
    assert found.heldout == corpus.heldout
    assert found.digest != corpus.digest
    assert found.note is not None
    assert "\n" not in found.note
    assert f"3 of {corpus.pinned_files} files differ" in found.note
    versions = read_manifest()[0]
    for path in (changed, missing, broken):
        package = path.split("/")[0]
        assert f"pinned {versions[package]}" in found.note
    assert "Going on" in found.note


def test_another_version_is_named(monkeypatch, copies):
    monkeypatch.setattr(module, "installed_version", lambda package: "9.9" if package == "sympy" else None)
    (copies["sympy"] / "core" / "expr.py").write_text('"""New."""\n', encoding="utf-8")
    del copies["jinja2"]
    note = build_corpus(copies).note
    assert "sympy: 1 changed (found 9.9, pinned 1.14.0)" in note
    assert "(found nothing, pinned 3.1.6)" in note


def test_line_ends_and_byte_order_marks_make_no_difference(corpus, copies):
    for i, path in enumerate(sorted(copies["networkx"].rglob("*.py"))):
        data = path.read_bytes()
        path.write_bytes(data.replace(b"\n", b"\r\n") if i % 2 else b"\xef\xbb\xbf" + data.replace(b"\n", b"\r"))
    found = build_corpus(copies)
    assert found.note is None
    assert found.digest == corpus.digest


def test_nothing_to_read_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"no text to train on: 678 of 678 files .* pip install") as error:
        build_corpus({})
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="no text to train on"):
        build_corpus({package: tmp_path / package for package in PACKAGES})


def test_building_imports_none_of_the_packages():
    code = (
        "import sys; from neox.quickstart.corpus import build_corpus; build_corpus();"
        "print([name for name in ('torch', 'sympy', 'networkx', 'mpmath', 'jinja2') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_docstring_bytes():
    for source, literals in (
        ("x = 1\n", []),
        ('"""Module."""\n', ['"""Module."""']),
        ("def f():\n    'é'\n    'not one'\n", ["'é'"]),
        ("class A:\n    r'''a\n    b\\d'''\n    async def f(self):\n        \"c\"\n", ["r'''a\n    b\\d'''", '"c"']),
        ("def f(): 'one line'\n", ["'one line'"]),
        ("x = 1\n'no docstring, it is not first'\n", []),
        ("def f():\n    f'{1}'\n", []),
        ("'a' 'b'\n", ["'a' 'b'"]),
    ):
        assert docstring_bytes(source) == sum(len(literal.encode()) for literal in literals), source


def test_readable_is_a_third_of_docstrings_and_at_most_a_quarter_of_digits():
    doc = '"' + "d" * 28 + '"'  # 30 bytes
    assert is_readable(doc + "\n" + "x" * 59)  # 30 of 90
    assert not is_readable(doc + "\n" + "x" * 60)
    assert is_readable('"' + "d" * 58 + '"' + "\n0x" + "1" * 17)  # 18 digits of 80
    assert not is_readable('"' + "1" * 28 + '"')
    assert not is_readable("")


def test_digest_tells_texts_and_split_apart(corpus):
    import dataclasses

    moved = dataclasses.replace(corpus, train=corpus.train[:-1], heldout=[corpus.train[-1], *corpus.heldout])
    (path, text), *rest = corpus.train
    (next_path, next_text), *others = rest
    shifted = dataclasses.replace(corpus, train=[(path, text + next_text[:1]), (next_path, next_text[1:]), *others])
    assert len({corpus.digest, moved.digest, shifted.digest}) == 3


def test_joined_bytes_are_the_texts_in_order(corpus):
    assert (
        hashlib.sha256(corpus.train_bytes).digest()
        == hashlib.sha256("".join(text for _, text in corpus.train).encode()).digest()
    )
    assert corpus.heldout_bytes.decode() == "".join(text for _, text in corpus.heldout)

"""Compressors: against the command-line tools, against zlib, and against what must hold for any text."""

import gzip
import random
import shutil
import subprocess
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neox.quickstart import baselines as module
from neox.quickstart.baselines import compressor_baselines, start_baselines
from neox.quickstart.corpus import build_corpus


@pytest.fixture(scope="module")
def texts():
    corpus = build_corpus()
    return corpus.train_bytes[:600_000], corpus.heldout_bytes[:100_000]


def tool_size(command, data):
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    return len(subprocess.run(command, input=data, capture_output=True, check=True).stdout)


def test_gzip_is_the_command_line_tool_to_one_percent(texts):
    # GNU gzip has a deflate of its own, so sizes differ by a few bytes per thousand.
    ours = compressor_baselines(b"", texts[1])["gzip"]
    assert ours == pytest.approx(8 * tool_size(["gzip", "-9"], texts[1]) / len(texts[1]), rel=0.01)


def test_gzip_is_deflate_and_eighteen_bytes(texts):
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    size = len(deflate.compress(texts[1]) + deflate.flush()) + 18
    assert compressor_baselines(b"", texts[1])["gzip"] == 8 * size / len(texts[1])
    assert size == pytest.approx(len(gzip.compress(texts[1], 9)), rel=0.01)


def test_xz_is_the_command_line_tool_to_a_thousandth(texts):
    train, heldout = texts
    found = compressor_baselines(train, heldout)
    alone = tool_size(["xz", "-9e", "--threads=1"], heldout)
    assert found["xz"] == pytest.approx(8 * alone / len(heldout), rel=1e-3)
    command = ["xz", "--threads=1", "--format=xz", "--lzma2=preset=9e,dict=16MiB"]
    primed = tool_size(command, train + heldout) - tool_size(command, train)
    assert found["xz_primed"] == pytest.approx(8 * primed / len(heldout), rel=1e-2)  # a difference of two larger sizes


def test_priming_with_related_text_helps_and_with_noise_does_not(texts):
    train, heldout = texts
    noise = random.Random(0).randbytes(100_000)
    related, unrelated = compressor_baselines(train, heldout), compressor_baselines(noise, heldout)
    assert related["xz_primed"] < 0.95 * related["xz"]
    assert unrelated["xz_primed"] > 0.99 * unrelated["xz"]
    assert related["gzip"] == unrelated["gzip"]


def test_the_dictionary_reaches_the_far_end():
    # A text of 3 MB whose held-out part repeats its very beginning: a dictionary that forgot it would need 8 bits.
    noise = random.Random(1).randbytes(3_000_000)
    assert compressor_baselines(noise, noise[:50_000])["xz_primed"] < 0.1


@given(st.binary(min_size=1, max_size=3000))
@settings(max_examples=30, deadline=None)
def test_incompressible_bytes_cost_eight_bits_and_a_constant(data):
    noise = random.Random(data).randbytes(20_000)
    found = compressor_baselines(data, noise)
    for name in ("gzip", "xz", "xz_primed"):
        assert 8 * (1 - 64 / 20_000) <= found[name] <= 8 * (1 + 100 / 20_000), name


def test_baselines_without_held_out_text_are_an_error():
    with pytest.raises(ValueError, match="no held-out text"):
        compressor_baselines(b"abc", b"")


def test_baselines_in_the_background(texts, monkeypatch):
    train, heldout = texts[0][:50_000], texts[1][:10_000]
    assert start_baselines(train, heldout).result(60) == compressor_baselines(train, heldout)
    with pytest.raises(ValueError, match="no held-out text"):
        start_baselines(train, b"").result(60)
    monkeypatch.setattr(module, "_xz_size", lambda data, span: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        start_baselines(train, heldout).result(60)


@pytest.mark.slow
def test_figures_of_the_pinned_corpus():
    corpus = build_corpus()
    found = compressor_baselines(corpus.train_bytes, corpus.heldout_bytes)
    assert found == pytest.approx({"gzip": 1.748, "xz": 1.542, "xz_primed": 1.218}, rel=0.01)

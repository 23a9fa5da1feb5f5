"""Repeated documents: exact ones against a dictionary, near ones against Jaccard similarities of all pairs."""

import random
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from neox.corpus.clean import dedup
from neox.corpus.clean.dedup import SHINGLE, Method, UnionFind, find_duplicates, likelihood, write_keys


def repeats(shards: list[list[str]], method: Method, folder: Path) -> dict[tuple[int, int], tuple[int, int]]:
    """{(shard, number) of each repeat: (shard, number) of what is kept}."""
    written = [write_keys(texts, method, folder / f"{number:05d}") for number, texts in enumerate(shards)]
    assert [count for count, _ in written] == [len(texts) for texts in shards]
    return {
        (shard, int(number)): (int(home), int(kept))
        for shard, found in enumerate(find_duplicates(written))
        for number, home, kept in zip(found.numbers, found.shards, found.kept, strict=True)
    }


def runs(text: str) -> set[tuple[str, ...]]:
    spelled = text.split()
    return {tuple(spelled[i : i + SHINGLE]) for i in range(len(spelled) - SHINGLE + 1)}


def jaccard(left: set[tuple[str, ...]], right: set[tuple[str, ...]]) -> float:
    return len(left & right) / len(left | right)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(
    shards=st.lists(
        st.lists(st.sampled_from(["", "a", "A", "a ", "b", "c" * 40, "é"]), max_size=12), min_size=1, max_size=4
    ),
    kept=st.integers(1, 8),
    together=st.integers(1, 20),
    characters=st.integers(1, 60),
)
def test_exact_duplicates_are_those_of_a_dictionary(tmp_path, monkeypatch, shards, kept, together, characters):
    """However the work is cut: into calls, into files, into ranges of keys."""
    monkeypatch.setattr(dedup, "KEPT_KEYS", kept)
    monkeypatch.setattr(dedup, "RANGE_KEYS", together)
    monkeypatch.setattr(dedup, "BATCH_CHARACTERS", characters)
    first: dict[str, tuple[int, int]] = {}
    expected = {}
    for shard, texts in enumerate(shards):
        for number, text in enumerate(texts):
            if text and first.setdefault(text, (shard, number)) != (shard, number):
                expected[shard, number] = first[text]
    assert repeats(shards, "exact", tmp_path) == expected


@given(st.lists(st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=20), max_size=4))
def test_connected_components_are_those_of_a_search(batches: list[list[tuple[int, int]]]):
    groups = UnionFind(30)
    for pairs in batches:
        groups.join(*np.array(pairs, np.int64).reshape(-1, 2).T)
    least = list(range(30))
    for _ in range(30):
        for left, right in (pair for pairs in batches for pair in pairs):
            least[left] = least[right] = min(least[left], least[right])
    assert groups.first(np.arange(30)).tolist() == least


def edited(text: str, share: float, draw: random.Random) -> str:
    """The text with a stretch of its words replaced by new ones."""
    spelled = text.split()
    count = round(share * len(spelled))
    start = draw.randrange(len(spelled) - count + 1)
    return " ".join([*spelled[:start], *(f"n{draw.random()}" for _ in range(count)), *spelled[start + count :]])


@pytest.mark.parametrize("share", [0.05, 0.1, 0.15, 0.2, 0.3])
def test_minhash_finds_pairs_as_often_as_the_formula_says(tmp_path, share: float):
    draw = random.Random(share)
    trials, found, expected, variance = 400, 0, 0.0, 0.0
    texts = []
    for trial in range(trials):
        text = " ".join(f"w{trial}x{draw.random()}" for _ in range(200))
        texts += [text, edited(text, share, draw)]
        chance = likelihood(jaccard(*map(runs, texts[-2:])))
        expected += chance
        variance += chance * (1 - chance)
    found = len(repeats([texts], "minhash", tmp_path))
    assert abs(found - expected) <= 3.5 * variance**0.5 + 1, f"{found} found of {trials}, {expected:.1f} expected"


def test_minhash_removes_near_duplicates_and_nothing_else(tmp_path):
    draw = random.Random(1)
    vocabulary = [f"w{i}" for i in range(3000)]
    originals = [" ".join(draw.choices(vocabulary, k=draw.randrange(60, 400))) for _ in range(120)]
    texts = originals + [
        edited(draw.choice(originals), draw.choice([0, 0.01, 0.05, 0.2, 0.5]), draw) for _ in range(120)
    ]
    draw.shuffle(texts)
    bounds = [0, 50, 51, 150, 240]
    shards = [texts[a:b] for a, b in pairwise(bounds)]
    found = {bounds[a] + b: bounds[c] + d for (a, b), (c, d) in repeats(shards, "minhash", tmp_path).items()}
    sets = [runs(text) for text in texts]
    pairs = {(a, b): jaccard(sets[a], sets[b]) for a, b in combinations(range(len(texts)), 2)}
    for removed, kept in found.items():
        group = [kept, *(other for other, first in found.items() if first == kept and other != removed)]
        assert kept < removed
        assert max(pairs[min(removed, other), max(removed, other)] for other in group) > 0.5
    for (a, b), alike in pairs.items():
        if alike > 0.9:  # missed one time in 2,000
            assert found.get(b) == found.get(a, a)
    assert 60 < len(found) < 120  # those of a half replaced stay


def test_near_duplicates_do_not_depend_on_how_the_work_is_cut(tmp_path, monkeypatch):
    draw = random.Random(2)
    originals = [" ".join(draw.choices("abcdefgh", k=draw.randrange(30))) for _ in range(60)]
    texts = [*originals, "?!", "...", *(edited(text, 0.02, draw) if text else "" for text in originals)]
    whole = repeats([texts], "minhash", tmp_path / "whole")
    monkeypatch.setattr(dedup, "KEPT_KEYS", 7)
    monkeypatch.setattr(dedup, "RANGE_KEYS", 11)
    monkeypatch.setattr(dedup, "BATCH_CHARACTERS", 100)
    cut = repeats([texts[:30], texts[30:100], texts[100:]], "minhash", tmp_path / "cut")
    starts = [0, 30, 100]
    assert {(0, starts[a] + b): (0, starts[c] + d) for (a, b), (c, d) in cut.items()} == whole
    assert not any(texts[number] in ("", "?!", "...") for _, number in whole)  # without a word nothing is alike

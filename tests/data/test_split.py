"""Cutting a file's documents into train, valid and test: hand-worked cases, and what holds for all."""

import re
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neox.config import ConfigError, DataConfig
from neox.data.split import bounds, split
from tests.corpus.corpora import write_pair


def test_split_hand_worked() -> None:
    cases: list[tuple[str, int, tuple[int, ...]]] = [
        ("969,30,1", 1000, (0, 969, 999, 1000)),
        ("995,4,1", 1000, (0, 995, 999, 1000)),
        ("995,4,1", 210, (0, 209, 210, 210)),  # 208.95, 0.84, 0.21 -> 209, 1, 0
        ("8,1,1", 7, (0, 5, 6, 7)),  # 5.6, 0.7, 0.7 -> 6, 1, 1: one too many, taken from the first
        ("1,1,1", 10, (0, 4, 7, 10)),  # 3.33 each -> 3, 3, 3: one too few, given to the first
        ("1,1", 3, (0, 1, 3, 3)),  # 1.5 each -> 2 and 2 (half to even): one too many
        ("1,1", 5, (0, 3, 5, 5)),  # 2.5 each -> 2 and 2 (half to even): one too few
        ("1/1/2", 8, (0, 2, 4, 8)),
        ("5", 8, (0, 8, 8, 8)),
        ("995,4,1", 20, (0, 20, 20, 20)),
    ]
    for text, count, expected in cases:
        fractions = DataConfig(split=text).fractions
        assert fractions is not None, text
        assert bounds(fractions, count) == expected, (text, count)


@given(
    shares=st.tuples(st.integers(1, 1000), st.integers(0, 1000), st.integers(0, 1000)),
    count=st.integers(1, 10**6),
)
def test_split_puts_every_document_in_one_part_of_about_its_share(shares, count) -> None:
    fractions = DataConfig(split=",".join(map(str, shares))).fractions
    assert fractions is not None
    start, train, valid, end = bounds(fractions, count)
    assert (start, end) == (0, count)
    sizes = [train - start, valid - train, end - valid]
    exact = [Fraction(share, sum(shares)) * count for share in shares]
    assert abs(sizes[0] - exact[0]) <= Fraction(3, 2) + Fraction(1, 10**6)  # its own half, and half for each other part
    for size, wanted in zip(sizes[1:], exact[1:], strict=True):
        assert size >= 0
        assert abs(size - wanted) <= Fraction(1, 2) + Fraction(1, 10**6)


@settings(deadline=None, max_examples=8)
@given(sizes=st.lists(st.integers(0, 9), min_size=10, max_size=30))
def test_split_parts_hold_the_tokens(tmp_path_factory: pytest.TempPathFactory, sizes: list[int]) -> None:
    folder = tmp_path_factory.mktemp("data")
    prefixes = [write_pair(folder / "a", sizes), write_pair(folder / "b", sizes[::-1], 1000)]
    train, valid = split(prefixes, "6,3,1", (0.6, 0.3, 0.1))
    for found, own, start in ((0, sizes, 0), (1, sizes[::-1], 1000)):
        _, middle, stop, _ = bounds((0.6, 0.3, 0.1), len(own))
        assert train[found].tokens.tolist() == list(range(start, start + sum(own[:middle])))
        assert train[found].sizes.tolist() == own[:middle]
        assert valid[found].tokens.tolist() == list(range(start + sum(own[:middle]), start + sum(own[:stop])))
        assert len(valid[found]) == stop - middle


def test_split_of_too_few_documents(tmp_path: Path) -> None:
    prefix = write_pair(tmp_path / "few", [5] * 20)
    with pytest.raises(ValueError, match=r"few\.bin: data\.split = 995,4,1 leaves none of its 20 documents for valid"):
        split([prefix], "995,4,1", (0.995, 0.004, 0.001))
    one = write_pair(tmp_path / "one", [5])
    with pytest.raises(ValueError, match=r"leaves none of its 1 documents for training: change data\.split"):
        split([one], "1,9", (0.1, 0.9, 0.0))
    train, valid = split([one], "9,0,1", (0.9, 0.0, 0.1))  # the test part is not read: it may be empty
    assert len(train[0]) == 1
    assert valid == []


def test_split_fractions_that_cannot_be_read() -> None:
    for text in ["", "a", "1,2,3,4", "-1,2", "0,1", "0,0,0", "nan,1", "inf", "1,1/1", "1,,1", "1e308,1e308,1e308"]:
        with pytest.raises(ConfigError) as caught:
            DataConfig(split=text)
        assert re.search(r"^data\.split: .* must be up to three shares, such as \"995,4,1\"", str(caught.value)), text

"""Rows of text in columns."""

from neox.system.console import aligned, padded

ROWS = [("file", "tokens", "text"), ("00", "1,024", "2 + 2"), ("a", "7", "")]


def test_a_column_is_as_wide_as_its_widest_cell_and_stands_to_its_side():
    """Names and texts to the left also where all of them begin with a digit."""
    assert aligned(ROWS, "<><") == ["file  tokens  text", "00     1,024  2 + 2", "a          7"]
    assert padded(ROWS, "<><")[2] == ["a   ", "     7", "     "]

"""Rows of text in columns."""

from __future__ import annotations

from collections.abc import Sequence


def padded(rows: Sequence[Sequence[str]], sides: str) -> list[list[str]]:
    """The cells, each as wide as the widest of its column. `sides`: for each column the side of its text, < or >."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [[f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)] for row in rows]


def aligned(rows: Sequence[Sequence[str]], sides: str) -> list[str]:
    """A line for each row, its columns two spaces apart."""
    return ["  ".join(row).rstrip() for row in padded(rows, sides)]

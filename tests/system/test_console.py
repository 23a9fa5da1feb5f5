"""Progress bars, tables, numbers with units, errors on one line."""

import io

from rich.console import Console

from neox.system.console import (
    LONGEST,
    aligned,
    human_bytes,
    human_count,
    human_duration,
    human_gib,
    one_line,
    padded,
    progress_bar,
)

ROWS = [("file", "tokens", "text"), ("00", "1,024", "2 + 2"), ("a", "7", "")]


def test_a_column_is_as_wide_as_its_widest_cell_and_stands_to_its_side():
    """Names and texts to the left also where all of them begin with a digit."""
    assert aligned(ROWS, "<><") == ["file  tokens  text", "00     1,024  2 + 2", "a          7"]
    assert padded(ROWS, "<><")[2] == ["a   ", "     7", "     "]


def test_human_numbers():
    """Three digits, and the unit of the rounded number."""
    for call, number, text in (
        (human_count, 0, "0"),
        (human_count, 7, "7"),
        (human_count, 0.05, "0.05"),
        (human_count, 999.4, "999"),
        (human_count, 999.6, "1k"),
        (human_count, 1500, "1.5k"),
        (human_count, 99_700, "99.7k"),
        (human_count, 999_600, "1M"),
        (human_count, 1.26e6, "1.26M"),
        (human_count, 14.2e6, "14.2M"),
        (human_count, 20.6e9, "20.6B"),
        (human_count, 3e17, "300000T"),
        (human_bytes, 0, "0 B"),
        (human_bytes, 1234, "1.23 kB"),
        (human_bytes, 41.1e9, "41.1 GB"),
        (human_bytes, 999.9e9, "1 TB"),
        (human_gib, 2**33, "8.0 GiB"),
        (human_gib, 2**42, "4,096.0 GiB"),
        (human_duration, 12.3, "12 seconds"),
        (human_duration, 7200, "2.0 hours"),
        (human_duration, 40 * 86400, "40 days"),
        (human_duration, 5000 * 365.25 * 86400, "5,000 years"),
    ):
        assert call(number) == text, (call.__name__, number)


def test_an_error_is_one_line():
    assert one_line(ValueError("it\n  broke.")) == "it broke"
    assert one_line(ValueError("it\n  broke."), named=True) == "ValueError: it broke"
    assert one_line(ValueError()) == one_line(ValueError(), named=True) == "ValueError"
    assert len(one_line(ValueError("x" * 1000))) == LONGEST


def test_a_progress_bar_shows_amount_rate_and_time_left():
    def shown(*amounts: str, **fields: str) -> str:
        console = Console(file=io.StringIO(), force_terminal=True, width=120)
        with progress_bar(*amounts, console=console) as bar:
            task = bar.add_task("work", total=4000, **fields)
            for _ in range(3):
                bar.advance(task, 1000)
        return console.file.getvalue()

    assert "3000/4000" in shown("count", "rate")
    assert "/s" in shown("count", "rate")
    assert "3.0/4.0 kB" in shown("bytes")
    assert "loss 2.5" in shown("count", "status", status="loss 2.5")
    assert all("eta" in shown(kind) for kind in ("count", "bytes"))


def test_a_hidden_progress_bar_writes_nothing():
    console = Console(file=io.StringIO(), force_terminal=True)
    with progress_bar("count", show=False, console=console) as bar:
        bar.advance(bar.add_task("work", total=2))
    assert console.file.getvalue() == ""

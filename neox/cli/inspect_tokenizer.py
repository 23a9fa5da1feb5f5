"""Compare tokenizers on texts: compression and use of the vocabulary.

neox inspect tokenizer TOKENIZER [OTHER...] text=SOURCE [text=SOURCE...] [text_key=text]

TOKENIZER is a tokenizer.json or a folder with one; SOURCE whatever `neox prepare` reads.
Bytes and characters a token, tokens a word, the share of the vocabulary that was used, whether
decoding gives the text back, the longest tokens.

Examples:
  neox inspect tokenizer runs/first text=corpus.txt
  neox inspect tokenizer runs/first other/tokenizer.json text=a.jsonl text=b.txt
"""

from __future__ import annotations

from pydantic import Field

from neox.cli.verb import UsageError, read_all
from neox.config import Section
from neox.config.sections import Strings


class InspectTokenizerOptions(Section):
    """Options of `neox inspect tokenizer`."""

    text: Strings = Field(default=(), title="SOURCE")
    """Text to encode; several: text=A text=B."""
    text_key: str = "text"
    """Key of the text in JSON lines, or its column in Parquet files and data sets."""


OPTIONS = InspectTokenizerOptions


def run(targets: list[str], options: list[str]) -> None:
    """Run the topic."""
    chosen = read_all("inspect tokenizer", InspectTokenizerOptions, options)
    if not targets or not chosen.text:
        raise UsageError("inspect tokenizer needs a TOKENIZER and text=SOURCE")
    from neox.analysis.tokenizer_report import tokenizer_report

    print(tokenizer_report(targets, chosen.text, chosen.text_key))

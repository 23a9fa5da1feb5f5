"""The manifest `PREFIX.json` of a token file: its fields and its only reader."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from neox.config.structured import read_json
from neox.data.token_file import beside


def manifest_file(prefix: str | Path) -> Path:
    """Path of the manifest of a prefix."""
    return beside(prefix, ".json")


@dataclass(frozen=True)
class Manifest:
    """Record of the text and the settings that a token file was made from.

    A field that the file does not have is None, or empty.
    """

    format: int = 1
    sources: Sequence[dict[str, Any]] = ()
    """For each name that the user gave: `path` (the name), `bytes`, and `files` or `revision`."""
    tokenizer_sha256: str | None = None
    vocab_size: int | None = None
    text_key: str | None = None
    append_eod: bool | None = None
    special_in_text: str | None = None
    components: str | None = None
    """Folder of the notes that `pile.components` reads; only of the Pile."""
    cleaning: dict[str, Any] | None = None
    """Settings of `dedup` and `decontaminate`, and a hash of all that they depend on."""
    dtype: str | None = None
    documents: int | None = None
    bytes: int | None = None
    """UTF-8 bytes of the documents' text."""
    tokens: int | None = None
    empty: int | None = None
    """Documents left out because they hold no text."""
    origins: Sequence[Sequence[Any]] = ()
    """[file or data set, number of documents], in the order of the documents."""
    skipped: dict[str, dict[str, Any]] | None = None
    """Documents that could not be read, by reason: how many, and the first few places."""
    sha256: str | None = None
    """Hash of the `.bin`."""
    plan: str | None = None
    """Hash of all that the tokens depend on."""
    removed: dict[str, Any] | None = None
    """Counts of near-duplicates and of overlaps with evaluation sets."""

    @classmethod
    def read(cls, prefix: str | Path) -> Manifest | None:
        """Read the manifest beside a pair; None where there is none.

        Raises ValueError where the file is not a JSON object, OSError where it cannot be read.
        """
        try:
            content = read_json(manifest_file(prefix))
        except FileNotFoundError:
            return None
        return cls(**{field.name: content[field.name] for field in fields(cls) if field.name in content})

    @classmethod
    def read_sound(cls, prefix: str | Path) -> Manifest | None:
        """Read the manifest beside a pair; None where there is none that can be read."""
        with suppress(OSError, ValueError):
            return cls.read(prefix)
        return None

    @property
    def of_prepare(self) -> bool:
        """Tell whether prepare wrote the file: no other program writes this key."""
        return self.tokenizer_sha256 is not None

    def content(self) -> dict[str, Any]:
        """Fields that are set, in order, as the file holds them."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) is not None}

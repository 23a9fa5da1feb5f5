"""Documents out of corpora: from what a user names (files, folders, data sets) to texts, one by one.

`sources` turns names into sources; `text` (over `streams`, which decompresses) and `columns` read their files, and
`huggingface` reads Hugging Face data sets. What cannot be read goes to `faults`: it ends the reading, or is counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from neox.corpus.readers.chunks import Document, Piece
from neox.corpus.readers.errors import Fault, Faults, OnError, Skipped
from neox.corpus.readers.sources import Name, Source, find_sources, read_piece, read_source

__all__ = [
    "Document",
    "Fault",
    "Faults",
    "Name",
    "OnError",
    "Piece",
    "Skipped",
    "Source",
    "find_sources",
    "read_documents",
    "read_piece",
    "read_source",
]


def read_documents(sources: Name | Sequence[Name], text_key: str = "text", on_error: OnError = "fail") -> Iterator[str]:
    """The documents of all `sources`, in order, none of them empty. What a source may be: `find_sources`.

    `text_key` names the member or the column that holds the text. With `on_error="skip"` what cannot be read is left
    out without a word here: `prepare` is what counts and reports it.
    Raises at the call what can be known without reading the text, as `find_sources` does; while reading, Fault (a
    ValueError) with file and line on the first document that cannot be read.
    """
    found = find_sources(sources, text_key, on_error)
    faults = Faults(on_error)
    return (document.text for source in found for document in read_source(source, text_key, faults) if document.text)

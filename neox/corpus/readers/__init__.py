"""Readers of corpora: files, folders, URLs and data sets to documents.

`sources` turns names into sources; `text` (over `streams`, which decompresses) and `columns` read their files, and
`hub_datasets` reads Hugging Face data sets. An `ErrorPolicy` decides whether a document that cannot be read ends the
reading or is counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from neox.corpus.readers.chunks import Chunk, Document
from neox.corpus.readers.errors import ErrorPolicy, OnError, ReadError, Skipped
from neox.corpus.readers.sources import Name, Source, find_sources, read_chunk, read_source

__all__ = [
    "Chunk",
    "Document",
    "ErrorPolicy",
    "Name",
    "OnError",
    "ReadError",
    "Skipped",
    "Source",
    "find_sources",
    "read_chunk",
    "read_documents",
    "read_source",
]


def read_documents(sources: Name | Sequence[Name], text_key: str = "text", on_error: OnError = "fail") -> Iterator[str]:
    """Read the documents of all `sources`, in order, without empty ones.

    A source is anything that `find_sources` takes.

    `text_key` names the member or the column that holds the text. With `on_error="skip"` what cannot be read is left
    out without a word here: `prepare` is what counts and reports it.
    Raises at the call what can be known without reading the text, as `find_sources` does; while reading, ReadError (a
    ValueError) with file and line on the first document that cannot be read.
    """
    every_source = find_sources(sources, text_key, on_error)
    policy = ErrorPolicy(on_error)
    documents = (document for source in every_source for document in read_source(source, text_key, policy))
    return (document.text for document in documents if document.text)
